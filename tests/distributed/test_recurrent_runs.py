"""Mamba and gated delta net layers: Megatron's real mixers, on reference kernels in plain torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from recurrent_bodies import SIZES
from runs import Run, Trainer

from megatron_skyladder.testing import ProcessPool, requires_megatron

pytest.importorskip("einops", reason="Megatron's Mamba mixer needs it")
pytestmark = requires_megatron

KERNELS = Path(__file__).parents[1] / "recurrent_kernels"
PATTERNS = {"mamba": "M-*-M-*-", "gated-delta-net": "G-*-G-*-"}
FLAGS = " ".join(f"--{name.replace('_', '-')} {size}" for name, size in SIZES.items())
LADDER = "--skyladder-start-window 8 --skyladder-alpha 11 --skyladder-allow-unfinished"
DOCUMENTS = "--skyladder-intra-document"
FRAGMENTS = "--skyladder-recurrent-state fragments"
LAYOUTS = {
    "tp2-sp": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pp2": "--pipeline-model-parallel-size 2 --recompute-granularity full "
    "--recompute-method uniform --recompute-num-layers 1",
    "cp2": "--context-parallel-size 2",
}


@pytest.fixture(scope="module")
def recurrent(trainer: Trainer) -> Iterator[Trainer]:
    """Starts runs whose processes find the reference kernels."""
    with ProcessPool(python_path=[KERNELS]) as pool:
        yield trainer.on(pool)


@pytest.fixture(scope="module")
def train(recurrent: Trainer) -> Callable[..., Run]:
    """Starts runs of a pattern from the same weights."""

    @cache
    def weights(pattern: str) -> Path:
        folder = recurrent.new_folder("weights")
        flags = f"--train-samples 8 --micro-batch-size 8 --save {folder} --save-interval 1"
        recurrent.train(f"{flags} --hybrid-layer-pattern {pattern} {FLAGS}", load=False)
        return folder

    @cache
    def run(kind: str, more: str, num_processes: int = 1, **options: object) -> Run:
        pattern = PATTERNS[kind]
        return recurrent.train(
            f"--load {weights(pattern)} --finetune --no-load-optim --train-samples 24 "
            f"--micro-batch-size 2 --hybrid-layer-pattern {pattern} {FLAGS} {LADDER} {more}",
            load=False,
            num_processes=num_processes,
            **options,
        )

    return run


@pytest.mark.parametrize("pattern", ["M-*-M-*-", "G-*-G-*-", "*-*-"])
def test_each_fragment_is_a_sequence_of_its_own(
    recurrent: Trainer, tmp_path: Path, pattern: str
) -> None:
    results = tmp_path / "found.json"
    arguments = {"pattern": pattern, "results": str(results)}
    recurrent.pool.run(
        "recurrent_bodies:compare", num_processes=1, folder=tmp_path, arguments=arguments
    )
    found = json.loads(results.read_text())
    assert found["difference"] < 1e-5 and found["effect"] > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", PATTERNS)
def test_layouts_are_one_process(train: Callable[..., Run], kind: str, layout: str) -> None:
    flags = f"{FRAGMENTS} {DOCUMENTS}"
    one, run = train(kind, flags), train(kind, f"{flags} {LAYOUTS[layout]}", num_processes=2)
    assert run.tokens == one.tokens and tuple(one.windows.values()) == (8, 19, 30)
    assert run.losses == pytest.approx(one.losses, rel=1e-6)
    assert "and 2 recurrent ones on this rank" in one.log()


@pytest.mark.parametrize("kind", PATTERNS)
def test_the_ways_to_cut_a_state_differ(train: Callable[..., Run], kind: str) -> None:
    states = {
        state: train(kind, f"--skyladder-recurrent-state {state} {DOCUMENTS}")
        for state in ("fragments", "documents", "free")
    }
    losses = [list(run.losses.values()) for run in states.values()]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        errors = (abs(a - b) / b for a, b in zip(losses[one], losses[other], strict=True))
        assert max(errors) > 1e-3
    other = train(
        kind,
        f"--skyladder-recurrent-state documents {DOCUMENTS} {LAYOUTS['tp2-sp']}",
        num_processes=2,
    )
    assert other.losses == pytest.approx(states["documents"].losses, rel=1e-6)
    fingerprint = "documents masked; recurrent state: documents"
    assert fingerprint in states["documents"].log()


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("state_starts_late", "inputs that must not be seen moved an output"),
        ("state_starts_early", "inputs that must not be seen moved an output"),
        ("state_runs_on", "inputs that must not be seen moved an output"),
        ("state_starts_everywhere", "is not seen by the next"),
    ],
)
def test_the_probe_sees_a_wrong_cut(
    train: Callable[..., Run], kind: str, broken: str, says: str
) -> None:
    run = train(kind, FRAGMENTS, broken=broken, exit_codes=(1,))
    assert "the state of layer 1: " in run.log() and says in run.log()
    assert not run.of("step")


@pytest.mark.parametrize("layout", ["tp2-sp", "cp2"])
def test_the_probe_sees_it_in_every_layout(train: Callable[..., Run], layout: str) -> None:
    flags = f"{FRAGMENTS} {LAYOUTS[layout]}"
    run = train("mamba", flags, num_processes=2, broken="state_starts_late", exit_codes=(1, -9))
    assert any("moved an output" in run.log(rank) for rank in (0, 1))


@pytest.mark.parametrize(
    ("kind", "flags", "says"),
    [
        ("mamba", "", "M is a Mamba layer: its state carries"),
        ("gated-delta-net", "", "G is a gated delta net layer"),
        ("mamba", f"{FRAGMENTS} --skyladder-mask sliding", "have no beginnings"),
        ("mamba", "--skyladder-recurrent-state documents", "needs to know the documents"),
        ("mamba", f"{FRAGMENTS} --disable-mamba-mem-eff-path", "cannot start their state anew"),
    ],
)
def test_what_is_refused(train: Callable[..., Run], kind: str, flags: str, says: str) -> None:
    run = train(kind, flags, exit_codes=(1,))
    assert says in run.log() and not run.of("step")


def test_a_kernel_that_is_not_known_is_an_error(train: Callable[..., Run]) -> None:
    run = train("gated-delta-net", FRAGMENTS, broken="other_kernel", exit_codes=(1,))
    assert "ran without the kernel that starts its state anew (rule)" in run.log()


def test_a_state_that_is_not_there(trainer: Trainer) -> None:
    run = trainer.train(
        f"--train-samples 8 --micro-batch-size 2 {LADDER} {FRAGMENTS}", exit_codes=(1,)
    )
    assert "and there are none. Leave it out" in run.log()
