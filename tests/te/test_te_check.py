"""skyladder check-gpu at toy size through TE, flash-attn and varlen on the stubs.

The same phases as in tests/unit/test_check_gpu.py, by the code that calls the libraries on a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from checks import no_look_at_the_device

from megatron_skyladder.gpu_check import bench as benches
from megatron_skyladder.gpu_check import costs, kernels
from megatron_skyladder.gpu_check.bench import Bench, Heads, Mask, attend

pytestmark = pytest.mark.te
BACKENDS = ["te", "varlen", "flash"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """One shape of heads: the stubs go segment by segment."""
    sizes = replace(benches.TOY, heads=(Heads(4, 2, 16),), windows=(8, 20), repeats=1)
    monkeypatch.setattr(benches, "TOY", sizes)
    return Bench(toy=True, backends=BACKENDS)


def test_numerics(bench: Bench) -> None:
    found = kernels.numerics(bench)
    assert found.failures == []
    assert set(found.figures) == set(BACKENDS)


def test_exchange(bench: Bench) -> None:
    assert kernels.exchange(bench).failures == []


def test_determinism(bench: Bench) -> None:
    found = kernels.determinism(bench)
    assert found.failures == [] and set(found.figures) == set(BACKENDS)


def test_costs(bench: Bench) -> None:
    rows = costs.timings(bench).figures["rows"]
    assert {row["backend"] for row in rows} == set(BACKENDS)
    assert bench.stock == "te"
    assert costs.churn(bench).failures == []
    assert set(costs.memory(bench).figures) == set(BACKENDS)


def test_facts_name_what_te_takes(bench: Bench) -> None:
    assert "te sub-backends" in kernels.facts(bench).figures
    assert kernels.no_sync(bench).failures == []


def test_nothing_is_looked_at(bench: Bench) -> None:
    """What --phase no-sync watches on a GPU, watched here by the methods that would wait."""
    for name in BACKENDS:
        backend = bench.build(name, bench.sizes.timed_heads)
        qkv = bench.tensors(64, 2, bench.sizes.timed_heads, benches.torch.bfloat16)
        mask = Mask("", 20, documents=True)
        offsets = bench.segments(mask, 64, 2)
        with no_look_at_the_device():
            attend(backend, qkv, offsets).sum().backward()
