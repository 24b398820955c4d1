"""Which backend runs which call, and what each kernel library is called with.

The libraries are recorders here; tests/te runs the real ones' Python, tests/gpu their kernels.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from megatron_skyladder.attention import sdpa  # noqa: E402
from megatron_skyladder.attention.backends import (  # noqa: E402
    BACKENDS,
    choose,
    choose_backends,
    from_thd,
    make_backend,
    to_thd,
)
from megatron_skyladder.attention.segments import Rows, Segments, grid_segments  # noqa: E402
from megatron_skyladder.cpu import engine as cpu_engine  # noqa: E402
from megatron_skyladder.errors import UsageError  # noqa: E402
from megatron_skyladder.ladder import measured  # noqa: E402
from megatron_skyladder.ladder.kernels import (  # noqa: E402
    KERNELS,
    PREFERENCES,
    Call,
    TransformerEngine,
    preference,
    why_no_sink,
)
from megatron_skyladder.ladder.measured import Measured  # noqa: E402

CPU = torch.device("cpu")
SCALE = 0.25
PACKAGES = ("transformer_engine", "flash_attn", "flash_attn_interface", "flash_attn.cute")


@pytest.fixture(autouse=True)
def a_gpu_without_packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU; packages that are not there, whatever is installed."""
    monkeypatch.setattr(cpu_engine, "is_installed", lambda: False)
    monkeypatch.setattr(cpu_engine, "is_requested", lambda: False)
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    choose._choose.cache_clear()
    yield
    choose._choose.cache_clear()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Give the process a device of some compute capability."""

    def set_capability(major: int, minor: int) -> None:
        choose._choose.cache_clear()
        monkeypatch.setattr(choose, "_capability", lambda: (major, minor))

    return set_capability


def install(monkeypatch: pytest.MonkeyPatch, module: str, function: Callable[..., Any]) -> None:
    fake: Any = types.ModuleType(module)
    fake.flash_attn_varlen_func = function
    monkeypatch.setitem(sys.modules, module, fake)


def install_all(monkeypatch: pytest.MonkeyPatch, *, te_has_flash_attention: bool = True) -> None:
    def function(cu_seqlens_q, window_size, deterministic, learnable_sink=None):
        raise NotImplementedError

    def passes(window_size_left, window_size_right, softcap, alibi_slopes, rng_state):
        raise NotImplementedError

    def cute_backward(learnable_sink):
        raise NotImplementedError

    class DotProductAttention:
        def __init__(self, softmax_type):
            raise NotImplementedError

    for module in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        install(monkeypatch, module, function)
    for module in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    modules: dict[str, Any] = sys.modules  # type: ignore[assignment]
    modules["flash_attn"].flash_attn_interface = types.SimpleNamespace(
        _flash_attn_varlen_forward=passes, _flash_attn_varlen_backward=passes
    )
    modules["flash_attn.cute"].interface = types.SimpleNamespace(_flash_attn_bwd=cute_backward)
    modules["transformer_engine.pytorch"].DotProductAttention = DotProductAttention
    monkeypatch.setattr(choose, "_te", lambda: TransformerEngine((2, 20), (9, 26, 0)))
    monkeypatch.setattr(choose, "_te_has_flash_attention", lambda: te_has_flash_attention)


def names(name: str = "auto", **asked: Any) -> tuple[str, ...]:
    return tuple(choice.name for choice in choose_backends(name, **asked))


# --- the choice ---------------------------------------------------------------------------------


def test_every_kernel_that_is_described_has_a_backend_and_a_place() -> None:
    assert set(BACKENDS) == set(KERNELS)
    for row in PREFERENCES:
        assert row.order[-1] == "sdpa" and row.reason
        assert set(row.order) <= set(KERNELS)
    assert {name for row in PREFERENCES for name in row.order} == set(KERNELS)


def test_auto_takes_what_was_measured_here(
    monkeypatch: pytest.MonkeyPatch, device: Callable[[int, int], None], tmp_path: Path
) -> None:
    """The fastest that is still installed, with that reason; the full window stays stock's."""
    install_all(monkeypatch)
    times = {Call.WINDOWS: {"fa3": 0.5, "fa4": 0.25}, Call.PACKED: {"flash": 0.75, "varlen": 1.0}}
    file = measured.write(Measured("NVIDIA H100", "2026-11-29", times), tmp_path / "m.json")
    monkeypatch.setenv(measured.VARIABLE, str(file))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    device(9, 0)
    full, windows, packed = choose_backends("auto")
    assert (full.name, windows.name, packed.name) == ("te", "fa4", "flash")
    assert windows.reason == "measured here on 2026-11-29: fa4 0.25 ms, fa3 0.5 ms"
    assert "measured" not in full.reason
    assert names("fa3") == ("fa3", "fa3", "fa3")
    device(9, 0)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert names() == ("te", "fa3", "varlen")
    device(9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert "FlashAttention 3 and 4 are made for Hopper" in choose_backends("auto")[1].reason


@pytest.mark.parametrize(
    ("capability", "chosen"),
    [
        ((7, 5), ("sdpa", "sdpa", "sdpa")),
        ((8, 0), ("te", "flash", "flash")),
        ((8, 9), ("te", "flash", "flash")),
        ((9, 0), ("te", "fa3", "fa3")),
        ((10, 0), ("te", "fa4", "fa4")),
        ((12, 0), ("te", "fa4", "fa4")),
    ],
)
def test_auto_with_everything_installed(
    monkeypatch: pytest.MonkeyPatch,
    device: Callable[[int, int], None],
    capability: tuple[int, int],
    chosen: tuple[str, ...],
) -> None:
    """Worked out by hand: stock's call at the full window, FlashAttention elsewhere."""
    install_all(monkeypatch)
    device(*capability)
    assert names() == chosen


def test_auto_with_transformer_engine_alone(
    monkeypatch: pytest.MonkeyPatch, device: Callable[[int, int], None]
) -> None:
    install_all(monkeypatch)
    for module in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, module, None)
    device(9, 0)
    assert names() == ("te", "varlen", "varlen")


