"""Which backend runs which call here: by what is installed, asked for, and fits the device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from megatron_skyladder.attention.backends.base import Backend, WidenedValues
from megatron_skyladder.attention.backends.flash import (
    FlashBackend,
    FlashCuteBackend,
    FlashHopperBackend,
    VarlenBackend,
)
from megatron_skyladder.attention.backends.sdpa import SdpaBackend
from megatron_skyladder.attention.backends.te import TransformerEngineBackend
from megatron_skyladder.attention.segments import Segments
from megatron_skyladder.cpu import engine as cpu_engine
from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import measured
from megatron_skyladder.ladder.kernels import (
    AUTO,
    KERNELS,
    VANILLA,
    Call,
    TransformerEngine,
    preference,
    value_width,
    why_no_sink,
)
from megatron_skyladder.ladder.measured import Measured

logger = logging.getLogger(__name__)

BACKENDS: dict[str, type[Backend]] = {
    "te": TransformerEngineBackend,
    "fa4": FlashCuteBackend,
    "fa3": FlashHopperBackend,
    "flash": FlashBackend,
    "varlen": VarlenBackend,
    "sdpa": SdpaBackend,
}
_HOPPER = (9, 0)
_WIDEST = 256  # channels of a head for which Transformer Engine finds a fused kernel
_FA3_DETERMINISTIC = 192  # hopper/flash_api.cpp rounds wider ones to 256


class Heads(NamedTuple):
    """Channels of a head: of queries and keys, and of values."""

    key: int
    value: int


_USUAL_HEADS = Heads(128, 128)  # where nobody says which


class Model(NamedTuple):
    """What of a layer decides which kernels run it.

    Args:
        deterministic: whether the model is.
        heads: sizes of its heads; None: not known.
        softmax_type: Megatron's.
        slides: whether a query's keys may begin behind its segment's start, at any step of the run.
    """

    deterministic: bool
    heads: Heads | None
    softmax_type: str
    slides: bool = False


@dataclass(frozen=True)
class Choice:
    """The backend of one kind of call, and why."""

    call: Call
    name: str
    reason: str


_made: dict[tuple[Call, bool], Choice] = {}


def made() -> dict[str, Choice]:
    """Return what the layers of this process were built with, by the kind of call."""
    return {f"{call.value}{', sliding' * slides}": it for (call, slides), it in _made.items()}


class BackendOfCalls(Backend):
    """Hands each kind of call to the backend that was chosen for it."""

    def __init__(self, scale: float, *, full: Backend, windows: Backend, packed: Backend) -> None:
        super().__init__(scale)
        self._full, self._windows, self._packed = full, windows, packed

    def use_sink(self, sink: Callable[[], torch.Tensor]) -> None:
        """See `Backend`."""
        for backend in (self._full, self._windows, self._packed):
            backend.use_sink(sink)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """See `Backend`."""
        out: torch.Tensor = self._packed(query, key, value, segments)
        return out

    def attend_windows(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """See `Backend`."""
        return self._windows.attend_windows(query, key, value, segments)

    def attend_full(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """See `Backend`."""
        return self._full.attend_full(query, key, value, segments)


def make_backend(
    name: str, *, config: Any, scale: float, slides: bool = False, **stock_arguments: Any
) -> Backend:
    """Build the backend of one layer.

    Args:
        name: a key of ``KERNELS`` or ``auto``.
        config: Megatron's TransformerConfig.
        scale: factor on the logits.
        slides: see `Model`.
        stock_arguments: what Megatron gives to any core attention of this layer.

    Raises:
        UsageError: what the backend needs is not installed, or the device cannot run it.
    """
    heads = Heads(config.kv_channels, config.kv_channels)
    if stock_arguments.get("k_channels") is not None:  # multi-latent attention says so
        heads = Heads(stock_arguments["k_channels"], stock_arguments["v_channels"])
    choose = partial(
        choose_backends,
        name,
        config.params_dtype,
        deterministic=bool(config.deterministic_mode),
        heads=heads,
        softmax_type=softmax_type_of(config),
    )
    choices = choose(slides=slides)
    _made.update({(choice.call, slides): choice for choice in choices})
    layer = stock_arguments["layer_number"]
    usual = () if layer == 1 else choose()
    for choice in choices:
        if choice not in usual:  # a local layer's kernel may be another than its neighbours'
            logger.info(
                "attention backend for %s%s: %s (%s)",
                choice.call.value,
                "" if layer == 1 else f" in layer {layer}",
                choice.name,
                choice.reason,
            )
    built = {
        used: _build(used, heads, config=config, scale=scale, **stock_arguments)
        for used in {choice.name for choice in choices}
    }
    if len(built) == 1:
        return next(iter(built.values()))
    full, windows, packed = (built[choice.name] for choice in choices)
    return BackendOfCalls(scale, full=full, windows=windows, packed=packed)


def _build(name: str, heads: Heads, **arguments: Any) -> Backend:
    backend = BACKENDS[name].build(**arguments)
    width = value_width(name, *heads, _capability())
    assert width is not None, f"{name} was chosen for heads of {heads}"
    return backend if width == heads.value else WidenedValues(backend, width)


def softmax_type_of(config: Any) -> str:
    """Return Megatron's --softmax-type of a model."""
    return str(getattr(config, "softmax_type", VANILLA))  # from 0.15 on


