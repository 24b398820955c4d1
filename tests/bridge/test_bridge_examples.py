"""The examples: their recipes as they stand, and trained, shrunk by overrides."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from bridge_runs import BridgeRun, BridgeRuns
from test_bridge_command import SMALL, command

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "bridge"
NO_FILES = ("tokenizer.tokenizer_type=NullTokenizer", "tokenizer.tokenizer_model=null")


def trained(runs: BridgeRuns, recipe: str, *words: str, **options: Any) -> BridgeRun:
    words = ("--recipe", f"own_recipe:{recipe}", *SMALL.split(), *NO_FILES, *words)
    return command(runs, *words, **options)


def test_the_ladder_of_a_context_extension(runs: BridgeRuns) -> None:
    """128 -> 256 -> 512 tokens in the place of 4K -> 32K -> 128K."""
    base = trained(
        runs,
        "pretrain_1b_4k",
        "skyladder.start_window=8",
        f"checkpoint.save={runs.folder}/base",
        "checkpoint.save_interval=4",
    )
    assert windows(base)[0] == 8
    previous = f"{runs.folder}/base"
    for recipe, start in (("extend_to_32k", 128), ("extend_to_128k", 256)):
        run = extended(runs, recipe, start, previous, f"{runs.folder}/{recipe}")
        assert (windows(run)[0], windows(run)[-1]) == (start, 2 * start)
        previous = f"{runs.folder}/{recipe}"


def extended(
    runs: BridgeRuns, recipe: str, start: int, previous: str, save: str, *words: str, **options: Any
) -> BridgeRun:
    """Run one stage as extend_context.sh does, to twice the length that the model has."""
    return trained(
        runs,
        recipe,
        *("skyladder.preset=extend-context", f"skyladder.start_window={start}"),
        *("skyladder.round_to=null", "skyladder.intra_document=true"),
        *(f"model.seq_length={2 * start}", f"dataset.seq_length={2 * start}"),
        *("model.context_parallel_size=1", "train.train_iters=4"),
        f"checkpoint.pretrained_checkpoint={previous}",
        *(f"checkpoint.save={save}", f"checkpoint.load={save}", "checkpoint.save_interval=4"),
        *words,
        **options,
    )


def test_a_stage_that_was_stopped_goes_on(runs: BridgeRuns) -> None:
    """Bridge's optimizer, samples and the ladder too; a stage that is done is not trained again."""
    base, save = f"{runs.folder}/stopped-base", f"{runs.folder}/stopped"
    saving = (f"checkpoint.save={base}", "checkpoint.save_interval=4")
    trained(runs, "pretrain_1b_4k", "skyladder.start_window=8", *saving)
    stage = ("extend_to_32k", 128, base)
    straight = extended(runs, *stage, f"{runs.folder}/straight")

    stopped = extended(runs, *stage, save, "train.exit_interval=2")
    going_on = extended(runs, *stage, save)
    assert [*steps(stopped), *steps(going_on)] == steps(straight)
    assert [number for number, _ in steps(going_on)] == [3, 4]
    assert windows(stopped) + windows(going_on) == windows(straight)

    assert steps(extended(runs, *stage, save)) == []


def test_weights_alone_from_where_a_run_saves_are_refused(runs: BridgeRuns) -> None:
    """Under checkpoint.finetune it would begin again, each time that it was stopped."""
    save = f"{runs.folder}/finetuned"
    words = ("checkpoint.finetune=true", "skyladder.start_window=8", "checkpoint.save_interval=2")
    words += (f"checkpoint.save={save}", f"checkpoint.load={save}")
    trained(runs, "pretrain_1b_4k", *words, "train.exit_interval=2")
    again = trained(runs, "pretrain_1b_4k", *words, exit_codes=(2,))
    assert "checkpoint.finetune=true cannot be combined with SkyLadder" in again.log()
    assert f"weights alone from {save}, where this run saves" in again.log()


def steps(run: BridgeRun) -> list[tuple[int, float]]:
    """Return the iterations that a run trained, and their losses."""
    lines = re.findall(r"iteration\s+(\d+)/\s+\d+ \|.* lm loss: (\S+)", run.log())
    return [(int(iteration), float(loss)) for iteration, loss in lines]


def windows(run: BridgeRun) -> list[int]:
    return [int(window) for window in re.findall(r"skyladder/window: (\d+)", run.log())]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("pretrain_1b_8k", (8192, 128, 95367)),
        ("pretrain_1b_4k", (4096, 256, 95367)),
        ("extend_to_32k", (32768, 128, 477)),
        ("extend_to_128k", (131072, 32, 477)),
    ],
)
def test_recipes_say_what_they_say(
    recipe: str, expected: tuple[int, int, int], runs: BridgeRuns
) -> None:
    """Sequence length, sequences in a batch, steps; and they take the examples' settings."""
    settings = {"preset": "1b-8k"} if "8k" in recipe and "128k" not in recipe else {}
    if "extend" in recipe:
        settings = {"preset": "extend-context", "start_window": 4096}
    run = runs.start(
        "describe_recipe", body_module="bridge_trials", recipe=recipe, settings=settings
    )
    facts = run.facts()
    assert (facts["seq_length"], facts["global_batch_size"], facts["train_iters"]) == expected
    assert facts["fingerprint"].startswith("linear")


def test_the_job_fits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_skyladder.cli import main

    monkeypatch.setenv("PATH", "")  # an sbatch without a cluster refuses everything
    assert main(["slurm", str(EXAMPLES / "1b-8k.ini")]) == 0
    assert "#SBATCH --nodes=2" in capsys.readouterr().out
    assert main(["slurm", str(EXAMPLES / "1b-8k.ini"), "--", "skyladder.start_windw=8"]) != 0
    assert "Did you mean skyladder.start_window?" in capsys.readouterr().err


def test_the_script_is_clean_and_says_how_it_is_used() -> None:
    path = EXAMPLES / "extend_context.sh"
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(path)], check=True)
    answer = subprocess.run(["bash", str(path)], capture_output=True, text=True)
    assert answer.returncode == 2
    assert "extend_context.sh CHECKPOINT DATA OUTPUT" in answer.stderr