def test_auto_says_what_it_passed_over() -> None:
    full, windows, _ = choose_backends("auto")
    assert (full.name, windows.name) == ("varlen", "varlen")
    assert full.reason.startswith("no transformer-engine (ModuleNotFoundError: ")
    assert "; no flash-attn 2.4 or later (ModuleNotFoundError: " in windows.reason
    assert windows.reason.endswith(preference(Call.WINDOWS, (9, 0)).reason)


def test_auto_takes_sdpa_in_float32_and_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    full, *_ = choose_backends("auto", torch.float32)
    assert full.name == "sdpa"
    assert full.reason == "the model is float32, the others take float16 and bfloat16"
    monkeypatch.setattr(cpu_engine, "is_requested", lambda: True)
    assert names(dtype=torch.bfloat16) == ("sdpa",) * 3


def test_a_package_that_breaks_on_import_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "flash_attn.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.syspath_prepend(tmp_path)
    assert "later (OSError: undefined symbol); " in choose_backends("auto")[1].reason


def test_what_was_named_has_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"backend=te needs transformer-engine .*Install it, or"):
        choose_backends("te")

    def of_an_old_release(q: Any) -> None:
        raise NotImplementedError

    install(monkeypatch, "flash_attn", of_an_old_release)
    with pytest.raises(ValueError, match=r"2.4 or later .*does not take window_size, determ"):
        choose_backends("flash")
    assert names("varlen") == ("varlen",) * 3
    assert choose_backends("varlen")[0].reason == "as --skyladder-attention-backend says"


def test_what_the_device_cannot_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: Callable[[int, int], None]
) -> None:
    install_all(monkeypatch, te_has_flash_attention=False)
    device(8, 0)
    with pytest.raises(ValueError, match=r"backend=fa4 cannot be used here: fa4 below .* 9\.0"):
        choose_backends("fa4")
    with pytest.raises(ValueError, match=r"backend=te cannot .* flash-attn that Transformer Eng"):
        choose_backends("te")
    assert names()[0] == "te"  # stock's own call: what stock runs is stock's matter


