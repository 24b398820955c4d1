"""`skyladder inspect`: counts worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import prepare_inputs as tiny
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_skyladder.cli import main
from megatron_skyladder.data import summary
from megatron_skyladder.data.indexed import IndexedReader, IndexedWriter
from megatron_skyladder.data.record import write_record

EOD = 9
NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "10"]


def write(prefix: Path, documents: list[list[int]]) -> str:
    with IndexedWriter(prefix, "uint16") as writer:
        for tokens in documents:
            writer.add_document(tokens)
    return str(prefix)


def note(prefix: str, *, tokens: int, documents: int, **settings: Any) -> None:
    """Write the record of a pair, as `skyladder prepare` does."""
    settings = {"dtype": "uint16", **settings}
    write_record(prefix, {"settings": settings, "tokens": tokens, "documents": documents})


def inspect(capsys: pytest.CaptureFixture, *flags: str) -> dict[str, Any]:
    assert main(["inspect", *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_counts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prefix = write(tmp_path / "a", [[1, 2, EOD], [], [3, EOD], [4] * 7 + [EOD], [EOD]])
    found = inspect(capsys, prefix, "--seq-length", "4")
    assert (found["documents"], found["empty_documents"], found["tokens"]) == (5, 1, 14)
    lengths = found["lengths"]
    assert (lengths["min"], lengths["mean"], lengths["max"], lengths["p50"]) == (0, 2.8, 8, 2)
    assert lengths["histogram"] == [
        *([0, 0, 1, 0], [1, 1, 1, 1], [2, 3, 2, 5], [4, 7, 0, 0], [8, 15, 1, 8]),
    ]
    assert found["eod"] == {
        "id": EOD,
        "documents_without": 0,
        "first_without": None,
        "inside": 0,
        "first_inside": None,
        "largest_token": EOD,
        "source": "the token most documents end in",
    }
    # boundaries at 3, 5, 13 in rows 0-3, 4-7, 8-11; the last row is not full
    assert found["rows"] == {
        "seq_length": 4,
        "rows": 3,
        "with_several_documents": 2 / 3,
        "mean_documents": 1 + 2 / 3,
    }


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_eod_missing_and_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(summary, "CHUNK", chunk)
    documents = [[1, EOD], [EOD, 2, EOD, EOD], [], [3], [EOD], [EOD, 4]]
    reader = IndexedReader(write(tmp_path / "a", documents))
    found = summary.eod_check(reader, EOD)
    assert (found["documents_without"], found["first_without"]) == (2, 3)
    assert (found["inside"], found["first_inside"]) == (3, 1)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(7, EOD), max_size=6), max_size=12), st.integers(1, 8))
def test_against_the_plain_way(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], seq_length: int
) -> None:
    reader = IndexedReader(write(tmp_path_factory.mktemp("a") / "a", documents))
    found = summary.summarize(reader, eod=EOD, seq_length=seq_length)
    inside = sum(tokens[:-1].count(EOD) for tokens in documents)
    without = sum(bool(tokens) and tokens[-1] != EOD for tokens in documents)
    assert (found["eod"]["inside"], found["eod"]["documents_without"]) == (inside, without)
    owner = [number for number, tokens in enumerate(documents) for _ in tokens]
    # Megatron's dataset reads seq_length + 1 tokens for a sequence: the last one is a label only
    num_rows = len(range(0, len(owner) - seq_length, seq_length))
    rows = [set(owner[row * seq_length : (row + 1) * seq_length]) for row in range(num_rows)]
    assert found["rows"]["rows"] == num_rows
    if num_rows:
        several = sum(len(row) > 1 for row in rows) / num_rows
        mean = sum(len(row) for row in rows) / num_rows
        assert found["rows"]["with_several_documents"] == pytest.approx(several)
        assert found["rows"]["mean_documents"] == pytest.approx(mean)
    counted = [tuple(entry) for entry in found["lengths"]["histogram"]]
    assert sum(count for _, _, count, _ in counted) == len(documents)
    for low, high, count, tokens in counted:
        inside_lengths = [len(d) for d in documents if low <= len(d) <= high]
        assert (count, tokens) == (len(inside_lengths), sum(inside_lengths))


def test_where_the_eod_is_known_from(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prefix = write(tmp_path / "a", [[1, 5], [2, 5], [3, EOD]])

    def eod(*flags: str) -> tuple[int, str]:
        found = inspect(capsys, prefix, *flags)["eod"]
        return found["id"], found["source"]

    assert eod() == (5, "the token most documents end in")
    note(prefix, tokens=6, documents=3, eod=7)
    assert eod() == (7, "skyladder prepare")
    assert eod(*NULL) == (9, "the tokenizer")
    assert eod(*NULL, "--eod-id", "3") == (3, "--eod-id")


def test_the_record_of_another_pair_is_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    prefix = write(tmp_path / "a", [[1, 5], [2, 5], [3, EOD]])
    for wrong, why in (
        ({"tokens": 8, "documents": 3}, "is of 6 tokens, noted were 8"),
        ({"tokens": 6, "documents": 4}, "is of 3 documents, noted were 4"),
        ({"tokens": 6, "documents": 3, "dtype": "int32"}, "is of uint16 tokens, noted was int32"),
    ):
        note(prefix, eod=7, **wrong)
        found = inspect(capsys, prefix)
        assert found["eod"]["id"] == 5
        assert found["eod"]["source"] == "the token most documents end in"
        [text] = found["notes"]
        assert f"a.prepared is the record of another pair ({prefix}.idx {why})" in text
    assert main(["inspect", prefix]) == 0
    assert f"note: {text}" in capsys.readouterr().out
    note(prefix, tokens=6, documents=3, eod=7)
    assert inspect(capsys, prefix)["notes"] == []
    for damaged in ("{", "[]", '{"settings": {}}'):
        Path(f"{prefix}.prepared").write_text(damaged)
        found = inspect(capsys, prefix)
        assert found["eod"]["id"] == 5
        assert "a.prepared is not a record of skyladder prepare: it is damaged" in found["notes"][0]


def test_a_tokenizer_that_is_not_the_datas(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prefix = write(tmp_path / "a", [[1, EOD], [EOD + 1, EOD]])
    assert main(["inspect", prefix, *NULL]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert (
        "a holds tokens up to 10, but --tokenizer-type=NullTokenizer has tokens up to 9" in message
    )
    assert "Give that one, or leave the tokenizer's flags out" in message
    inspect(capsys, prefix, *NULL, "--null-tokenizer-eod-id", "10")  # Megatron's before 0.18
    inspect(capsys, prefix, *NULL[:-1], "11")
    inspect(capsys, prefix)
    model = tiny.make_hf_folder(tmp_path / "hf")
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(model)]
    prefix = write(tmp_path / "b", [[4095, 1]])
    assert main(["inspect", prefix, *flags]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert f"--tokenizer-model={model} has tokens up to 299: the data was made" in message


def test_a_tokenizer_with_another_fingerprint(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("1 2")
    out = ["--output-prefix", str(tmp_path / "a"), "--workers", "1"]
    assert main(["prepare", "--input", str(tmp_path / "a.txt"), *out, *NULL]) == 0
    capsys.readouterr()
    prefix = f"{tmp_path}/a_text_document"
    assert inspect(capsys, prefix, *NULL)["notes"] == []
    assert inspect(capsys, prefix)["notes"] == []
    other = [*NULL[:-1], "11", "--null-tokenizer-eod-id", "9"]
    [text] = inspect(capsys, prefix, *other)["notes"]
    assert "prepared with a tokenizer of fingerprint" in text
    note(prefix, tokens=3, documents=1, eod=9)  # of packed files, which name none
    assert inspect(capsys, prefix, *other)["notes"] == []


def test_sample(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prefix = write(tmp_path / "a", [[1, EOD], [2] * 100 + [EOD]])
    assert inspect(capsys, prefix)["sample"] == {
        "document": 0,
        "length": 2,
        "ids": [[1, EOD]],
        "text": None,
    }
    sample = inspect(capsys, f"{prefix}.bin", "--document", "1", *NULL)["sample"]
    assert [len(part) for part in sample["ids"]] == [64, 16]
    assert sample["text"] == [" ".join(["2"] * 64), " ".join(["2"] * 15 + ["9"])]


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prefix = write(tmp_path / "a", [[1, 2, EOD], [EOD, 3], []])
    assert main(["inspect", prefix, "--seq-length", "4", "--eod-id", str(EOD)]) == 0
    report = capsys.readouterr().out
    for line in (
        "3 documents, 5 tokens (uint16)",
        "documents without tokens: 1",
        "1 of 2 documents do not end in it; the first is document 1",
        "1 more are inside documents, where they look like a document's end; the first is in "
        "document 1",
        "sequences of 4 tokens: 1, 100.0% of them with more than one document, "
        "2.0 documents a sequence",
        "[1, 2, 9]",
        "(give --tokenizer-type and --tokenizer-model to read it)",
    ):
        assert line in report


def test_report_of_little(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", write(tmp_path / "a", [[1, EOD]])]) == 0
    assert "sequences of 8,192 tokens: not one is full" in capsys.readouterr().out
    assert main(["inspect", write(tmp_path / "b", [])]) == 0
    assert "0 documents, 0 tokens" in capsys.readouterr().out
    assert main(["inspect", write(tmp_path / "c", [[], []])]) == 0
    assert "documents without tokens: 2" in capsys.readouterr().out


def test_a_document_of_several_sequences(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with IndexedWriter(tmp_path / "a", "uint16") as writer:
        writer.add_document([1, 2, EOD], [1, 2])
    assert main(["inspect", f"{tmp_path}/a"]) == 0
    assert "2 sequences: documents are split into several" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seq-length", "0"], "--seq-length=0: give 1 or more tokens"),
        (["--document", "1"], "--document=1: there are 1, counted from 0"),
        (["--document", "-1"], "--document=-1: there are 1, counted from 0"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    assert main(["inspect", write(tmp_path / "a", [[1, EOD]]), *flags]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("num_tokens", "num_rows"), [(16, 3), (17, 4), (20, 4), (21, 5)])
def test_row_statistics_by_hand(num_tokens: int, num_rows: int) -> None:
    """A row of 4 takes a fifth token, the label of its last one: 16 tokens are 3 rows."""
    starts = np.array([0, 4, 8, 8, 10, num_tokens])  # one boundary inside a row, at 10
    assert summary.row_statistics(starts, 4) == {
        "seq_length": 4,
        "rows": num_rows,
        "with_several_documents": 1 / num_rows,
        "mean_documents": 1 + 1 / num_rows,
    }
