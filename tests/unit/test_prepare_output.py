"""The journal: a crash at any step, and the next run ends with the same files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_skyladder.data import output as output_module
from megatron_skyladder.data.encode import Documents
from megatron_skyladder.data.output import (
    Journal,
    ResumableOutput,
    finished_records,
    journal_path,
    read_record,
)
from megatron_skyladder.data.sources import Place

SETTINGS = {"inputs": "abc", "eod": 9}
KEYS = ["text", "title"]
NUM_BATCHES = 5


def batch(number: int) -> dict[str, Documents]:
    """Return two documents, one of them empty, that differ from batch to batch."""
    tokens = np.arange(number * 10, number * 10 + 3, dtype="<u2")
    documents = Documents(tokens, np.array([3], dtype="<i4"), np.array([1, 0]))
    return {"text": documents, "title": documents._replace(tokens=tokens + 1)}


def run(prefix: Path) -> list[dict[str, Any]]:
    """Do what `prepare` does, from wherever the last run was stopped."""
    done = finished_records(str(prefix), KEYS, SETTINGS)
    if done is not None:
        return done
    output = ResumableOutput(str(prefix), KEYS, np.dtype("<u2"), SETTINGS)
    try:
        for number in range(output.place.file, NUM_BATCHES):
            output.add(batch(number), Place(number + 1), empty=1)
        return output.finish()
    finally:
        output.close()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def commit_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_module, "COMMIT_SECONDS", 0)


def test_straight_through(tmp_path: Path) -> None:
    records = run(tmp_path / "a")
    assert sorted(snapshot(tmp_path)) == [
        *(f"a_{key}_document.{part}" for key in KEYS for part in ("bin", "idx", "prepared")),
    ]
    assert records[0] == {
        "settings": SETTINGS,
        "output": "a_text_document",
        "tokens": 15,
        "documents": 10,
        "empty": 5,
    }
    assert read_record(f"{tmp_path}/a_text_document") == records[0]
    assert read_record(f"{tmp_path}/other") is None


@pytest.mark.parametrize("function", ["replace", "remove", "fsync"])
def test_a_crash_at_any_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commit_always: None, function: str
) -> None:
    """Every call of a function that changes what a later run finds is the last one, once."""
    (tmp_path / "straight").mkdir()
    run(tmp_path / "straight" / "a")
    expected = snapshot(tmp_path / "straight")
    monkeypatch.setattr(os, "fsync", lambda file: None)  # a crash of the process needs no disk
    real = getattr(os, function)
    for last_call in range(1, 100):
        folder = tmp_path / f"{last_call}"
        folder.mkdir()
        calls = 0

        def failing(*args: Any, last_call: int = last_call) -> Any:
            nonlocal calls
            calls += 1
            if calls >= last_call:
                raise OSError("crash")
            return real(*args)

        monkeypatch.setattr(output_module.os, function, failing)
        try:
            run(folder / "a")
            break  # no crash any more
        except OSError:
            pass
        finally:
            monkeypatch.setattr(output_module.os, function, real)
        records = run(folder / "a")
        assert snapshot(folder) == expected
        assert records[0]["empty"] == NUM_BATCHES
    assert last_call > {"replace": 6, "remove": 4, "fsync": 10}[function]


def test_what_was_not_committed_is_made_again(tmp_path: Path) -> None:
    run(tmp_path / "straight")
    output = ResumableOutput(f"{tmp_path}/a", KEYS, np.dtype("<u2"), SETTINGS)
    output.add(batch(0), Place(1), empty=1)
    output.commit()
    output.add(batch(1), Place(2), empty=1)
    output.close()
    again = ResumableOutput(f"{tmp_path}/a", KEYS, np.dtype("<u2"), SETTINGS)
    assert again.is_resumed and again.place == Place(1) and again.counts == {"empty": 1}
    assert again.num_tokens == 6
    again.close()
    run(tmp_path / "a")
    for name in ("text_document.bin", "title_document.idx"):
        assert (tmp_path / f"a_{name}").read_bytes() == (tmp_path / f"straight_{name}").read_bytes()


def test_a_note_that_a_kill_cut_in_two(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", SETTINGS)
    journal.note({"place": [1, 0, 0]})
    journal.close()
    whole = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(whole + b'{"place": [2, 0')
    journal = Journal(tmp_path / "j", SETTINGS)
    assert journal.last == {"place": [1, 0, 0]}
    journal.note({"place": [3, 0, 0]})
    journal.close()
    assert (tmp_path / "j").read_bytes() == whole + b'{"place": [3, 0, 0]}\n'


def test_settings_that_a_kill_cut_in_two(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b'{"settings": {"inp')
    journal = Journal(tmp_path / "j", SETTINGS)
    journal.close()
    assert json.loads((tmp_path / "j").read_bytes()) == {"settings": SETTINGS}
    assert journal.last is None


def test_other_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    Journal(tmp_path / "j", SETTINGS).close()
    with pytest.raises(ValueError, match="unfinished run with other settings: eod was 9 and is 2;"):
        Journal(tmp_path / "j", {"inputs": "abc", "eod": 2, "new": 1})


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    first = Journal(tmp_path / "j", SETTINGS)
    with pytest.raises(ValueError, match="another skyladder prepare is writing this output"):
        Journal(tmp_path / "j", SETTINGS)
    first.close()
    Journal(tmp_path / "j", SETTINGS).close()


def test_a_finished_run_returns_at_once(tmp_path: Path) -> None:
    assert finished_records(f"{tmp_path}/a", KEYS, SETTINGS) is None
    records = run(tmp_path / "a")
    before = snapshot(tmp_path)
    assert run(tmp_path / "a") == records
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("change", ["settings", "no record"])
def test_outputs_of_another_run_are_not_overwritten(tmp_path: Path, change: str) -> None:
    run(tmp_path / "a")
    settings = {**SETTINGS, "eod": 2} if change == "settings" else SETTINGS
    if change == "no record":  # such as Megatron's tool leaves it
        os.remove(tmp_path / "a_title_document.prepared")
    with pytest.raises(ValueError, match="exist already and were made from other input"):
        finished_records(f"{tmp_path}/a", KEYS, settings)


def test_partial_files_that_shrank_leave_the_journal_free(tmp_path: Path) -> None:
    output = ResumableOutput(f"{tmp_path}/a", KEYS, np.dtype("<u2"), SETTINGS)
    output.add(batch(0), Place(1))
    output.commit()
    output.close()
    os.truncate(tmp_path / "a_text_document.bin.partial", 0)
    errors = []  # they keep what they passed through alive
    for _ in range(2):  # the second time shows that the first let go of the journal
        with pytest.raises(ValueError, match="but 6 had been written") as error:
            ResumableOutput(f"{tmp_path}/a", KEYS, np.dtype("<u2"), SETTINGS)
        errors.append(error)
    assert journal_path(f"{tmp_path}/a").exists()
