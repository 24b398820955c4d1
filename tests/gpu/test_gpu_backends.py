"""Each installed backend on a real GPU: numerics in bf16, and nothing waits for the device.

    pytest -m gpu tests/gpu

One GPU will do, a few minutes at most. What is not installed is skipped.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from cases import CASES, Case  # noqa: E402
from checks import (  # noqa: E402
    HEAD_DIM,
    PARTS,
    call_attention,
    check_bf16,
    check_sink_bf16,
    document_mask,
    make_attention,
)

from megatron_skyladder.attention.backends import BACKENDS, choose_backends  # noqa: E402
from megatron_skyladder.attention.backends.choose import Heads  # noqa: E402
from megatron_skyladder.cpu import engine as cpu_engine  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or cpu_engine.is_installed(), reason="needs a CUDA device"
    ),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that is installed."""
    try:
        choose_backends(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    return request.param


@pytest.mark.parametrize("factor", [1, 8], ids=["short", "long"])  # within a kernel's tile, or not
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bf16_is_as_exact_as_plain_attention(
    backend: str, case: Case, part: tuple[int, int], factor: int
) -> None:
    start, stop = part
    check_bf16(backend, case.stretched(factor), (factor * start, factor * stop), "cuda")


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sinks_in_bf16(backend: str, case: Case, part: tuple[int, int]) -> None:
    """With the gradient of the sinks, where the backend takes them here."""
    try:
        choose_backends(backend, heads=Heads(HEAD_DIM, HEAD_DIM), softmax_type="learnable")
    except ValueError as error:
        pytest.skip(str(error))
    start, stop = part
    check_sink_bf16(backend, case.stretched(8), (8 * start, 8 * stop), "cuda")


@pytest.mark.parametrize("mask", ["local", "sliding"])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_nothing_waits_for_the_device(backend: str, num_rows: int, mask: str) -> None:
    """With documents that are new to it; what is set up once per process was set up before."""
    attention = make_attention(backend, mask)
    for ends, mode in (((5, 40), "default"), ((9, 30), "error")):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out = call_attention(
                attention, num_rows, document_mask(num_rows, ends), requires_grad=True
            )
            out.backward(torch.ones_like(out))
        finally:
            torch.cuda.set_sync_debug_mode("default")
