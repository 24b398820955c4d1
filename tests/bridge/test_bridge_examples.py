"""The examples: their recipes as they stand, and trained, shrunk by overrides."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from bridge_runs import BridgeRun, BridgeRuns
from test_bridge_command import SMALL, command

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "bridge"
NO_FILES = ("tokenizer.tokenizer_type=NullTokenizer", "tokenizer.tokenizer_model=null")


def trained(runs: BridgeRuns, recipe: str, *words: str) -> BridgeRun:
    return command(runs, "--recipe", f"own_recipe:{recipe}", *SMALL.split(), *NO_FILES, *words)


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
        save = f"{runs.folder}/{recipe}"
        run = trained(
            runs,
            recipe,
            *("skyladder.preset=extend-context", f"skyladder.start_window={start}"),
            *("skyladder.round_to=null", "skyladder.intra_document=true"),
            *(f"model.seq_length={2 * start}", f"dataset.seq_length={2 * start}"),
            *("model.context_parallel_size=1", "train.train_iters=4"),
            f"checkpoint.pretrained_checkpoint={previous}",
            *(f"checkpoint.save={save}", f"checkpoint.load={save}", "checkpoint.save_interval=4"),
        )
        assert (windows(run)[0], windows(run)[-1]) == (start, 2 * start)
        previous = save


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