def has_sink(config: Any) -> bool:
    """Return whether the softmax of a model has one more logit than keys."""
    return softmax_type_of(config) != VANILLA


def choose_backends(
    name: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    deterministic: bool = False,
    heads: Heads | None = None,
    softmax_type: str = VANILLA,
    slides: bool = False,
) -> tuple[Choice, Choice, Choice]:
    """Return what runs the full window, windows, and packed calls here.

    Args:
        name: a key of ``KERNELS``, or ``auto``, which takes the fastest of those that
            ``skyladder check-gpu`` measured here, or else the first of `kernels.PREFERENCES`
            that is installed.
        dtype: of the model's parameters.
        deterministic: whether the model is.
        heads: sizes of its heads; None: not known, and all kernels are taken to have them.
        softmax_type: Megatron's; but for the default the softmax has a sink.
        slides: see `Model`.

    Raises:
        UsageError: what was named is not installed, or the device cannot run it.
    """
    model = Model(deterministic, heads, softmax_type, slides)
    full, windows, packed = (_choose(name, call, dtype, model) for call in Call)
    return full, windows, packed


@lru_cache(maxsize=64)
def _choose(name: str, call: Call, dtype: torch.dtype, model: Model) -> Choice:
    if name != AUTO:
        lacks = missing(name)
        if lacks:
            raise UsageError(
                f"--skyladder-attention-backend={name} needs {lacks}. Install it, or use auto, "
                "which takes the best of what is there."
            )
        why = _unfit(name, call, model)
        if why is None:
            return Choice(call, name, "as --skyladder-attention-backend says")
        if not model.deterministic or _unfit(name, call, model._replace(deterministic=False)):
            fit = [each for each in KERNELS if _problem(each, call, model) is None]
            raise UsageError(
                f"--skyladder-attention-backend={name} cannot be used here: {why}. These can: "
                f"{', '.join(fit)}; auto takes the best of them."
            )
    elif cpu_engine.is_installed() or cpu_engine.is_requested():
        return Choice(call, "sdpa", "the CPU engine runs, the others need a GPU")
    elif dtype == torch.float32:
        return Choice(call, "sdpa", "the model is float32, the others take float16 and bfloat16")
    found = _measured()
    if found is not None:
        for candidate in found.order(call):
            if _problem(candidate, call, model) is None:
                return Choice(call, candidate, found.reason(call, candidate))
    row = preference(call, _capability())
    passed_over: list[str] = []
    for candidate in row.order:
        problem = _problem(candidate, call, model)
        if problem is None:
            return Choice(call, candidate, "; ".join([*passed_over, row.reason]))
        passed_over.append(f"no {problem}")
    raise AssertionError("sdpa ends every row and is always there")


def _measured() -> Measured | None:
    """Return what ``skyladder check-gpu`` measured on this kind of GPU, where it did."""
    if not torch.cuda.is_available():
        return None
    return measured.read(torch.cuda.get_device_name())


