"""Megatron's .bin/.idx: byte-identical to Megatron's builder, and safe to kill and resume."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_skyladder.data import indexed
from megatron_skyladder.data.indexed import (
    IndexedReader,
    IndexedWriter,
    WriterPosition,
    best_dtype,
    count_empty,
    fit_tokens,
    read_counts,
)

# documents as lists of sequences: an empty one, several sequences, the largest uint16
DOCUMENTS = [[[5, 6, 7]], [], [[1], [2, 3]], [[65535]], []]


def write(prefix: Path, documents: list[list[list[int]]], dtype: str = "uint16") -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for sequences in documents:
            tokens = [token for sequence in sequences for token in sequence]
            writer.add_document(tokens, [len(sequence) for sequence in sequences])


def both(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def test_index_bytes_by_hand(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[5, 6]], [], [[1], [2]]])
    data, index = both(tmp_path / "a")
    assert data == struct.pack("<4H", 5, 6, 1, 2)
    assert index == b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4) + struct.pack(
        "<3i3q4q",
        *(2, 1, 1),  # lengths
        *(0, 4, 6),  # byte offsets
        *(0, 1, 1, 3),  # documents' first sequences
    )


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint8", "int64"])
def test_same_bytes_as_megatron(tmp_path: Path, dtype: str) -> None:
    builder_module = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    documents = DOCUMENTS if dtype != "uint8" else [[[1, 2]], [], [[3], [255]]]
    builder = builder_module.IndexedDatasetBuilder(
        f"{tmp_path}/theirs.bin", dtype=getattr(np, dtype)
    )
    for sequences in documents:
        tokens = [token for sequence in sequences for token in sequence]
        builder.add_document(tokens, [len(sequence) for sequence in sequences])
    builder.finalize(f"{tmp_path}/theirs.idx")
    write(tmp_path / "ours", documents, dtype)
    assert both(tmp_path / "ours") == both(tmp_path / "theirs")


def test_megatron_reads_it(tmp_path: Path) -> None:
    module = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    write(tmp_path / "a", DOCUMENTS)
    theirs, ours = module.IndexedDataset(f"{tmp_path}/a"), IndexedReader(tmp_path / "a")
    assert theirs.document_indices.tolist() == ours.document_indices.tolist() == [0, 1, 1, 3, 4, 4]
    assert [theirs[i].tolist() for i in range(len(theirs))] == [[5, 6, 7], [1], [2, 3], [65535]]


@settings(deadline=None)
@given(
    st.lists(st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=5), max_size=3)),
    st.integers(1, 4),
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list, chunk: int) -> None:
    prefix = tmp_path_factory.mktemp("round") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed, "CHUNK", chunk)  # so that the index is written in several pieces
        write(prefix, documents)
        assert count_empty(prefix) == documents.count([])
    write(prefix.with_name("in_one"), documents)
    assert both(prefix) == both(prefix.with_name("in_one"))
    reader = IndexedReader(prefix)
    flat = [[token for sequence in sequences for token in sequence] for sequences in documents]
    assert [reader[i].tolist() for i in range(len(reader))] == flat
    assert reader.document_lengths.tolist() == [len(tokens) for tokens in flat]
    assert reader.sequence_lengths.tolist() == [len(s) for d in documents for s in d]
    assert reader.tokens.tolist() == [token for tokens in flat for token in tokens]
    assert read_counts(prefix) == (reader.num_tokens, len(reader), reader.dtype)


def test_where_each_document_is_one_sequence_nothing_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of `skyladder prepare`; there may be billions."""
    monkeypatch.setattr(indexed, "CHUNK", 1000)
    with IndexedWriter(tmp_path / "a", "uint16") as writer:
        for _ in range(20_000):
            writer.add_document([1, 2])
    tracemalloc.start()
    try:
        reader = IndexedReader(tmp_path / "a")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert reader.document_starts.tolist() == list(range(0, 40_001, 2))
    assert peak < 1.5 * 8 * 20_000  # one int64 for each


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_as_many_sequences_as_documents_are_not_one_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """An empty document beside one of two sequences."""
    write(tmp_path / "a", [[[1]], [], [[2, 3], [4]], [[5]]])
    monkeypatch.setattr(indexed, "CHUNK", chunk)
    reader = IndexedReader(tmp_path / "a")
    assert [reader[i].tolist() for i in range(len(reader))] == [[1], [], [2, 3, 4], [5]]


