"""Megatron without a GPU: ``SKYLADDER_DEVICE=cpu`` makes ``torch.cuda`` land on the CPU.

Megatron's trainer, optimizer, checkpoints, pipeline schedules and datasets run unmodified, over
gloo. ``install()`` has to run before Megatron is imported; it works in three places:

* tensors: a torch function mode turns CUDA devices in calls into the CPU (``device="cuda"``,
  ``.cuda()``, ``.to("cuda")``, ``pin_memory``);
* ``torch.cuda``: streams, events, RNG state, memory statistics and device queries get CPU answers;
* Megatron: defaults of flags that need a GPU, and what it refuses or gets wrong on a CPU for no
  reason that holds there (see `cpu.megatron`).

``python -m megatron_skyladder.cpu pretrain_gpt.py ...`` does the same in front of a script,
such as a checkout's own, under torchrun as well.

It is for development, tests and small runs. It refuses to load where a CUDA device is visible, so
it cannot slow down a real run by accident. What it cannot show: kernels, streams, NCCL, memory, or
a tensor that was left on the host by mistake.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import sys
import time
import types
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_skyladder.errors import UsageError

DEVICE_VARIABLE = "SKYLADDER_DEVICE"
_CPU = torch.device("cpu")
_MEMORY_BYTES = 24 << 30  # what device properties claim

_installed = False


def is_requested() -> bool:
    """Return whether ``SKYLADDER_DEVICE=cpu`` is set.

    Raises:
        UsageError: the variable has another value than ``cpu``, ``cuda`` or none.
    """
    value = os.environ.get(DEVICE_VARIABLE, "")
    if value not in ("", "cpu", "cuda"):
        raise UsageError(f"{DEVICE_VARIABLE}={value} is unknown. Set it to cpu or cuda.")
    return value == "cpu"


def is_installed() -> bool:
    """Return whether ``install()`` has run in this process."""
    return _installed


def install_or_check_device() -> None:
    """Install the engine where it is asked for; elsewhere make sure that there is a GPU.

    Raises:
        UsageError: there is no GPU and the CPU engine was not asked for, or the reverse.
    """
    if is_requested():
        install()
    elif not torch.cuda.is_available():
        raise UsageError(
            "no CUDA device is visible to torch. Run where there is one, or set "
            f"{DEVICE_VARIABLE}=cpu to train on the CPU (gloo; for small models and tests)."
        )


def install_where_no_gpu() -> None:
    """Install the engine where torch sees no CUDA device, asked for or not."""
    if not torch.cuda.is_available():
        install()


def install() -> None:
    """Make ``torch.cuda`` land on the CPU in this process. A second call does nothing.

    Raises:
        UsageError: a CUDA device is visible.
        ValueError: Megatron has been imported already.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise UsageError(
            f"{DEVICE_VARIABLE}=cpu, but torch sees {torch.cuda.device_count()} CUDA device(s). "
            f"Unset {DEVICE_VARIABLE} to train on them, or hide them with CUDA_VISIBLE_DEVICES= "
            "if you really mean the CPU."
        )
    if "megatron.core" in sys.modules:
        raise ValueError("the CPU engine has to be installed before megatron is imported.")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # asserted for TP > 1 and CP > 1
    # Its table of torch functions wants each name to be a function of its own; torch.optim loads it
    # in any case, so let it read the originals.
    importlib.import_module("torch._dynamo")
    _replace_torch_cuda()
    torch.compile = _compile_nothing
    _Remap().__enter__()
    _remap_in_backward()
    _installed = True
    from megatron_skyladder.cpu import bfloat16, gloo
    from megatron_skyladder.cpu import megatron as cpu_megatron

    bfloat16.install()
    gloo.install()
    cpu_megatron.prepare()


