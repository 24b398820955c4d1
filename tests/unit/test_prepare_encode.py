"""A batch becomes tokens: what is a document, what is a bad line, where the EOD goes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_skyladder.data.encode import EncodedBatch, Encoder
from megatron_skyladder.data.sources import START, Batch
from megatron_skyladder.data.tokenizers import NullTokenizer

TOKENIZER = NullTokenizer(eod=99, vocab_size=100)


class Letters:
    """A tokenizer with a token for each letter, and none for an empty text."""

    eod, vocab_size, identity = 0, 200, b""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode("ascii")) for text in texts]


def encode(
    payload: Any, batch_format: str = "jsonl", tokenizer: Any = None, **options: Any
) -> EncodedBatch:
    keys = options.pop("keys", ["text"])
    first_line = options.pop("first_line", 0)
    encoder = Encoder(
        tokenizer or TOKENIZER, keys, append_eod=True, dtype=np.dtype("u2"), **options
    )
    batch = Batch(batch_format, payload, ["file"], first_line, START, 0)
    return encoder.encode(batch)


def as_lists(encoded: EncodedBatch, key: str = "text") -> list[list[list[int]]]:
    """Return documents as lists of sequences."""
    tokens, lengths, counts = encoded.documents[key]
    sequences = iter(np.split(tokens, np.cumsum(lengths)[:-1])) if len(lengths) else iter(())
    return [[next(sequences).tolist() for _ in range(count)] for count in counts]


def test_documents_end_in_the_eod() -> None:
    assert as_lists(encode(b'{"text": "1 2"}\n{"text": "3"}\n')) == [[[1, 2, 99]], [[3, 99]]]


def test_without_eod() -> None:
    encoder = Encoder(TOKENIZER, ["text"], append_eod=False, dtype=np.dtype("u2"))
    encoded = encoder.encode(Batch("jsonl", b'{"text": "1 2"}', ["file"], 0, START, 0))
    assert as_lists(encoded) == [[[1, 2]]]


def test_a_list_of_strings_is_a_document_of_several_sequences() -> None:
    encoded = encode(b'{"text": ["ab", "", "c", ""]}\n', tokenizer=Letters())
    assert as_lists(encoded) == [[[97, 98], [99, 0]]]  # one eod, after the last that has tokens


def test_a_document_without_tokens_stays_and_gets_no_eod() -> None:
    encoded = encode(b'{"text": ""}\n{"text": []}\n{"text": ["", ""]}', tokenizer=Letters())
    assert as_lists(encoded) == [[], [], []]
    assert not encoded.bad


def test_several_keys_each_with_its_own_tokens() -> None:
    encoded = encode(b'{"a": "1", "b": "2 3"}\n', keys=["a", "b"])
    assert as_lists(encoded, "a") == [[[1, 99]]] and as_lists(encoded, "b") == [[[2, 3, 99]]]


def test_blank_lines_carriage_returns_and_a_byte_order_mark() -> None:
    payload = b'\xef\xbb\xbf{"text": "1"}\r\n\n  \r\n{"text": "2"}'
    encoded = encode(payload)
    assert as_lists(encoded) == [[[1, 99]], [[2, 99]]] and not encoded.bad


def test_a_byte_order_mark_belongs_at_the_beginning_of_the_file() -> None:
    assert len(encode(b'\xef\xbb\xbf{"text": "1"}', first_line=5).bad) == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "1"', "JSONDecodeError: Expecting ',' delimiter"),
        (b'["1"]', "a list where an object is needed"),
        (b'{"id": 7, "url": "u"}', "no key 'text', it has id, url"),
        (b"{}", "no key 'text', it has none"),
        (b'{"text": null}', "'text' is no text but NoneType"),
        (b'{"text": ["1", 2]}', "'text' is no text but int, str"),
        (b'{"text": "\xff"}', "UnicodeDecodeError"),
        (b'{"text": "one"}', "invalid literal for int"),  # from the tokenizer
        (b'{"text": "70000"}', "token 70000 does not fit uint16"),
        (b'{"text": "99999999999999999999"}', "OverflowError"),
        (b'{"text": ' + b"[" * 100_000, "RecursionError"),
    ],
)
def test_a_bad_line_is_named_and_the_others_stay(line: bytes, reason: str) -> None:
    encoded = encode(b'{"text": "1"}\n\n' + line + b'\n{"text": "2"}\n')
    assert as_lists(encoded) == [[[1, 99]], [[2, 99]]]
    assert [item for item, _ in encoded.bad] == [2]
    assert reason in encoded.bad[0].reason
    assert len(encoded.bad[0].reason) < 300


def test_a_text_that_the_rust_tokenizer_refuses() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from megatron_skyladder.data.tokenizers import FastTokenizer

    model = tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")
    fast = FastTokenizer(tokenizers.Tokenizer(model), eod=1, vocab_size=2, special=True)
    encoded = encode(b'{"text": "a"}\n{"text": "\\ud800"}\n{"text": "a"}', tokenizer=fast)
    assert as_lists(encoded) == [[[0, 1]], [[0, 1]]]
    assert encoded.bad[0].item == 1 and "\\ud800" in encoded.bad[0].reason


def test_bad_lines_of_both_kinds_come_in_order() -> None:
    encoded = encode(b'{"text": "x"}\n{\n{"text": "1"}\n{"text": "y"}\n[]\n')
    assert [item for item, _ in encoded.bad] == [0, 1, 3, 4]


def test_with_several_keys_a_bad_one_drops_the_document_from_all() -> None:
    encoded = encode(b'{"a": "1", "b": "x"}\n{"a": "2", "b": "3"}', keys=["a", "b"])
    assert as_lists(encoded, "a") == [[[2, 99]]] and as_lists(encoded, "b") == [[[3, 99]]]


def test_plain_text_files_and_lines() -> None:
    assert as_lists(encode([b"1 2", b"3"], "text")) == [[[1, 2, 99]], [[3, 99]]]
    assert as_lists(encode(b"1 2\n\n3\r\n", "lines")) == [[[1, 2, 99]], [[3, 99]]]
    assert [bad.item for bad in encode([b"1", b"\xff"], "text").bad] == [1]


def test_parquet_rows() -> None:
    encoded = encode([{"text": "1 2"}, {"text": None}, {"text": ["3", "4"]}], "parquet")
    assert as_lists(encoded) == [[[1, 2, 99]], [[3], [4, 99]]]
    assert [bad.item for bad in encoded.bad] == [1]


def test_a_batch_without_documents() -> None:
    assert as_lists(encode(b"\n\n")) == []
