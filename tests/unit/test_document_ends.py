"""Whether a pair's documents end in a token, from a few reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_skyladder.data import document_ends
from megatron_skyladder.data.indexed import IndexedWriter, last_tokens

EOD = 9


def write(prefix: Path, ends: list[int | None], *, sequences: int = 1) -> str:
    """Write documents of two tokens in each sequence that end as said; None: an empty one."""
    with IndexedWriter(prefix, np.uint16) as writer:
        for end in ends:
            if end is None:
                writer.add_document([])
                continue
            tokens = [1, EOD] * (sequences - 1) + [1, end]
            writer.add_document(tokens, [2] * sequences)
    return str(prefix)


def record(prefix: str, *, documents: int = 2, **settings: object) -> None:
    """Write the record of a pair of documents of two tokens."""
    noted = {"settings": {"dtype": "uint16", **settings}, "tokens": 4, "documents": documents}
    Path(f"{prefix}.prepared").write_text(json.dumps(noted))


def complaint(prefix: str) -> str | None:
    found = document_ends.complaints([prefix], EOD)
    assert [name for name, _ in found] in ([], [prefix])
    return found[0][1] if found else None


@pytest.mark.parametrize("sequences", [1, 3])
def test_last_tokens_of_documents_not_of_their_sequences(tmp_path: Path, sequences: int) -> None:
    prefix = write(tmp_path / "a", [2, None, 3, 4, None], sequences=sequences)
    assert last_tokens(prefix, 100).tolist() == [2, 3, 4]
    assert last_tokens(prefix, 2).tolist() == [2]  # the first, and the last, which is empty
    assert last_tokens(write(tmp_path / "none", []), 10).tolist() == []


@pytest.mark.parametrize(
    ("ends", "wanted"),
    [
        ([EOD] * 4, None),
        ([EOD, EOD, 3, 4], None),  # half: cut up documents have it only at their end
        ([EOD, 3, 4, 5], "1 of 4 sampled documents end in it; they were written without an end-of-"
         "document token"),
        ([7, 7, 7, 4], "0 of 4 sampled documents end in it; 3 end in 7"),
        ([], None),
        ([None, None], None),
    ],
)  # fmt: skip
def test_what_is_wrong(tmp_path: Path, ends: list[int | None], wanted: str | None) -> None:
    assert complaint(write(tmp_path / "a", ends)) == wanted


def test_what_prepare_noted_comes_first(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [EOD, EOD])
    record(prefix, eod=7, append_eod=True)
    assert complaint(prefix) == "prepared with the end-of-document token 7"
    record(prefix, eod=7)  # of packed files
    assert complaint(prefix) == "prepared with the end-of-document token 7"
    record(prefix, eod=7, append_eod=False)  # it appended none: the texts may have had theirs
    assert complaint(prefix) is None
    record(prefix, eod=EOD, append_eod=True)
    assert complaint(prefix) is None


def test_the_record_of_another_pair_is_not_believed(tmp_path: Path) -> None:
    """The documents of the pair that is there decide, whichever token the record names."""
    fine, wrong = write(tmp_path / "a", [EOD, EOD]), write(tmp_path / "b", [7, 7])
    record(fine, documents=3, eod=7, append_eod=True)
    assert complaint(fine) is None
    record(wrong, documents=3, eod=EOD, append_eod=True)
    assert complaint(wrong) == "0 of 2 sampled documents end in it; 2 end in 7"
    record(wrong, documents=3, eod=8, append_eod=True)
    assert complaint(wrong) == "0 of 2 sampled documents end in it; 2 end in 7"


def test_what_cannot_be_read_is_left_to_the_trainer(tmp_path: Path) -> None:
    assert complaint("s3://bucket/data") is None
    prefix = write(tmp_path / "a", [7, 7])
    data = Path(f"{prefix}.bin")
    data.write_bytes(data.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"a\.bin has 3 tokens, but its index goes on to token 3"):
        last_tokens(prefix, 10)
    assert complaint(prefix) is None
    Path(f"{prefix}.prepared").write_text("{")
    assert complaint(prefix) is None


def test_each_pair_of_a_blend_is_looked_at_once(tmp_path: Path) -> None:
    fine, wrong = write(tmp_path / "a", [EOD] * 3), write(tmp_path / "b", [7] * 3)
    found = document_ends.complaints([fine, wrong, wrong], EOD)
    assert found == [(wrong, "0 of 3 sampled documents end in it; 3 end in 7")]
