"""Byte for byte what Megatron's tools/preprocess_data.py --append-eod writes.

Needs a checkout of Megatron-LM 0.19 and what its tool imports:
SKYLADDER_MEGATRON_CHECKOUT=/path/to/Megatron-LM pytest tests/unit/test_prepare_megatron.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import prepare_inputs as tiny
import pytest

from megatron_skyladder.cli import main

CHECKOUT = os.environ.get("SKYLADDER_MEGATRON_CHECKOUT")
pytestmark = pytest.mark.skipif(
    not CHECKOUT, reason="SKYLADDER_MEGATRON_CHECKOUT names no Megatron-LM checkout"
)


def hugging_face(folder: Path) -> list[str]:
    model = tiny.make_hf_folder(folder / "hf", bos=True)
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(model)]


def hugging_face_without_bos(folder: Path) -> list[str]:
    return [*hugging_face(folder), "--tokenizer-hf-no-include-special-tokens"]


def llama(folder: Path) -> list[str]:
    """The Llama class of transformers on a SentencePiece model, as Llama-2's folder has it."""
    (folder / "llama").mkdir()
    tiny.make_sentencepiece(folder / "llama" / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "llama" / "tokenizer_config.json").write_text(json.dumps(config))
    model = str(folder / "llama")
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", model]


def llama2(folder: Path) -> list[str]:
    model = tiny.make_sentencepiece(folder / "tokenizer.model")
    return ["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", str(model)]


def sentencepiece(folder: Path) -> list[str]:
    model = tiny.make_sentencepiece(folder / "tokenizer.model", remove_extra_whitespaces=True)
    return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]


def tiktoken(folder: Path) -> list[str]:
    model, size = tiny.make_tiktoken(folder / "tik.json")
    flags = ["--tokenizer-type", "TikTokenizer", "--tokenizer-model", str(model)]
    return [*flags, "--vocab-size", str(size)]


MAKERS = (hugging_face, hugging_face_without_bos, llama, llama2, sentencepiece, tiktoken)


def preprocess(path: Path, prefix: Path, flags: list[str]) -> None:
    """Run Megatron's tool."""
    tool = f"{CHECKOUT}/tools/preprocess_data.py"
    command = [sys.executable, tool, "--input", str(path), "--output-prefix", str(prefix)]
    subprocess.run([*command, "--workers", "2", "--append-eod", *flags], check=True)


def compare(path: Path, flags: list[str], keys: tuple[str, ...] = ("text",)) -> None:
    ours, theirs = path.parent / "ours", path.parent / "theirs"
    arguments = ["--input", str(path), "--output-prefix", str(ours), "--workers", "2"]
    assert main(["prepare", *arguments, *flags]) == 0
    preprocess(path, theirs, flags)
    for key in keys:
        for part in ("bin", "idx"):
            name = f"{key}_document.{part}"
            assert Path(f"{ours}_{name}").read_bytes() == Path(f"{theirs}_{name}").read_bytes()


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_same_bytes(tmp_path: Path, make: Callable[[Path], list[str]]) -> None:
    texts = tiny.make_texts(400, seed=7)
    texts.insert(3, ["a list", "", "of sentences"])  # type: ignore[arg-type]
    compare(tiny.write_json_lines(tmp_path / "a.jsonl", texts), make(tmp_path))


def test_same_bytes_for_several_keys_and_large_vocabularies(tmp_path: Path) -> None:
    lines = [json.dumps({"a": f"{i} {i + 70000}", "b": f"{i}"}) + "\r\n" for i in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(lines), newline="")
    flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100000"]
    compare(tmp_path / "a.jsonl", [*flags, "--json-keys", "a", "b"], ("a", "b"))