def _capability() -> tuple[int, int]:
    """Return the device's compute capability; Hopper's where there is no device to ask."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else _HOPPER


def _problem(name: str, call: Call, model: Model) -> str | None:
    return missing(name) or _unfit(name, call, model)


def missing(name: str) -> str | None:
    """Return what a backend lacks here, or None.

    A package is imported rather than looked for: one that is half installed, or built for another
    torch, is not there either, and raises what it likes.
    """
    try:
        BACKENDS[name].check_installed()
    except Exception as error:
        return f"{KERNELS[name].needs} ({type(error).__name__}: {error})"
    return None


def unfit(
    name: str,
    call: Call,
    *,
    deterministic: bool,
    heads: Heads | None = None,
    softmax_type: str = VANILLA,
) -> str | None:
    """Return why an installed backend cannot run a call on this device, or None."""
    return _unfit(name, call, Model(deterministic, heads, softmax_type))


def _unfit(name: str, call: Call, model: Model) -> str | None:
    deterministic, heads, softmax_type, slides = model
    capability = _capability()
    lowest = KERNELS[name].capability
    if capability < lowest:
        return f"{name} below compute capability {lowest[0]}.{lowest[1]}"
    if heads is not None and value_width(name, *heads, capability) is None:
        return (
            f"{name} for keys of {heads.key} channels and values of {heads.value} on compute "
            f"capability {capability[0]}.{capability[1]}: it has no kernel for them, which "
            "flash and varlen have up to 256 channels, and sdpa for any"
        )
    if name == "te" and call is not Call.FULL and heads is not None and max(heads) > _WIDEST:
        return (
            f"te for heads of {max(heads)} channels: above {_WIDEST} it would attend unfused, which"
            " runs out of memory"
        )
    if name == "fa4" and deterministic and capability[0] == 12:
        return "fa4 in --deterministic-mode on compute capability 12: it has no such backward"
    if name == "fa4" and capability[0] in (10, 11) and heads == (_WIDEST, _WIDEST):
        # a kernel of its own: flash_attn/cute/sm100_hd256_2cta_fmha_*.py, August 2026
        kernel = f"fa4 for heads of {_WIDEST} channels on Blackwell: its kernel for them"
        if slides:
            return f"{kernel} does not slide"
        if deterministic:
            return f"{kernel} has no deterministic backward"
    if name == "fa3" and deterministic and heads is not None and max(heads) > _FA3_DETERMINISTIC:
        return (
            f"fa3 in --deterministic-mode for heads above {_FA3_DETERMINISTIC} channels: it has no "
            "such backward"
        )
    if softmax_type != VANILLA:
        no_sink = _no_sink(name, call, model)
        return None if no_sink is None else f"{name} with a softmax sink: {no_sink}"
    if name != "te" or call is not Call.PACKED:
        return None
    if deterministic:  # cuDNN's backward would hold [heads, tokens, tokens] twice over
        return "te for packed calls in --deterministic-mode: its workspace does not fit in memory"
    if capability < _HOPPER and not _te_has_flash_attention():
        return (
            "te for packed calls before Hopper without a flash-attn that Transformer Engine takes "
            "(2.1.1 or later, before 2.8.4): it would attend unfused, which runs out of memory"
        )
    return None


def _no_sink(name: str, call: Call, model: Model) -> str | None:
    key_size, value_size = model.heads or _USUAL_HEADS
    try:
        reason = why_no_sink(
            name,
            call,
            _capability(),
            _te() if name == "te" else None,
            softmax_type=model.softmax_type,
            heads=(key_size, value_width(name, key_size, value_size, _capability()) or value_size),
            deterministic=model.deterministic,
        )
        if reason is None:
            BACKENDS[name].check_sink()
    except Exception as error:  # as for `missing`
        return f"this release has none ({type(error).__name__}: {error})"
    return reason


def _te() -> TransformerEngine:
    from megatron.core.utils import get_te_version
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    major, minor, patch = utils.get_cudnn_version()
    return TransformerEngine(get_te_version().release, (major, minor, patch))


def _te_has_flash_attention() -> bool:
    try:
        from transformer_engine.pytorch.attention.dot_product_attention.utils import (
            FlashAttentionUtils,
        )
    except ImportError:
        return False
    return bool(FlashAttentionUtils.is_installed)