@pytest.mark.parametrize(
    ("capability", "size", "chosen"),
    [
        ((9, 0), 128, ("te", "fa3", "fa3")),
        ((9, 0), 256, ("te", "fa3", "fa3")),
        ((9, 0), 320, ("te", "sdpa", "sdpa")),
        ((8, 0), 128, ("te", "flash", "flash")),
        ((8, 0), 320, ("te", "sdpa", "sdpa")),
        ((10, 0), 192, ("te", "flash", "flash")),  # FlashAttention 4 has 192 with values of 128
    ],
)
def test_auto_looks_at_the_size_of_ordinary_heads(
    monkeypatch: pytest.MonkeyPatch,
    device: Callable[[int, int], None],
    capability: tuple[int, int],
    size: int,
    chosen: tuple[str, ...],
) -> None:
    """FlashAttention ends at 256 channels; Transformer Engine looks for a kernel by itself."""
    install_all(monkeypatch)
    device(*capability)
    assert names(heads=choose.Heads(size, size)) == chosen


def test_a_layer_says_which_heads_it_has(device: Callable[[int, int], None]) -> None:
    device(9, 0)
    for size, kind in ((256, "VarlenBackend"), (320, "SdpaBackend")):
        assert type(build("auto", kv_channels=size)).__name__ == kind
    with pytest.raises(UsageError, match="varlen for keys of 320 channels and values of 320"):
        build("varlen", kv_channels=320)


def test_deterministic_transformer_engine_leaves_packed_calls_to_flash_attention(
    monkeypatch: pytest.MonkeyPatch, device: Callable[[int, int], None]
) -> None:
    install_all(monkeypatch)
    device(9, 0)
    assert names("te", deterministic=True) == ("te", "te", "fa3")
    assert names("te") == ("te", "te", "te")


def test_flash_attention_4_in_deterministic_mode(
    monkeypatch: pytest.MonkeyPatch, device: Callable[[int, int], None]
) -> None:
    """On Hopper and data-centre Blackwell it has such a backward, on compute capability 12 not."""
    install_all(monkeypatch)
    for capability, expected in ((9, "fa4"), (10, "fa4"), (12, "flash")):
        device(capability, 0)
        assert names("fa4", deterministic=True)[1:] == (expected, expected)
        assert names("fa4")[1:] == ("fa4", "fa4")
    device(12, 0)
    assert "it has no such backward" in choose_backends("auto", deterministic=True)[1].reason


@pytest.mark.parametrize(
    ("capability", "size", "asked", "expected"),
    [
        ((10, 0), 256, {}, "fa4"),
        ((10, 0), 256, {"slides": True}, "flash"),
        ((10, 3), 256, {"deterministic": True}, "flash"),
        ((10, 0), 128, {"slides": True, "deterministic": True}, "fa4"),
        ((9, 0), 256, {"slides": True}, "fa3"),
        ((9, 0), 192, {"deterministic": True}, "fa3"),
        ((9, 0), 200, {"deterministic": True}, "fa4"),  # FlashAttention 3 rounds it to 256
        ((9, 0), 256, {"deterministic": True, "slides": True}, "fa4"),
    ],
)
def test_wide_heads_that_slide_or_are_deterministic(
    monkeypatch: pytest.MonkeyPatch,
    device: Callable[[int, int], None],
    capability: tuple[int, int],
    size: int,
    asked: dict[str, bool],
    expected: str,
) -> None:
    """By the kernels' own assertions: sm100_hd256_2cta_fmha_*.py, and hopper/flash_api.cpp."""
    install_all(monkeypatch)
    device(*capability)
    assert names(heads=choose.Heads(size, size), **asked)[1:] == (expected, expected)