def test_nothing_has_its_name_before_the_end(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "a", "uint16")
    writer.add_document([1, 2])
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.idx"))
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_an_error_keeps_the_partial_files(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "a", "uint16") as writer:
        writer.add_document([1, 2])
        raise RuntimeError
    assert not (tmp_path / "a.idx").exists() and (tmp_path / "a.bin.partial").exists()


def test_resume_cuts_off_what_came_after_the_position(tmp_path: Path) -> None:
    write(tmp_path / "straight", DOCUMENTS)
    writer = IndexedWriter(tmp_path / "a", "uint16")
    writer.add_document([5, 6, 7])
    writer.add_document([])
    position = writer.flush()
    assert position == WriterPosition(num_tokens=3, num_sequences=1, num_documents=2)
    for _ in range(9):  # more than what is written in its place
        writer.add_document([9, 9, 9, 9])
    writer.abandon()
    with IndexedWriter(tmp_path / "a", "uint16", resume_at=position) as writer:
        writer.add_document([1, 2, 3], [1, 2])
        writer.add_document([65535])
        writer.add_document([])
    assert both(tmp_path / "a") == both(tmp_path / "straight")


def test_resume_after_a_kill_between_the_two_renames(tmp_path: Path) -> None:
    write(tmp_path / "straight", DOCUMENTS)
    writer = IndexedWriter(tmp_path / "a", "uint16")
    for sequences in DOCUMENTS:
        writer.add_document([t for s in sequences for t in s], [len(s) for s in sequences])
    position = writer.flush()
    writer.abandon()
    os.replace(tmp_path / "a.bin.partial", tmp_path / "a.bin")
    IndexedWriter(tmp_path / "a", "uint16", resume_at=position).close()
    assert both(tmp_path / "a") == both(tmp_path / "straight")


def test_resume_refuses_files_that_shrank(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "a", "uint16")
    writer.add_document([1, 2, 3])
    position = writer.flush()
    writer.abandon()
    os.truncate(tmp_path / "a.bin.partial", 4)
    with pytest.raises(ValueError, match=r"a\.bin\.partial has 4 bytes, but 6 had been written"):
        IndexedWriter(tmp_path / "a", "uint16", resume_at=position)


@pytest.mark.parametrize(
    ("vocab_size", "expected"), [(1, "uint16"), (65499, "uint16"), (65500, "int32")]
)
def test_best_dtype(vocab_size: int, expected: str) -> None:
    assert best_dtype(vocab_size).name == expected


def test_best_dtype_is_megatrons() -> None:
    module = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    for size in (1, 65499, 65500, 65536, 200000):
        assert best_dtype(size) == np.dtype(module.DType.optimal_dtype(size))


@pytest.mark.parametrize("token", [-1, 65536])
def test_tokens_that_do_not_fit(tmp_path: Path, token: int) -> None:
    with pytest.raises(ValueError, match=f"token {token} does not fit uint16"):
        fit_tokens(np.array([3, token]), np.dtype("uint16"))


def test_float_is_no_token_type_of_a_writer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float16 is no token type"):
        IndexedWriter(tmp_path / "a", "float16")


def test_reader_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.idx does not exist"):
        IndexedReader(tmp_path / "a")
    write(tmp_path / "a", DOCUMENTS)
    good = (tmp_path / "a.idx").read_bytes()
    for damaged, message in (
        (b"NOTMAGIC" + good[8:], "does not start with MMIDIDX"),
        (good[:20], "does not start with MMIDIDX"),
        (good[:9] + b"\x02" + good[10:], "version 2"),
        (good[:17] + b"\x09" + good[18:], "token type 9"),
        (good[:-1], "was cut off"),
    ):
        (tmp_path / "a.idx").write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            IndexedReader(tmp_path / "a")
    (tmp_path / "a.idx").write_bytes(good)
    os.truncate(tmp_path / "a.bin", 10)
    with pytest.raises(ValueError, match=r"a\.bin has 10 bytes, but its index stands for 14"):
        IndexedReader(tmp_path / "a")


def test_reader_refuses_a_document_beyond_the_end(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    with pytest.raises(IndexError, match="document 5 of 5"):
        IndexedReader(tmp_path / "a")[5]
