"""`skyladder prepare` as it is called: real worker processes, the same bytes whatever happens."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import lzma
import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import prepare_inputs as tiny
import pytest

from megatron_skyladder.cli import main
from megatron_skyladder.cli.prepare import ProgressDisplay, progress_line
from megatron_skyladder.data import output, prepare, sources, tool_flags
from megatron_skyladder.data.indexed import IndexedReader, IndexedWriter
from megatron_skyladder.data.progress import Progress
from megatron_skyladder.megatron_lm import flag_names

NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "1000"]


def numbers(count: int) -> list[str]:
    """Return texts for NullTokenizer, of different lengths."""
    return [" ".join(str((i + j) % 999) for j in range(1 + i % 5)) for i in range(count)]


def run(*flags: Any, expect: int = 0) -> None:
    assert main(["prepare", *map(str, flags)]) == expect


def pair(prefix: Path, key: str = "text") -> tuple[bytes, bytes]:
    path = f"{prefix}_{key}_document"
    return Path(f"{path}.bin").read_bytes(), Path(f"{path}.idx").read_bytes()


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BATCH_BYTES", 200)
    monkeypatch.setattr(output, "COMMIT_SECONDS", 0)


def test_output_does_not_depend_on_the_workers(
    tmp_path: Path, small_batches: None, capsys: pytest.CaptureFixture
) -> None:
    texts = numbers(200)
    path = tiny.write_json_lines(tmp_path / "a.jsonl", texts)
    with IndexedWriter(tmp_path / "expected_text_document", "uint16") as writer:
        for text in texts:
            writer.add_document([*map(int, text.split()), 999])
    for workers in (1, 3):
        prefix = tmp_path / f"out{workers}"
        run("--input", path, "--output-prefix", prefix, "--workers", workers, *NULL)
        assert pair(prefix) == pair(tmp_path / "expected")
    assert "out3_text_document: 200 documents, 800 tokens" in capsys.readouterr().out


def test_many_kinds_of_input_make_one_output(tmp_path: Path, small_batches: None) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    tiny.write_json_lines(folder / "a.jsonl", numbers(20))
    (folder / "b.txt").write_text("1 2 3")
    prefix = tmp_path / "deep" / "er" / "out"  # folders are made
    run("--input", folder, "--output-prefix", prefix, "--workers", 1, "--no-append-eod", *NULL)
    reader = IndexedReader(f"{prefix}_text_document")
    assert len(reader) == 21 and reader[20].tolist() == [1, 2, 3]


def test_bad_line_stops_and_the_same_command_with_skip_goes_on(
    tmp_path: Path,
    small_batches: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(output, "COMMIT_SECONDS", 3600)  # only the bad line commits
    caplog.set_level(logging.INFO)
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    lines = tiny.write_json_lines(good, numbers(60)).read_text().splitlines(keepends=True)
    bad.write_text("".join([*lines[:50], '{"text": \n', *lines[50:], '{"id": 1}\n']))
    flags = ["--input", bad, "--output-prefix", tmp_path / "out", "--workers", 1, *NULL]
    run(*flags, expect=1)
    message = capsys.readouterr().err
    assert "bad.jsonl:51: JSONDecodeError" in message and "--on-bad-line skip" in message
    assert not (tmp_path / "out_text_document.idx").exists()
    run(*flags, "--on-bad-line", "skip")
    run("--input", good, "--output-prefix", tmp_path / "clean", "--workers", 1, *NULL)
    assert pair(tmp_path / "out") == pair(tmp_path / "clean")
    assert "bad lines left out: 2" in capsys.readouterr().out
    assert "bad.jsonl:62: ValueError: no key 'text', it has id" in caplog.text
    assert "going on after" in caplog.text


def test_bad_lines_beyond_a_limit_are_only_counted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(prepare, "SHOWN_BAD_LINES", 3)
    (tmp_path / "a.jsonl").write_text('{"text": "1"}\n' + "bad\n" * 9)
    flags = ["--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "out", *NULL]
    run(*flags, "--workers", 1, "--on-bad-line", "skip")
    assert caplog.text.count("skipped ") == 4
    assert "skipped more than 3" in caplog.text
    assert "bad lines left out: 9" in capsys.readouterr().out


@pytest.mark.parametrize("unfinished", [False, True])
def test_input_that_changed_without_changing_its_size(
    tmp_path: Path, small_batches: None, capsys: pytest.CaptureFixture, unfinished: bool
) -> None:
    path = tmp_path / "a.jsonl"
    flags = ["--input", path, "--output-prefix", tmp_path / "out", "--workers", 1, *NULL]
    first = '{"text": "1 2 3"}\n' * 20
    path.write_text(first + ("bad\n" if unfinished else "{}\n".replace("{}", "   ")))
    run(*flags, expect=int(unfinished))
    path.write_text(path.read_text().replace("1 2 3", "7 8 9"))
    capsys.readouterr()
    run(*flags, expect=1)
    message = capsys.readouterr().err
    assert "the input files are others (names, sizes, order or content)" in message
    if unfinished:
        journal = f"{tmp_path}/out.prepare.journal"
        assert f"delete {journal} to start over" in message
        os.remove(journal)  # as it says, and no more
        path.write_text(path.read_text().replace("bad\n", ""))
    else:
        for file in tmp_path.glob("out_text_document.*"):
            file.unlink()
    run(*flags)
    assert IndexedReader(f"{tmp_path}/out_text_document")[0].tolist() == [7, 8, 9, 999]


def test_an_early_end_says_what_its_files_are_for(
    tmp_path: Path,
    small_batches: None,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    good = tiny.write_json_lines(tmp_path / "a.jsonl", numbers(60)).read_text()
    (tmp_path / "a.jsonl").write_text(good + "bad\n")
    flags = ["--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "out", *NULL]
    run(*flags, "--workers", 1, expect=1)
    left = {path.name for path in tmp_path.iterdir()} - {"a.jsonl"}
    assert left == {"out.prepare.journal"} | {
        f"out_text_document.{part}.partial" for part in ("bin", "lengths", "documents")
    }
    assert all(f"{tmp_path}/{name}" in caplog.text for name in left)
    assert "the same command goes on from there; delete them to start over" in caplog.text
    message = capsys.readouterr().err
    assert f"correct the input, delete {tmp_path}/out.prepare.journal and start" in message


@pytest.mark.parametrize("text", ["bad\n", "\n", '{"text": ""}\n'])
def test_an_early_end_without_any_work_leaves_nothing(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    flags = ["--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "out", *NULL]
    run(*flags, "--workers", 1, expect=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    assert "kept" not in caplog.text


def test_a_key_with_a_slash_is_reported_where_it_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"a/b": "1 2"}\n')
    for folder in ("", f"{tmp_path}/deep/"):
        flags = ["--input", "a.jsonl", "--output-prefix", f"{folder}D", "--json-keys", "a/b"]
        for _ in range(2):  # written, and found written
            run(*flags, "--workers", 1, *NULL)
            prefix, _, what = capsys.readouterr().out.partition(": ")
            assert prefix == f"{folder}D_a/b_document" and what.startswith("1 documents")
            assert IndexedReader(prefix)[0].tolist() == [1, 2, 999]


def test_documents_without_tokens_are_counted_for_each_key(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    texts = [("1", []), ([], []), ([], ["4", "5"]), ("2", "3"), ("6", [])]
    lines = [json.dumps({"title": title, "text": text}) for title, text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    flags = ["--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "out", *NULL]
    run(*flags, "--workers", 1, "--json-keys", "title", "text")
    printed = capsys.readouterr().out.splitlines()
    counts = [line.rpartition("documents without tokens: ")[2] for line in printed]
    assert counts == ["2", "3"]


@pytest.mark.parametrize("key", ["", "a/../../b", "a/..", "x\0y"])
def test_keys_that_make_no_name_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, key: str
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({key: "1"}) + "\n")
    flags = ["--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "out", *NULL]
    run(*flags, "--workers", 1, "--json-keys", key, expect=1)
    assert "the output is named after the key" in capsys.readouterr().err


def test_a_compressed_text_file_is_named_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """In a folder of whole files it is one bad document, which may be skipped."""
    (tmp_path / "a").write_bytes(lzma.compress(b"1 2"))
    (tmp_path / "b").write_text("3 4")
    flags = ["--input", tmp_path, "--output-prefix", f"{tmp_path}-out", "--input-format", "text"]
    run(*flags, *NULL, "--workers", 1, expect=1)
    assert "it is compressed or packed (xz), which is not read here" in capsys.readouterr().err
    run(*flags, *NULL, "--workers", 1, "--on-bad-line", "skip")
    assert IndexedReader(f"{tmp_path}-out_text_document")[0].tolist() == [3, 4, 999]


def test_a_finished_run_is_not_repeated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = tiny.write_json_lines(tmp_path / "a.jsonl", numbers(5))
    flags = ["--input", path, "--output-prefix", tmp_path / "out", "--workers", 1, *NULL]
    run(*flags)
    before = os.stat(tmp_path / "out_text_document.bin").st_mtime_ns
    run(*flags)
    assert os.stat(tmp_path / "out_text_document.bin").st_mtime_ns == before
    assert "is prepared already: nothing to do" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "0"], "--workers=0: give 1 or more"),
        (["--json-keys", "a", "b", "--input-format", "lines"], "--json-keys names 2: a b"),
        (["--eod-id", "3"], "--eod-id is for --from-packed"),
        (["--input-format", "lines", "--on-bad-line", "skip"], "the input holds no tokens at all"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    path = tiny.write_json_lines(tmp_path / "a.jsonl", ["1"])
    run("--input", path, "--output-prefix", tmp_path / "out", *NULL, *flags, expect=1)
    assert message in capsys.readouterr().err


class Killer:
    """A tokenizer whose worker is killed, as by a system that is out of memory."""

    eod, vocab_size, identity = 0, 10, b""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []


def test_a_worker_that_was_killed(tmp_path: Path) -> None:
    path = tiny.write_json_lines(tmp_path / "a.jsonl", ["1"])
    request = prepare.Request([str(path)], f"{tmp_path}/out")
    with pytest.raises(ValueError, match="a worker process died"):
        prepare.prepare(request, Killer(), lambda progress: None)  # type: ignore[arg-type]


def test_interrupt_keeps_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupt(self: ProgressDisplay, progress: Progress) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ProgressDisplay, "show", interrupt)
    path = tiny.write_json_lines(tmp_path / "a.jsonl", numbers(5))
    run(*("--input", path, "--output-prefix", tmp_path / "out", "--workers", 1, *NULL), expect=130)
    assert "the same command goes on from here" in capsys.readouterr().err
    assert (tmp_path / "out.prepare.journal").exists()


def test_the_commands_in_the_documentation_parse() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    commands = re.findall(r"^skyladder (.*)", page.replace("\\\n", " "), re.MULTILINE)
    assert len(commands) == 9
    for command in commands:
        name, *flags = shlex.split(command)
        subparsers = argparse.ArgumentParser().add_subparsers()
        module = importlib.import_module(f"megatron_skyladder.cli.{name}")
        module.add_parser(subparsers, "").parse_args(flags)


# --- the command line of Megatron's tool ----------------------------------------------------------

# As they stand on command lines of tools/preprocess_data.py, sorted by what that tool does with
# them, not by our table: a flag that is taken there must not change a token of what it writes.
TAKEN = (  # parallel reading, sentence splitting, padding of the model's vocabulary, its defaults
    "--partitions 3",
    "--keep-sequential-samples",
    "--lang english",
    "--keep-newlines",
    "--padded-vocab-size 50304",
    "--no-pad-vocab-size",
    "--disable-pad-vocab-size",
    "--make-vocab-size-divisible-by 128",
    "--vocab-extra-ids 100",
    "--null-tokenizer-pad-id 3",
    "--tokenizer-hf-use-fast",
    "--tokenizer-hf-include-special-tokens",
    "--use-gigatoken",
)
REFUSED = (  # other documents, other ids, another format, or nothing written at all
    "--dataset-impl lazy",
    "--split-sentences",
    "--find-optimal-num-workers",
    "--workers-to-check 16 32",
    "--max-documents 100",
    "--vocab-file vocab.json",
    "--merge-file merges.txt",
    "--tokenizer-metadata metadata.json",
    "--legacy-tokenizer",
    "--chat-template template.jinja",
    "--tokenizer-hf-no-use-fast",
    "--tokenizer-sentencepiece-legacy",
    "--no-tokenizer-sentencepiece-ignore-extra-whitespaces",
    "--disable-tokenizer-sentencepiece-ignore-extra-whitespaces",
)


def test_every_flag_of_megatrons_tool_is_one_or_the_other() -> None:
    assert sorted(words.split()[0] for words in TAKEN + REFUSED) == sorted(tool_flags.FLAGS)


def test_flags_of_megatrons_tool_that_change_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tiny.write_json_lines(tmp_path / "a.jsonl", numbers(30))
    flags = ["--input", path, "--workers", 1, "--append-eod", *NULL]
    run(*flags, "--output-prefix", tmp_path / "plain")
    theirs = " ".join(TAKEN).split()
    run(*flags, "--output-prefix", tmp_path / "theirs", *theirs, "--dataset-impl", "mmap")
    assert pair(tmp_path / "theirs") == pair(tmp_path / "plain")
    for words in TAKEN:
        assert f"{words.split()[0]} has no effect here: " in caplog.text


@pytest.mark.parametrize("words", REFUSED)
def test_flags_of_megatrons_tool_that_would_change_the_output(
    tmp_path: Path, capsys: pytest.CaptureFixture, words: str
) -> None:
    path = tiny.write_json_lines(tmp_path / "a.jsonl", ["1"])
    run("--input", path, "--output-prefix", tmp_path / "out", *NULL, *words.split(), expect=1)
    message = capsys.readouterr().err
    assert f"{words.split()[0]} is a flag of Megatron's tool, and refused here: " in message
    assert not list(tmp_path.glob("out*"))


def test_every_tokenizer_flag_of_megatron_is_known() -> None:
    """Of every release; and those of the tool itself, by name (Megatron 0.16 to main)."""
    parser = argparse.ArgumentParser()
    importlib.import_module("megatron_skyladder.cli.prepare").add_parser(
        parser.add_subparsers(), ""
    )
    (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    known = set(subparsers.choices["prepare"]._option_string_actions)
    names = flag_names.TABLE.read_text().split()
    tokenizers = {
        name
        for name in names
        if re.match(r"--(no-|disable-)?(tokenizer|tiktoken|null-tokenizer|vocab|merge-file)", name)
    }
    tool = {
        *("--input", "--json-keys", "--split-sentences", "--keep-newlines", "--append-eod"),
        *("--lang", "--output-prefix", "--workers", "--partitions", "--log-interval"),
        *("--keep-sequential-samples", "--find-optimal-num-workers", "--workers-to-check"),
        *("--max-documents", "--legacy-tokenizer", "--chat-template", "--use-gigatoken"),
        *("--padded-vocab-size", "--trust-remote-code"),
    }
    assert len(tokenizers) > 15
    assert sorted((tokenizers | tool) - known) == []


def test_progress_every_so_many_documents(
    tmp_path: Path, small_batches: None, capsys: pytest.CaptureFixture
) -> None:
    path = tiny.write_json_lines(tmp_path / "a.jsonl", numbers(60))
    flags = ["--input", path, "--output-prefix", tmp_path / "out", "--workers", 1, *NULL]
    run(*flags, "--log-interval", 20)
    lines = [line for line in capsys.readouterr().err.splitlines() if "tokens/s" in line]
    assert 2 <= len(lines) <= 3  # a batch has a few documents
    run(*flags, "--log-interval", 0, expect=1)
    assert "--log-interval=0: give 1 document or more" in capsys.readouterr().err


def test_progress_line() -> None:
    progress = Progress(
        read_bytes=75,
        total_bytes=100,
        documents=1200,
        tokens=5_000_000,
        bad=2,
        seconds=50.0,
        read_bytes_before=50,
        tokens_before=1_000_000,
    )
    assert progress_line(progress) == (
        " 75.0%  1,200 documents  5,000,000 tokens  80,000 tokens/s  2 bad lines  0 min 50 s left"
    )


def test_no_time_left_is_named_before_there_is_a_rate() -> None:
    assert "left" not in progress_line(Progress(50, 100, 0, 0, 0, 0.0, 50, 0))
    assert progress_line(Progress(1, 7201, 0, 0, 0, 1.0, 0, 0)).endswith("2 h 00 min left")
