"""A study on Megatron's trainer: stopped, killed, continued, with a run that fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from tiny_study import write_study

from megatron_skyladder.errors import UsageError
from megatron_skyladder.report.runlog import read_run
from megatron_skyladder.study import preparation, queue, records, settings
from megatron_skyladder.study.records import Measured
from megatron_skyladder.study.training import Training
from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron


def _call(config: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_skyladder", "study", str(config), *words]
    command += ["--output", str(config.parent / "study")]
    environment = {name: value for name, value in os.environ.items() if name != "SKYLADDER_DEVICE"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def _stop_at(going: queue.Queue, last: int, times: int, name: str, iteration: int) -> None:
    if iteration == last:
        log = going.output / "runs" / name / "train.log"
        assert f" iteration {last:8}/" in log.read_text()  # nothing is held back for a kill to lose
        for _ in range(times):
            going.stop()


def test_a_study_from_beginning_to_end(tmp_path: Path) -> None:
    """Stopped in mid-run, killed in mid-run, then run to the end: as its undisturbed twin."""
    config = write_study(tmp_path)
    output = tmp_path / "study"
    study = settings.read(config)
    made = preparation.make(study, output, print)
    said: list[str] = []

    for last, times in ((11, 1), (27, 2)):  # once: it saves; twice: SIGKILL
        going = queue.Queue(study, output, made["identity"], said.append, priority=0)
        going.on_step = partial(_stop_at, going, last, times)
        going.run(1)
        state = queue.states(study, output)[0]
        assert (state.planned.name, state.word) == ("ladder-seed1", "begun")
        assert not going.failures and state.iteration >= last
    saved = [line for line in said if "saved after step" in line]
    first, second = (int(line.split()[-1]) for line in saved)
    assert 11 <= first < 27 and first <= second and (second == first or second % 8 == 0), said

    shown = _call(config, "--status").stdout
    assert "0 of 4 runs are finished" in shown and "core hours are left" in shown
    done = _call(config, "--run", "--workers", "2", "--nice", "0")
    assert done.returncode == 1, done.stderr  # one failed, the others went on
    assert "3 of 4 runs are finished" in done.stdout
    failed = next(line for line in done.stderr.splitlines() if "FAILED" in line)
    assert "broken-seed1: FAILED, exit code 2 after step 0" in failed
    assert "--skyladder-start-window=128 is above the final window of 64" in failed

    ladder, twin = (
        records.read(output / f"records/{name}-seed1.json") for name in ("ladder", "twin")
    )
    assert [it["event"] for it in ladder.events] == [
        *("started", "stopped") * 2,
        *("started", "finished"),
    ]
    assert [it.iteration for it in ladder.validations] == [20, 40, 60]
    for own, other in zip(ladder.validations, twin.validations, strict=True):
        assert (own.loss, own.by_length) == (other.loss, other.by_length)  # bit-identical
    assert ladder.copying == twin.copying and sorted(ladder.copying) == [16, 32]
    whole, parts = (read_run(output / f"runs/{it}-seed1/train.log") for it in ("twin", "ladder"))
    # Megatron logs the second line of a start as a mean of two
    begun = {it["iteration"] for it in ladder.events if it["event"] == "started"}
    for step, same in zip(parts.iterations, whole.iterations, strict=True):
        assert step.window == same.window
        if step.iteration - 2 not in begun:
            assert step.values["lm loss"] == same.values["lm loss"], step.iteration
    assert ladder.seconds and ladder.last.seconds and twin.seconds
    clock = records.read(output / "records/time-seed1.json")
    assert len(clock.step_seconds) == 20 and all(clock.step_seconds) and not clock.copying

    written = _call(config, "--write")
    assert written.returncode == 0, written.stderr
    text = (tmp_path / "docs/experiments.md").read_text(encoding="utf-8")
    assert "2 of 3 runs have finished." in text and "Not finished yet: `broken`." in text
    verdict = text[text.index("- `twin` against `ladder`, one seed") :].partition("\n\n")[0]
    # and on one clock no time either:
    assert " ".join(verdict.split()).endswith("+0.000 nats at equal tokens; about as much time.")
    assert "mask took in the timing runs (`time`), their median" in " ".join(text.split())
    assert "`broken-seed1`: exit code 2 after step 0" in text and f"{output}/" not in text
    assert (study.records / "losses.png").stat().st_size > 10_000

    run = next(it for it in study.runs if it.arm == "twin")
    log = output / "runs/twin-seed1/train.log"
    lines = log.read_text().splitlines(keepends=True)
    for cut, lacks in (
        (r" iteration +5/", "train.log lacks step 5, so"),
        (r" iteration +[56]/|loss at iteration 60", "2 steps from 5 to 6 and the last validation,"),
    ):
        log.write_text("".join(line for line in lines if not re.search(cut, line)))
        with pytest.raises(ValueError, match=f"{lacks} .* Move .*twin-seed1 away to train it anew"):
            records.record_of(Training(run, output, made["identity"]), Measured())


def test_one_queue_in_a_folder(tmp_path: Path) -> None:
    with queue.locked(tmp_path):
        assert queue.is_locked(tmp_path)
        with (
            pytest.raises(UsageError, match=r"another skyladder study runs in .*, or a process"),
            queue.locked(tmp_path),
        ):
            pass
    assert not queue.is_locked(tmp_path)


def test_a_run_does_not_go_on_with_other_flags(tmp_path: Path) -> None:
    config = write_study(tmp_path)
    (run,) = (it for it in settings.read(config).runs if it.arm == "ladder")
    folder = tmp_path / "study/runs/ladder-seed1"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({"command": [], "corpus": "x"}))
    going = queue.Queue(settings.read(config), tmp_path / "study", "x", lambda text: None)
    going._one(run)
    assert "was begun with other flags or other text" in going.failures["ladder-seed1"]
    kept = (tmp_path / "study/records/failures.jsonl").read_text()
    assert "see ./runs/ladder-seed1/settings.json" in kept and str(tmp_path) not in kept
