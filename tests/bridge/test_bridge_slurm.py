"""A run of Bridge as a SLURM job starts it: stopped by the user, saved, and gone on with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from bridge_runs import BridgeRuns
from test_bridge_command import SMALL
from test_bridge_examples import NO_FILES

from megatron_skyladder.report.runlog import read_run
from megatron_skyladder.slurm.attempts import RunFolder
from megatron_skyladder.slurm.settings import BRIDGE_ENTRY, Environment, Settings
from megatron_skyladder.testing import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = f"{REPOSITORY / 'tests' / 'bridge' / 'own_recipe.py'}:pretrain_1b_8k"
STEPS, SECONDS = 4000, 200


def start(run: RunFolder, attempt: int, steps: int) -> subprocess.Popen[bytes]:
    flags = (
        *("--recipe", RECIPE, *SMALL.split(), *NO_FILES, "skyladder.start_window=8"),
        *("skyladder.allow_schedule_change=true", f"train.train_iters={steps}"),
        *("validation.eval_iters=0", "logger.log_interval=1"),
    )
    settings = Settings(str(run.path), flags, BRIDGE_ENTRY, 1, 1, 0, {}, Environment())
    folder = run.attempt_folder(attempt)
    folder.mkdir(parents=True)
    (run.path / "settings.json").write_text(settings.to_json())
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "SKYLADDER_DEVICE": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "SKYLADDER_ATTEMPT_DIR": str(folder),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    words = [sys.executable, "-m", "megatron_skyladder.slurm.node", str(run.path)]
    return subprocess.Popen(words, env=environment)


def test_stopped_and_gone_on_with(runs: BridgeRuns) -> None:
    run = RunFolder(runs.folder / "slurm")
    first = start(run, 1, STEPS)
    log = run.attempt_folder(1) / "rank.0000.log"
    deadline = time.monotonic() + SECONDS
    while not (log.exists() and "SkyLadder: iteration 3/" in log.read_text(errors="replace")):
        assert first.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)
    (run.path / "stop").touch()
    assert first.wait(SECONDS) == 0, log.read_text()[-3000:]
    assert not (run.path / "finished").exists()
    saved = run.newest_checkpoint()
    assert 3 <= saved < STEPS
    (run.path / "stop").unlink()

    assert start(run, 2, saved + 2).wait(SECONDS) == 0
    assert (run.path / "finished").exists()
    second = run.attempt_folder(2) / "rank.0000.log"
    iterations = re.findall(r"SkyLadder: iteration (\d+)/", second.read_text())
    assert [int(each) for each in iterations] == [saved + 1, saved + 2]
    assert read_run(run.path).iterations[-1].iteration == saved + 2
    assert json.loads((run.path / "settings.json").read_text())["entry"] == BRIDGE_ENTRY
