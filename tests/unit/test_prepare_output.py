"""The journal: a crash at any step, and the next run ends with the same files."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_skyladder.data import output as output_module
from megatron_skyladder.data.encode import Documents
from megatron_skyladder.data.indexed import IndexedWriter
from megatron_skyladder.data.output import (
    Journal,
    ResumableOutput,
    finished_records,
    journal_path,
)
from megatron_skyladder.data.record import read_record
from megatron_skyladder.data.sources import Place
from megatron_skyladder.errors import UsageError

SETTINGS = {"inputs": "abc", "eod": 9, "dtype": "uint16"}
KEYS = ["text", "title"]
NUM_BATCHES = 5


def batch(number: int) -> dict[str, Documents]:
    """Return two documents that differ from batch to batch, one of the texts empty."""
    tokens = np.arange(number * 10, number * 10 + 3, dtype="<u2")
    text = Documents(tokens, np.array([3], dtype="<i4"), np.array([1, 0]))
    title = Documents(tokens + 1, np.array([1, 2], dtype="<i4"), np.array([1, 1]))
    return {"text": text, "title": title}


def run(prefix: Path) -> list[dict[str, Any]]:
    """Do what `prepare` does, from wherever the last run was stopped."""
    done = finished_records(str(prefix), KEYS, SETTINGS)
    if done is not None:
        return done
    output = ResumableOutput(str(prefix), KEYS, np.dtype("<u2"), SETTINGS)
    try:
        for number in range(output.place.file, NUM_BATCHES):
            output.add(batch(number), Place(number + 1), bad=1)
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
        "bad": 5,
    }
    assert (records[1]["documents"], records[1]["empty"]) == (10, 0)
    assert read_record(f"{tmp_path}/a_text_document") == records[0]
    assert read_record(f"{tmp_path}/other") is None


def crashing(real: Callable[..., Any], last_call: int) -> Callable[..., Any]:
    """Return a function that fails from its last call on, and does what it did before that."""
    calls = itertools.count(1)

    def failing(*args: Any) -> Any:
        if next(calls) >= last_call:
            raise OSError("crash")
        return real(*args)

    return failing


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
        failing = crashing(real, last_call)
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
        assert [record["empty"] for record in records] == [NUM_BATCHES, 0]
        assert records[0]["bad"] == NUM_BATCHES
    assert last_call > {"replace": 6, "remove": 4, "fsync": 10}[function]


def test_what_was_not_committed_is_made_again(tmp_path: Path) -> None:
    run(tmp_path / "straight")
    output = ResumableOutput(f"{tmp_path}/a", KEYS, np.dtype("<u2"), SETTINGS)
    output.add(batch(0), Place(1), bad=1)
    output.commit()
    output.add(batch(1), Place(2), bad=1)
    output.close()
    again = ResumableOutput(f"{tmp_path}/a", KEYS, np.dtype("<u2"), SETTINGS)
    assert again.is_resumed and again.place == Place(1) and again.counts == {"bad": 1}
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
        Journal(tmp_path / "j", {**SETTINGS, "eod": 2, "new": 1})


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


TEXT_BIN, TEXT_IDX = "a_text_document.bin", "a_text_document.idx"  # 30 bytes, 10 documents


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({TEXT_BIN: None}, f"{TEXT_BIN} does not exist"),
        ({TEXT_IDX: None}, f"{TEXT_IDX} does not exist"),
        ({TEXT_BIN: None, TEXT_IDX: None}, f"{TEXT_BIN} does not exist"),
        ({TEXT_BIN: 28}, f"{TEXT_BIN} has 28 bytes of 30"),
        ({TEXT_BIN: 0}, f"{TEXT_BIN} has 0 bytes of 30"),
        ({TEXT_IDX: 100}, f"{TEXT_IDX} has 100 bytes of 182: it was cut off"),
        ({TEXT_IDX: 20}, f"{TEXT_IDX} is not an index"),
        ({TEXT_IDX: 0}, f"{TEXT_IDX} is not an index"),
        ({TEXT_BIN: 8, TEXT_IDX: 100}, f"{TEXT_IDX} has 100 bytes of 182: it was cut off"),
    ],
)
def test_a_pair_that_is_not_whole_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sizes: dict[str, int | None], why: str
) -> None:
    """A file that is gone (None) or cut off to so many bytes."""
    records = run(tmp_path / "a")
    expected = snapshot(tmp_path)
    for name, size in sizes.items():
        if size is None:
            os.remove(tmp_path / name)
        else:
            os.truncate(tmp_path / name, size)
    assert run(tmp_path / "a") == records
    assert snapshot(tmp_path) == expected
    assert f"a_text_document was prepared before and is prepared anew: {tmp_path}/{why}" in (
        caplog.text
    )
    caplog.clear()
    assert run(tmp_path / "a") == records and not caplog.text


@pytest.mark.parametrize("part", ["bin", "idx"])
def test_a_crash_while_a_pair_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commit_always: None, part: str
) -> None:
    """A cut off .idx that is still there is not taken for the new one."""
    run(tmp_path / "a")
    expected = snapshot(tmp_path)
    real = os.replace
    for last_call in range(1, 7):
        os.truncate(tmp_path / f"a_text_document.{part}", 20)
        failing = crashing(real, last_call)
        monkeypatch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="crash"):
            run(tmp_path / "a")
        monkeypatch.setattr(os, "replace", real)
        run(tmp_path / "a")
        assert snapshot(tmp_path) == expected


def other_pair(folder: Path, *documents: int) -> None:
    """Put a pair with documents of so many tokens in the place of the first key's."""
    with IndexedWriter(folder / "a_text_document", "<u2") as writer:
        for length in documents:
            writer.add_document(np.arange(length))