def run_script(arguments: list[str]) -> None:
    """Install the engine, then run a script as Python would.

    Args:
        arguments: the script and what comes after it on the command line.

    Raises:
        UsageError: there is no such script, or the engine cannot be installed.
    """
    if not arguments or not os.path.isfile(arguments[0]):
        raise UsageError(
            "give the script to run on the CPU, such as python -m megatron_skyladder.cpu "
            f"pretrain_gpt.py --num-layers 2 ...; given: {' '.join(arguments[:1]) or 'nothing'}."
        )
    script = arguments[0]
    os.environ[DEVICE_VARIABLE] = "cpu"  # for the processes it starts
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # a checkout finds its own megatron
    sys.argv = arguments
    install()
    runpy.run_path(script, run_name="__main__")


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


class _Remap(TorchFunctionMode):
    """Turn CUDA devices in the arguments of torch functions into the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's DDP asserts on the names of CUDA tensor types
            return func(args[0]).replace("torch.", "torch.cuda.", 1)
        return func(*args, **(kwargs or {}))


def _remap_in_backward() -> None:
    """Remap in the backward passes that ``torch.autograd.backward`` runs, too.

    torch takes a function mode away while that mode handles a function, and this one runs Python:
    recomputed forwards, and collectives that allocate where Megatron says.
    """
    autograd: Any = torch.autograd
    original = autograd._engine_run_backward

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with _Remap():
            return original(*args, **kwargs)

    autograd._engine_run_backward = run_backward


class _Stream:
    """A stream where everything has already happened."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


class _Event:
    """An event that notes the host's clock."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter()

    def record(self, *_: Any) -> None:
        self.seconds = time.perf_counter()

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        """Return milliseconds, as CUDA events do."""
        return (end.seconds - self.seconds) * 1e3


def _compile_nothing(model: Any = None, **_: Any) -> Any:
    """Stand in for ``torch.compile``, as a call and as a decorator with options."""
    return model if model is not None else (lambda function: function)


def _nothing(*_: Any, **__: Any) -> None: ...


def _replace_torch_cuda() -> None:
    cuda: Any = torch.cuda
    stream = _Stream()
    properties = types.SimpleNamespace(
        name="cpu", major=8, minor=0, total_memory=_MEMORY_BYTES, multi_processor_count=1
    )

    def zero(*_: Any, **__: Any) -> int:
        return 0

    replacements = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": lambda: 0,
        "default_generators": (torch.default_generator,),
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "stream": lambda _: contextlib.nullcontext(),
        "get_device_capability": lambda *_: (8, 0),
        "get_device_properties": lambda *_: properties,
        "get_device_name": lambda *_: "cpu",
        "memory_stats": lambda *_: {},
        "mem_get_info": lambda *_: (_MEMORY_BYTES, _MEMORY_BYTES),
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "is_current_stream_capturing": lambda: False,
        "_lazy_call": lambda function, **_: function(),
        **dict.fromkeys(
            ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"),
            zero,
        ),
        **dict.fromkeys(
            (
                "_lazy_init",
                "set_device",
                "set_stream",
                "synchronize",
                "empty_cache",
                "manual_seed_all",
                "reset_peak_memory_stats",
            ),
            _nothing,
        ),
    }
    for name, value in replacements.items():
        setattr(cuda, name, value)
    cuda.random.get_rng_state = cuda.get_rng_state
    cuda.random.set_rng_state = cuda.set_rng_state
    cuda.nvtx.range_push = cuda.nvtx.range_pop = _nothing
    accelerator: Any = torch.accelerator
    accelerator.is_available = lambda: False  # or data loaders start a thread that pins memory
    accelerator.current_stream = lambda *_: stream
    accelerator.current_device_index = lambda: 0
    tensor: Any = torch.Tensor
    tensor.record_stream = _nothing  # the function mode never gets to see it
    module: Any = torch.nn.Module
    module.cuda = lambda self, *_, **__: self
    optimizer: Any = torch.optim.Optimizer
    optimizer._accelerator_graph_capture_health_check = _nothing
