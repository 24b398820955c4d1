"""A patched Megatron trains and logs as our entry point does: every figure, not only the losses.

The Megatron is the installed wheel with a patched copy of the files that a patch touches, and
`plain_script.py` for the ``pretrain_gpt.py`` that wheels lack; tests/releases does the same with
checkouts. Time stands still, so that rates can be compared as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from runs import Run, Trainer

from megatron_skyladder.cli import main as skyladder
from megatron_skyladder.megatron_lm import releases
from megatron_skyladder.report.runlog import parse
from megatron_skyladder.testing import ProcessPool, requires_megatron

pytestmark = requires_megatron

PATCHED_FILES = ("megatron/training/arguments.py", "megatron/training/training.py")
LAYOUT = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --micro-batch-size 2"
RUN = (
    "--train-samples 32 --split 80,20,0 --eval-iters 2 --eval-interval 3 --log-throughput "
    "--skyladder-start-window 8 --skyladder-alpha 14 --skyladder-eval-lengths 16 "
    "--skyladder-attention-stats-interval 2 --skyladder-allow-unfinished"
)
DRAWN = "--skyladder-init reference --init-method-std 0.02"
MASKS = {
    "window": "",
    "documents": f"--skyladder-intra-document {DRAWN}",
    "sliding+documents": "--skyladder-intra-document --skyladder-mask sliding --log-interval 2",
}


def link_megatron(folder: Path) -> None:
    """Make a folder with the installed Megatron: copies of what is patched, links to the rest."""
    source = releases.installed().folder
    links = [source / "megatron" / "core", *(source / "megatron" / "training").iterdir()]
    (folder / "megatron" / "training").mkdir(parents=True)
    for path in links:
        name = str(path.relative_to(source))
        if name in PATCHED_FILES:
            (folder / name).write_bytes(path.read_bytes())
        else:
            (folder / name).symlink_to(path)
    script = Path(__file__).with_name("plain_script.py")
    (folder / "pretrain_gpt.py").write_bytes(script.read_bytes())


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ProcessPool, Path]]:
    """Processes that have imported the patched Megatron, and its folder."""
    folder = tmp_path_factory.mktemp("patched")
    link_megatron(folder)
    assert skyladder(["patch", "apply", str(folder)]) == 0
    with ProcessPool(python_path=[folder]) as pool:
        yield pool, folder


def train(trainer: Trainer, mask: str, **options: Any) -> Run:
    return trainer.train(
        f"{RUN} {LAYOUT} {MASKS[mask]}", num_processes=4, load=False, stop_time=True, **options
    )


@pytest.mark.parametrize("mask", MASKS)
def test_every_logged_figure_is_that_of_the_entry_point(
    trainer: Trainer,
    patched: tuple[ProcessPool, Path],
    mask: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pool, folder = patched
    ours = train(trainer, mask)
    theirs = train(trainer.on(pool), mask, script=str(folder / "pretrain_gpt.py"))
    logs = [parse(run.log(3)) for run in (ours, theirs)]
    for kind in ("iterations", "validations"):
        wanted, found = ([asdict(each) for each in getattr(log, kind)] for log in logs)
        assert _without_time(found) == _without_time(wanted)
        assert wanted
    (last,) = logs[1].iterations[-1:]
    assert {
        "skyladder/attention_fraction",
        "skyladder/visible_context",
        "skyladder/fragments_per_row",
        "skyladder/tflops_per_gpu",
        "skyladder/hours_left",
        "skyladder/attention_entropy",
        "throughput per GPU (TFLOP/s/GPU)",
    } <= last.values.keys()
    assert _report(theirs, tmp_path, capsys) == _report(ours, tmp_path, capsys)


@pytest.mark.parametrize("mask", ["window", "documents"])
def test_context_parallel_ranks_hold_the_same_tokens(
    trainer: Trainer, patched: tuple[ProcessPool, Path], mask: str
) -> None:
    """Balanced layouts, by the window and by documents; validation in between."""
    pool, folder = patched
    flags = (
        f"{RUN} {MASKS[mask]} --context-parallel-size 2 --pipeline-model-parallel-size 2 "
        "--micro-batch-size 1 --skyladder-context-parallel-layout balanced"
    )
    options: dict[str, Any] = {"num_processes": 4, "load": False, "stop_time": True}
    ours = trainer.train(flags, **options)
    theirs = trainer.on(pool).train(flags, script=str(folder / "pretrain_gpt.py"), **options)
    assert "shares out tokens by the window" in theirs.log()
    logs = [parse(run.log(3)) for run in (ours, theirs)]
    for kind in ("iterations", "validations"):
        wanted, found = ([asdict(each) for each in getattr(log, kind)] for log in logs)
        assert _without_time(found) == _without_time(wanted)
        assert wanted


def test_latent_attention_and_prediction_heads_train_the_same(
    trainer: Trainer, patched: tuple[ProcessPool, Path]
) -> None:
    pool, folder = patched
    flags = (
        "--train-samples 24 --micro-batch-size 1 --context-parallel-size 2 "
        "--skyladder-start-window 8 --skyladder-alpha 14 --skyladder-intra-document "
        "--skyladder-context-parallel-layout balanced --skyladder-allow-unfinished"
    )
    options: dict[str, Any] = {"num_processes": 2, "load": False, "architecture": "mla-heads"}
    ours = trainer.train(flags, **options)
    theirs = trainer.on(pool).train(flags, script=str(folder / "pretrain_gpt.py"), **options)
    assert "mask probe passed" in theirs.log()
    for name in ("loss", "grad_norm"):
        assert len(ours.steps(name)) == 3
        assert theirs.steps(name) == ours.steps(name)


def test_documents_that_cannot_be_found_are_pointed_out(
    trainer: Trainer, patched: tuple[ProcessPool, Path]
) -> None:
    pool, folder = patched
    run = trainer.on(pool).train(
        "--train-samples 8 --micro-batch-size 8 --vocab-size 128 --skyladder-intra-document",
        load=False,
        script=str(folder / "pretrain_gpt.py"),
    )
    for text in (
        "400 end in 126",
        "none of the first 8 sequences has the end-of-document token 127",
    ):
        assert run.log().count(text) == 1


def _without_time(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**record, "time": None} for record in records]


def _report(run: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return the figures of a report: the first rank logs the schedule, the last the losses."""
    (folder / "run.log").write_text(run.log(0) + run.log(3))
    capsys.readouterr()
    assert skyladder(["report", str(folder / "run.log"), "--json"]) == 0
    return json.loads(capsys.readouterr().out)