@pytest.mark.parametrize("lost", [None, "bin", "idx"])
@pytest.mark.parametrize(
    ("documents", "why"),
    [
        ((9, 9), r"idx is of 2 documents, noted were 10"),
        ((4,) * 10, r"idx is of 40 tokens, noted were 15"),
    ],
)
def test_another_pair_in_the_place_of_ours_is_kept(
    tmp_path: Path, documents: tuple[int, ...], why: str, lost: str | None
) -> None:
    run(tmp_path / "a")
    other_pair(tmp_path, *documents)
    if lost:
        os.remove(tmp_path / f"a_text_document.{lost}")
        why = f"{lost} does not exist"
    before = snapshot(tmp_path)
    with pytest.raises(
        ValueError, match=rf"are not the pair that .*prepared is of: .*{why}\. Some"
    ):
        run(tmp_path / "a")
    assert snapshot(tmp_path) == before


def test_files_of_another_kind_in_the_place_of_ours_are_kept(tmp_path: Path) -> None:
    run(tmp_path / "a")
    idx = tmp_path / TEXT_IDX
    for content in (b"another", b"another" * 10):
        idx.write_bytes(content)
        with pytest.raises(ValueError, match=r"idx is not an index .* Something else was put"):
            run(tmp_path / "a")
        assert idx.read_bytes() == content


def test_a_record_that_is_none(tmp_path: Path) -> None:
    run(tmp_path / "a")
    for content in ("{", "{}", "[]"):
        (tmp_path / "a_text_document.prepared").write_text(content)
        with pytest.raises(ValueError, match=r"prepared is not a record of skyladder prepare: it"):
            run(tmp_path / "a")


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


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Lustre without flock, among others; nothing is left that a later run would stumble over."""

    def no_locks(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_locks)
    where = f"cannot lock {tmp_path}/a.prepare.journal against other commands: "
    with pytest.raises(UsageError, match=f"{where}.* Give a folder on a file system with locks"):
        run(tmp_path / "a")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.prepare.journal").write_text('{"settings": {}}\n')
    with pytest.raises(UsageError, match=where):
        run(tmp_path / "a")
    assert (tmp_path / "a.prepare.journal").exists()  # of a run elsewhere
