"""What tokens see in packed documents, against fragments row by row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_skyladder.data.indexed import IndexedReader, IndexedWriter
from megatron_skyladder.ladder.fragments import fragment_cu_seqlens, visible_pairs, window_pairs
from megatron_skyladder.planning import visible_context
from megatron_skyladder.planning.visible_context import PackedRows, measure, pack

EOD = 2


def row_offsets(rows: PackedRows, row: int, window_len: int) -> np.ndarray:
    """Return cu_seqlens of one of the rows."""
    first = np.flatnonzero(rows.starts == 0)
    pieces = slice(first[row], first[row + 1] if row + 1 < first.size else None)
    return fragment_cu_seqlens(rows.ends[pieces], seq_length=rows.seq_length, window_len=window_len)


def test_packing_by_hand() -> None:
    """Documents of 3, 4 and 5 tokens in rows of 5: aaabb bbccc, then over again ccaaa."""
    rows = pack(np.array([3, 4, 5]), seq_length=5, num_rows=3)
    assert rows.starts.tolist() == [0, 3, 0, 2, 0, 2]
    assert rows.ends.tolist() == [3, 5, 2, 5, 2, 5]
    assert rows.num_rows == 3


def test_empty_documents_take_no_room() -> None:
    assert pack(np.array([0, 5, 0]), 5, 2).ends.tolist() == [5, 5]


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=30),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 40),
)
def test_pairs_are_those_of_the_fragments(
    lengths: list[int], seq_length: int, num_rows: int, window_len: int
) -> None:
    window_len = min(window_len, seq_length)
    rows = pack(np.array(lengths), seq_length, num_rows)
    cut = sum(visible_pairs(row_offsets(rows, row, window_len)) for row in range(num_rows))
    assert rows.pairs(window_len) == pytest.approx(cut / num_rows)
    slid = sum(
        visible_pairs(row_offsets(rows, row, seq_length), window_len=window_len)
        for row in range(num_rows)
    )
    assert rows.pairs(window_len, sliding=True) == pytest.approx(slid / num_rows)


def test_rows_of_one_document_are_rows_without_documents() -> None:
    rows = pack(np.array([10_000]), 100, 10)
    for window_len in (1, 7, 50, 99, 100):
        assert rows.pairs(window_len) == window_pairs(window_len, 100)


def test_many_windows_are_interpolated_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pack(np.random.default_rng(0).integers(1, 3000, 500), 2048, 50)
    monkeypatch.setattr(visible_context, "MAX_WINDOWS", 64)
    pairs = rows.pairs_by_window(range(1, 2049))
    assert pairs(1) == rows.pairs(1) and pairs(2048) == rows.pairs(2048)
    mean = sum(pairs(window) for window in range(1, 2049)) / 2048
    exact = sum(rows.pairs(window) for window in range(1, 2049)) / 2048
    assert mean == pytest.approx(exact, rel=0.01)


def test_quantiles_of_the_context_by_hand() -> None:
    """Pieces of 1, 3 and 4 tokens: tokens see 1 | 1 2 3 | 1 2 3 4, in order 1 1 1 2 2 3 3 4."""
    rows = PackedRows(np.array([0, 1, 4]), np.array([1, 4, 8]), 1, 8)
    expected = {0.1: 1, 3 / 8: 1, 0.4: 2, 5 / 8: 2, 0.7: 3, 7 / 8: 3, 0.9: 4, 1.0: 4}
    assert {share: rows.context_quantile(share) for share in expected} == expected


# --- files --------------------------------------------------------------------------------------


def write(prefix: Path, lengths: list[int], *, last: int | None = EOD) -> str:
    with IndexedWriter(prefix, "<u2") as writer:
        for index, length in enumerate(lengths):
            tokens = np.full(length, 7 + index % 50)
            if last is not None and length:
                tokens[-1] = last
            writer.add_document(tokens)
    return str(prefix)


def test_measuring_a_data_set(tmp_path: Path) -> None:
    found = measure([write(tmp_path / "docs", [10, 20, 30, 40])], 16)
    assert (found.num_documents, found.num_tokens) == (4, 100)
    assert found.lengths.tolist() == [10, 20, 30, 40] and found.longest == 40
    assert found.rows.num_rows == visible_context.SAMPLE_ROWS
    assert found.same_end


def test_the_sample_is_the_same_every_time(tmp_path: Path) -> None:
    prefix = write(tmp_path / "docs", list(range(1, 200)))
    assert measure([prefix], 64).rows.pairs(16) == measure([prefix], 64).rows.pairs(16)


@pytest.mark.parametrize(
    ("words", "share_of_short"),
    [("{short} {long}", 0.25), ("3 {short} 1 {long}", 0.75), ("0.5 {short} 0.5 {long}", 0.5)],
)
def test_blends_have_rows_by_weight(tmp_path: Path, words: str, share_of_short: float) -> None:
    """Rows of 8: documents of 4 give 20 pairs, documents of 8 give 36. By size it is 1 to 3."""
    short = write(tmp_path / "short", [4] * 200)
    long = write(tmp_path / "long", [8] * 300)
    found = measure(words.format(short=short, long=long).split(), 8)
    expected = share_of_short * 20 + (1 - share_of_short) * 36
    assert found.rows.pairs(8) == pytest.approx(expected, abs=0.02)


def test_documents_without_an_end_are_noticed(tmp_path: Path) -> None:
    assert not measure([write(tmp_path / "docs", [10] * 20, last=None)], 16).same_end


@pytest.mark.parametrize(("num_files", "of_each"), [(1, 20), (2, 10), (20, 8)])
def test_the_documents_whose_ends_are_looked_at_are_shared_over_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_files: int, of_each: int
) -> None:
    """Each is a read from somewhere in a file: of thousands of files it would be millions."""
    monkeypatch.setattr(visible_context, "LAST_TOKENS", 20, raising=False)
    asked: list[int] = []

    class Counted(IndexedReader):
        def __getitem__(self, document: int) -> np.ndarray:
            asked.append(document)
            return super().__getitem__(document)

    monkeypatch.setattr(visible_context, "IndexedReader", Counted)
    prefix = write(tmp_path / "docs", [4] * 100)
    assert measure([prefix] * num_files, 16).same_end
    assert len(asked) == num_files * of_each * 2  # whether it is empty, and its last
    assert {0, 99} <= set(asked)


def test_lengths_are_computed_once_for_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []

    class Counted(IndexedReader):
        @property
        def document_lengths(self) -> np.ndarray:
            computed.append(self.prefix)
            return super().document_lengths

    monkeypatch.setattr(visible_context, "IndexedReader", Counted)
    files = [write(tmp_path / name, [4, 60, 9]) for name in ("a", "b")]
    assert measure(files, 16).longest == 60
    assert computed == files


def test_huge_data_sets_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visible_context, "SAMPLE_DOCUMENTS", 50)
    found = measure([write(tmp_path / "docs", [8] * 500)], 8)
    assert found.num_documents == 500
    assert found.lengths.size == 50
    assert found.rows.pairs(8) == 36


def test_the_longest_document_is_that_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample of one document leaves out most, the longest of them among these."""
    monkeypatch.setattr(visible_context, "SAMPLE_DOCUMENTS", 1)
    first, second = ([8] * 50 + [longest] + [8] * 50 for longest in (60, 90))
    found = measure([write(tmp_path / "a", first), write(tmp_path / "b", second)], 8)
    assert found.lengths.tolist() == [8, 8] and found.longest == 90


@pytest.mark.parametrize("words", ["1 {docs} 2", "0 {docs} 1 {docs}", "-1 {docs}"])
def test_weights_that_are_none_are_refused(tmp_path: Path, words: str) -> None:
    prefix = write(tmp_path / "docs", [8])
    with pytest.raises(ValueError, match=r"is not a list of weight and prefix\. Give PREFIX"):
        measure(words.format(docs=prefix).split(), 8)


def test_a_data_set_without_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no tokens"):
        measure([write(tmp_path / "docs", [])], 8)


def test_a_missing_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist\. Give the path without \.bin or \.idx"):
        measure([str(tmp_path / "nothing")], 8)