def test_a_local_layer_says_where_its_kernel_is_another(
    monkeypatch: pytest.MonkeyPatch,
    device: Callable[[int, int], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    install_all(monkeypatch)
    device(10, 0)
    caplog.set_level("INFO", "megatron_skyladder")
    made: list[str] = []
    monkeypatch.setattr(choose, "_build", lambda used, *_, **__: made.append(used))
    for layer, slides in ((1, False), (2, False), (3, True)):
        wide = config(kv_channels=256)
        make_backend("auto", config=wide, scale=SCALE, slides=slides, layer_number=layer)
    said = [text.partition(" (")[0] for text in caplog.messages if "attention backend" in text]
    assert len(said) == 5 and "in layer" not in " ".join(said[:3])
    assert [text.rpartition(" in layer ")[2] for text in said[3:]] == ["3: flash", "3: flash"]
    assert {*made[:2]} == {*made[2:4]} == {"te", "fa4"} and {*made[4:]} == {"te", "flash"}


# --- softmax sinks ------------------------------------------------------------------------------

OFF_BY_ONE, LEARNABLE = "off-by-one", "learnable"


@pytest.mark.parametrize(
    ("capability", "cudnn", "chosen"),
    [
        ((7, 5), (9, 26, 0), ("sdpa", "sdpa", "sdpa")),
        ((8, 0), (9, 26, 0), ("te", "flash", "flash")),
        ((8, 0), (9, 13, 0), ("flash", "flash", "flash")),  # TE would attend unfused
        ((9, 0), (9, 26, 0), ("te", "fa4", "fa4")),  # FlashAttention 3 has none
        ((10, 0), (9, 17, 0), ("te", "fa4", "fa4")),
        ((12, 0), (9, 26, 0), ("te", "flash", "flash")),
        ((12, 0), (9, 18, 0), ("flash", "flash", "flash")),
    ],
)
def test_auto_takes_kernels_with_sinks(
    monkeypatch: pytest.MonkeyPatch,
    device: Callable[[int, int], None],
    capability: tuple[int, int],
    cudnn: tuple[int, int, int],
    chosen: tuple[str, ...],
) -> None:
    """Worked out by hand, with everything installed."""
    install_all(monkeypatch)
    monkeypatch.setattr(choose, "_te", lambda: TransformerEngine((2, 20), cudnn))
    device(*capability)
    for kind in (OFF_BY_ONE, LEARNABLE):
        assert names(softmax_type=kind) == chosen
        assert names(softmax_type=kind, dtype=torch.float32) == ("sdpa",) * 3


def test_auto_says_why_a_kernel_with_sinks_was_passed_over(
    monkeypatch: pytest.MonkeyPatch, device: Callable[[int, int], None]
) -> None:
    install_all(monkeypatch)
    device(9, 0)
    full, windows, _ = choose_backends("auto", softmax_type=LEARNABLE)
    assert full.reason == preference(Call.FULL, (9, 0)).reason
    assert windows.reason.startswith("no fa3 with a softmax sink: it has none, and its passes")
    assert windows.reason.endswith(preference(Call.WINDOWS, (9, 0)).reason)


@pytest.mark.parametrize(
    ("name", "capability", "asked", "reason"),
    [
        ("fa3", (9, 0), {}, "differ from build to build"),
        ("fa4", (12, 0), {}, "none on compute capability 12"),
        ("fa4", (10, 0), {"heads": choose.Heads(256, 256)}, "heads of 256 channels on Blackwell"),
        ("fa4", (11, 0), {"heads": choose.Heads(256, 256)}, "heads of 256 channels on Blackwell"),
        ("te", (8, 0), {}, "packed calls from compute capability 9.0 on"),
        ("te", (9, 0), {"heads": choose.Heads(72, 72)}, "needs cuDNN 9.18.0 or later"),
        ("te", (9, 0), {"heads": choose.Heads(160, 136)}, "none for heads of 160 and 136 chan"),
        ("te", (10, 0), {"heads": choose.Heads(192, 192)}, "none for heads of 192 and 192 chan"),
    ],
)
def test_what_has_no_sink_is_refused_naming_what_has(
    monkeypatch: pytest.MonkeyPatch,
    device: Callable[[int, int], None],
    name: str,
    capability: tuple[int, int],
    asked: dict[str, Any],
    reason: str,
) -> None:
    install_all(monkeypatch)
    if "cuDNN" in reason:
        monkeypatch.setattr(choose, "_te", lambda: TransformerEngine((2, 20), (9, 17, 5)))
    device(*capability)
    with pytest.raises(ValueError, match=rf"={name} cannot be used here: {name} with a") as raised:
        choose_backends(name, softmax_type=LEARNABLE, **asked)
    assert reason in str(raised.value)
    can = str(raised.value).partition("These can: ")[2].partition(";")[0].split(", ")
    assert {"flash", "varlen", "sdpa"} <= {*can} and name not in can and "fa3" not in can


def test_a_learnable_sink_in_packed_calls_of_transformer_engine(
    monkeypatch: pytest.MonkeyPatch, device: Callable[[int, int], None]
) -> None:
    """NVIDIA/TransformerEngine#3249: a wrong gradient before cuDNN 9.26, but for a few sizes."""
    install_all(monkeypatch)
    for size, kind, cudnn, fits in (
        (96, LEARNABLE, (9, 25, 0), False),
        (96, LEARNABLE, (9, 26, 0), True),
        (96, OFF_BY_ONE, (9, 25, 0), True),
        (64, LEARNABLE, (9, 18, 0), True),
        (128, LEARNABLE, (9, 18, 0), True),
        (128, OFF_BY_ONE, (9, 17, 9), False),
    ):
        monkeypatch.setattr(choose, "_te", lambda cudnn=cudnn: TransformerEngine((2, 20), cudnn))
        device(9, 0)
        why = choose.unfit(
            "te",
            Call.PACKED,
            deterministic=False,
            heads=choose.Heads(size, size),
            softmax_type=kind,
        )
        assert (why is None) == fits, (size, kind, cudnn)


@pytest.mark.parametrize(
    ("capability", "heads", "has"),
    [
        ((8, 0), (192, 128), False),
        ((9, 0), (192, 128), True),
        ((9, 0), (192, 64), True),  # one of them below 128
        ((9, 0), (160, 136), False),
        ((9, 0), (256, 256), True),
        ((9, 0), (264, 264), False),
        ((9, 0), (100, 100), False),  # no multiple of 8
        ((10, 0), (192, 128), True),
        ((10, 0), (256, 256), False),
    ],
)
def test_heads_for_which_cudnn_has_a_sink(
    capability: tuple[int, int], heads: tuple[int, int], has: bool
) -> None:
    """By its own tables, in the first release of Transformer Engine that takes packed calls."""
    te = TransformerEngine((2, 12), (9, 26, 0))
    calls = (Call.WINDOWS, Call.PACKED) if capability >= (9, 0) else (Call.WINDOWS,)
    for call in calls:
        why = why_no_sink("te", call, capability, te, softmax_type=LEARNABLE, heads=heads)
        assert (why is None) == has, call


def test_a_sink_reaches_every_kernel_of_a_layer() -> None:
    """One for each kind of call, and behind what pads values for multi-latent attention."""
    full, windows, packed = (BACKENDS["sdpa"](SCALE) for _ in range(3))
    layer = choose.BackendOfCalls(
        SCALE, full=full, windows=choose.WidenedValues(windows, 16), packed=packed
    )
    layer.use_sink(lambda: torch.tensor([1.0, 2.0]))
    for backend in (full, windows, packed):
        found = backend.sink_of(4)
        assert found is not None and found.tolist() == [1.0, 2.0, 1.0, 2.0]


def test_packed_sinks_need_a_recent_transformer_engine(
    monkeypatch: pytest.MonkeyPatch, device: Callable[[int, int], None]
) -> None:
    """2.8 to 2.11 have sinks, and refuse them in packed calls whatever cuDNN there is."""
    install_all(monkeypatch)
    monkeypatch.setattr(choose, "_te", lambda: TransformerEngine((2, 11, 0), (9, 26, 0)))
    device(9, 0)
    assert choose.unfit("te", Call.WINDOWS, deterministic=False, softmax_type=LEARNABLE) is None
    why = choose.unfit("te", Call.PACKED, deterministic=False, softmax_type=LEARNABLE)
    assert why is not None and "Transformer Engine 2.12 or later" in why


def test_deterministic_sinks(
    monkeypatch: pytest.MonkeyPatch, device: Callable[[int, int], None]
) -> None:
    install_all(monkeypatch)
    device(9, 0)
    asked = {"softmax_type": LEARNABLE, "deterministic": True}
    assert names(**asked) == names("te", **asked) == ("fa4", "fa4", "fa4")
    assert "cuDNN has no deterministic one" in choose_backends("auto", **asked)[0].reason


def test_releases_without_sinks_are_passed_over(
    monkeypatch: pytest.MonkeyPatch, device: Callable[[int, int], None]
) -> None:
    """FlashAttention 4 took a sink before it gave its gradient; flash-attn 2 spelled windows
    otherwise before 2.7, torch chose between cuDNN and FlashAttention before 2.15."""
    from torch.nn.attention import varlen

    def of_an_old_release(window_size: Any) -> None:
        raise NotImplementedError

    install_all(monkeypatch)
    device(9, 0)
    old = types.SimpleNamespace(_flash_attn_bwd=of_an_old_release)
    monkeypatch.setattr(sys.modules["flash_attn.cute"], "interface", old)
    assert names(softmax_type=LEARNABLE)[1:] == ("flash", "flash")
    old = types.SimpleNamespace(_flash_attn_varlen_forward=of_an_old_release)
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_interface", old)
    device(9, 0)
    assert names(softmax_type=LEARNABLE)[1:] == ("varlen", "varlen")
    monkeypatch.setattr(varlen, "_varlen_attn_backward", of_an_old_release)
    device(9, 0)
    assert names(softmax_type=LEARNABLE) == ("te", "te", "te")
    reason = choose_backends("auto", softmax_type=LEARNABLE)[1].reason
    for missing in ("learnable_sink", "window_size_left", "backend"):
        assert missing in reason
    assert names()[1] == "fa3"  # without sinks the old releases will do


# --- what the libraries are called with ---------------------------------------------------------


def config(**changes: Any) -> types.SimpleNamespace:
    values = {
        "params_dtype": torch.bfloat16,
        "deterministic_mode": False,
        "kv_channels": 128,
        **changes,
    }
    return types.SimpleNamespace(**values)


def build(name: str, **changes: Any) -> torch.nn.Module:  # type: ignore[name-defined]
    return make_backend(name, config=config(**changes), scale=SCALE, layer_number=2)


def segments(offsets: list[int], window: int | None) -> Segments:
    array = np.array(offsets, np.int32)
    return Segments(array, array, window, None, CPU)


@pytest.mark.parametrize("name", ["flash", "varlen", "fa3", "fa4"])
def test_more_segments_than_flash_attention_2_takes(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """65,536 windows of 2 tokens are one too many, those of 3 fit; the others have no such end."""
    install_all(monkeypatch)
    backend = build(name)
    monkeypatch.setattr(backend, "attend", lambda q, *_, **__: (q, None) if name == "fa4" else q)
    q = torch.zeros(131_072, 1, 8)
    grid = grid_segments(Rows(131_072, 1, 2, False, CPU))
    assert isinstance(grid, Segments)
    of_documents = Segments(grid.cu_seqlens_q, grid.cu_seqlens_k, None, None, CPU)
    if name in ("fa3", "fa4"):
        assert backend(q, q, q, grid).shape == q.shape
        return
    with pytest.raises(UsageError, match=r"windows of 2 tokens leave 65536 .* windows of 3 tokens"):
        backend(q, q, q, grid)
    with pytest.raises(UsageError, match=r"windows and documents leave 65536 segments in the 1310"):
        backend(q, q, q, of_documents)
    fits = Segments(grid.cu_seqlens_q[:-1], grid.cu_seqlens_k[:-1], None, None, CPU)
    assert backend(q[:-2], q[:-2], q[:-2], fits).shape == (131_070, 1, 8)


FLASH = {"flash": "flash_attn", "fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_is_called_with(
    monkeypatch: pytest.MonkeyPatch, name: str, window: int | None, deterministic: bool
) -> None:
    """A window of 100 visible tokens is (99, 0); no window is -1, and None to FlashAttention 4."""
    calls: list[dict[str, Any]] = []

    def record(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        softmax_scale: float,
        causal: bool,
        window_size: Any,
        deterministic: bool,
    ) -> Any:
        calls.append(dict(locals()))
        return (q, None) if name == "fa4" else q

    install(monkeypatch, FLASH[name], record)
    backend = build(name, deterministic_mode=deterministic)
    q = torch.zeros(300, 4, 8)
    out = backend(q, q, q, segments([0, 130, 300], window))
    (call,) = calls
    assert out is q
    assert call["cu_seqlens_q"].tolist() == [0, 130, 300]  # never padded
    assert call["cu_seqlens_k"] is call["cu_seqlens_q"]
    assert (call["max_seqlen_q"], call["max_seqlen_k"]) == (256, 256)
    assert call["causal"] and call["softmax_scale"] == SCALE
    assert call["deterministic"] is deterministic
    unbounded = (None, None) if name == "fa4" else (-1, 0)
    assert call["window_size"] == (unbounded if window is None else (99, 0))


@pytest.mark.parametrize("num_sequences", [1, 3])
def test_flash_attention_4_is_given_the_sink(
    monkeypatch: pytest.MonkeyPatch, num_sequences: int
) -> None:
    """In float32, for each head of each sequence, with what else it is called with; or not at all:
    releases before it have no such argument."""
    given: list[Any] = []

    def record(q: Any, k: Any, v: Any, *, learnable_sink: Any = "none", **_: Any) -> Any:
        given.append(learnable_sink)
        return q, None

    install(monkeypatch, "flash_attn.cute", lambda cu_seqlens_q, window_size, deterministic: None)
    backend = build("fa4")
    backend.attend = record
    q = torch.zeros(64, num_sequences, 4, 8)
    grid = grid_segments(Rows(64, num_sequences, 16, False, CPU))
    backend.attend_windows(q, q, q, grid)
    sink = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.bfloat16).requires_grad_()
    backend.use_sink(lambda: sink)
    backend.attend_windows(q, q, q, grid)
    assert given[0] == "none"
    assert given[1].dtype == torch.float32
    assert given[1].tolist() == [-1.0, 0.0, 1.0, 2.0] * num_sequences
    given[1].sum().backward()
    assert sink.grad is not None and sink.grad.tolist() == [num_sequences] * 4


@pytest.mark.parametrize("window", [None, 100])
def test_varlen_is_called_with(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    import torch.nn.attention.varlen

    calls: list[dict[str, Any]] = []

    def record(
        q: Any,
        k: Any,
        v: Any,
        cu_q: Any,
        cu_k: Any,
        max_q: int,
        max_k: int,
        *,
        scale: float,
        window_size: Any,
        enable_gqa: bool,
    ) -> Any:
        cudnn = torch._C._get_cudnn_sdp_enabled()
        calls.append({"cudnn": cudnn, **locals()})
        return q

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", record)
    backend = build("varlen")
    q, k = torch.zeros(300, 4, 8), torch.zeros(300, 2, 8)
    backend(q, k, k, segments([0, 130, 300], window))
    (call,) = calls
    assert not call["cudnn"]  # it would plan a graph for every window
    assert (call["max_q"], call["scale"], call["enable_gqa"]) == (256, SCALE, True)
    assert call["window_size"] == ((-1, 0) if window is None else (99, 0))


@pytest.mark.parametrize("num_sequences", [1, 3])
@pytest.mark.parametrize("window", [16, 20, 64])
def test_windows_join_sequences_to_heads(
    monkeypatch: pytest.MonkeyPatch, window: int, num_sequences: int
) -> None:
    """One sequence's offsets for all of them, no copy of contiguous tensors, the same numbers."""
    pointers = []

    def exact(q: Any, k: Any, v: Any, cu_q: Any, *_: Any, window_size: Any, **__: Any) -> Any:
        pointers.append(q.data_ptr())
        return sdpa.attend_segments(q, k, v, segments(cu_q.tolist(), None), SCALE)

    def function(*args: Any, window_size: Any, deterministic: bool, **kwargs: Any) -> Any:
        return exact(*args, window_size=window_size)

    install(monkeypatch, "flash_attn", function)
    query = torch.randn(64, num_sequences, 4, 8)
    key, value = (torch.randn(64, num_sequences, 2, 8) for _ in range(2))
    grid = grid_segments(Rows(64, num_sequences, window, False, CPU))
    out = build("flash").attend_windows(query, key, value, grid)
    assert pointers == [query.data_ptr()]
    packed = sdpa.attend_segments(*(to_thd(x) for x in (query, key, value)), grid, SCALE)  # type: ignore[call-arg]
    torch.testing.assert_close(out, from_thd(packed, num_sequences))


# --- Transformer Engine: what is built, and which of its modules gets which call ------------------


class Recorder(torch.nn.Module):  # type: ignore[name-defined]
    """In the place of TEDotProductAttention: notes how it was built and called."""

    def __init__(self, **built: Any) -> None:
        super().__init__()
        self.built = built
        self.calls: list[dict[str, Any]] = []

    def forward(self, query: Any, key: Any, value: Any, mask: Any, **arguments: Any) -> Any:
        shapes = [tuple(x.shape) for x in (query, key, value)]
        window = getattr(self, "window_size", None)
        self.calls.append({"shapes": shapes, "mask": mask, "window": window, **arguments})
        return query.flatten(-2)


@pytest.fixture
def te() -> tuple[torch.nn.Module, list[Recorder]]:  # type: ignore[name-defined]
    from megatron_skyladder.attention.backends.te import TransformerEngineBackend

    modules: list[Recorder] = []

    def stock(**changes: Any) -> Recorder:
        modules.append(Recorder(**changes))
        return modules[-1]

    return TransformerEngineBackend(stock, SCALE), modules


def test_the_full_window_is_stocks_call(te: Any) -> None:
    """Argument for argument, on a module built with nothing changed; see tests/te too."""
    from megatron.core.transformer.enums import AttnMaskType

    backend, modules = te
    q, kv = torch.zeros(64, 2, 4, 8), torch.zeros(64, 2, 2, 8)
    out = backend.attend_full(q, kv, kv, grid_segments(Rows(64, 2, 64, False, CPU)))
    assert out.shape == (64, 2, 32)
    assert modules[0].built == {}
    assert modules[0].calls == [
        {
            "shapes": [(64, 2, 4, 8), (64, 2, 2, 8), (64, 2, 2, 8)],
            "mask": None,
            "window": None,
            "attn_mask_type": AttnMaskType.causal,
        }
    ]


@pytest.mark.parametrize("num_sequences", [1, 2])
def test_windows_are_the_batch(te: Any, num_sequences: int) -> None:
    backend, modules = te
    q, kv = torch.zeros(64, num_sequences, 4, 8), torch.zeros(64, num_sequences, 2, 8)
    out = backend.attend_windows(q, kv, kv, grid_segments(Rows(64, num_sequences, 24, False, CPU)))
    assert out.shape == (64, num_sequences, 32)
    called = [module for module in modules if module.calls]
    (module,) = called
    assert module.built == ({} if num_sequences == 1 else {"num_sequences": 2})
    shapes = [call["shapes"][0] for call in module.calls]
    heads = 4 * num_sequences
    assert shapes == [(2, 24, heads, 8), (1, 16, heads, 8)]  # two windows, and a shorter last one
    for call in module.calls:
        assert call["attn_mask_type"].name == "causal"
        assert call["packed_seq_params"].qkv_format == "bshd"
        assert call["packed_seq_params"].cu_seqlens_q is None


@pytest.mark.parametrize(("own_window", "expected"), [(9, (8, 0)), (None, (-1, 0)), (5, (4, 0))])
def test_windows_of_a_local_layer_slide_within(
    te: Any, own_window: int | None, expected: tuple[int, int]
) -> None:
    """Its full window is stock's own module, which nothing else may call and change.

    And which has all of its own window: one that still grows is not stock's call.
    """
    from megatron_skyladder.attention.backends.te import TransformerEngineBackend

    _, modules = te
    modules.clear()
    backend = TransformerEngineBackend(
        lambda **kw: modules.append(Recorder(**kw)) or modules[-1], SCALE, own_window=9
    )
    q, kv = torch.zeros(64, 1, 4, 8), torch.zeros(64, 1, 2, 8)
    for window in (16, 64):
        rows = grid_segments(Rows(64, 1, window, False, CPU, own_window=own_window))
        (backend.attend_full if window == 64 else backend.attend_windows)(q, kv, kv, rows)
    full, _, windows = modules
    grows = own_window == 5
    assert [call["window"] for call in windows.calls] == [expected] * (2 if grows else 1)
    assert [call["window"] for call in full.calls] == [None] * (0 if grows else 1)  # as built


@pytest.mark.parametrize("window", [None, 24])
def test_packed_calls_have_padded_counts_and_the_window(te: Any, window: int | None) -> None:
    backend, modules = te
    tokens = torch.zeros(64, 4, 8)
    same = segments([0, 10, 64], window)
    backend(tokens, tokens, tokens, same)
    offsets = np.array([0, 5, 64], np.int32), np.array([0, 7, 80], np.int32)
    backend(tokens, tokens.new_zeros(80, 4, 8), tokens.new_zeros(80, 4, 8),
            Segments(*offsets, window, None, CPU))  # fmt: skip
    module = modules[1]
    assert module.built == {"mask": "padding_causal", "attention_type": "cross"}
    first, second = module.calls
    for call in (first, second):
        assert call["window"] == ((-1, 0) if window is None else (23, 0))
        assert len(call["packed_seq_params"].cu_seqlens_q) == 17  # 16 segments, most of them empty
        assert call["packed_seq_params"].max_seqlen_q == 128
    assert first["attn_mask_type"].name == "padding_causal"
    packed = first["packed_seq_params"]
    assert packed.cu_seqlens_kv is packed.cu_seqlens_q
    assert second["attn_mask_type"].name == "padding_causal_bottom_right"
