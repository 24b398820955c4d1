"""Tokenizers of another size than the model is for are refused, out and in."""

from __future__ import annotations

import argparse
import json
import logging
from argparse import Namespace
from pathlib import Path

import prepare_inputs as tiny
import pytest
import torch
from random_models import LLAMA, write_model
from trained import VOCAB_SIZE, Runs

from megatron_skyladder.cli import main
from megatron_skyladder.errors import UsageError
from megatron_skyladder.hugging_face.architecture import Architecture
from megatron_skyladder.hugging_face.checkpoints import open_checkpoint
from megatron_skyladder.hugging_face.exporting import export
from megatron_skyladder.hugging_face.importing import import_model
from megatron_skyladder.hugging_face.vocabulary import compare_with_training
from megatron_skyladder.testing import requires_megatron

SAME = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "/data/tokenizer"}
NULL = {"tokenizer_type": "NullTokenizer", "tokenizer_model": None}
IDENTITY = {"normalization_rule_name": "identity"}


def trained(**changes: object) -> Namespace:
    """Return arguments of a run with 4,096 rows."""
    sizes = {"padded_vocab_size": 4096, "make_vocab_size_divisible_by": 128}
    return Namespace(**{**sizes, "tensor_model_parallel_size": 1, **SAME, **changes})


def compare(
    args: Namespace, num_tokens: int, rows: int | None = None, **changes: object
) -> list[str]:
    flags = Namespace(**{**SAME, **changes})
    return compare_with_training(args, flags, num_tokens=num_tokens, rows=rows or num_tokens)


# (changes of the run's arguments, tokens that fit, tokens that do not)
SIZES: list[tuple[dict[str, object], list[int], list[int]]] = [
    ({}, [3969, 4000, 4096], [600, 3968, 4097, 6000]),
    ({"tensor_model_parallel_size": 4}, [3585, 4096], [3584, 4097]),  # multiples of 512
    ({"make_vocab_size_divisible_by": 1}, [4096], [4095, 4097]),
    ({"padded_vocab_size": 4000}, [4000], [3999, 3969, 4001]),  # --padded-vocab-size
    ({**NULL, "vocab_size": 3968}, [3968, 4096], [3967, 600]),  # 0.17 adds a token to that
    ({"vocab_size": 600}, [4096], [600]),  # Megatron does not read it for this tokenizer
]


@pytest.mark.parametrize(("changes", "fitting", "others"), SIZES)
def test_sizes_that_training_can_have_padded(
    changes: dict[str, object], fitting: list[int], others: list[int]
) -> None:
    args = trained(**changes)
    for num_tokens in fitting:
        compare(args, num_tokens)
    for num_tokens in others:
        with pytest.raises(UsageError, match="not the tokenizer of training"):
            compare(args, num_tokens)


def test_both_numbers_are_said() -> None:
    message = (
        r"not the tokenizer of training: HuggingFaceTokenizer /data/tokenizer has 600 tokens, "
        r"which Megatron pads to 640 rows .* padded_vocab_size is 4,096\. Give that one "
        r"\(--tokenizer-type, --tokenizer-model\), or --without-tokenizer .* of the 4,096 to keep"
    )
    with pytest.raises(UsageError, match=message):
        compare(trained(), 600)


@pytest.mark.parametrize("missing", ["padded_vocab_size", "make_vocab_size_divisible_by"])
def test_arguments_without_sizes_refuse_nothing(missing: str) -> None:
    """Bridge's settings, and checkpoints that others converted."""
    args = trained()
    delattr(args, missing)
    assert compare(args, 600) == []
    (note,) = compare(args, 600, tokenizer_model="/other")
    assert note.endswith("does not record to how many rows its vocabulary was padded.")


def test_another_name_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare(trained(), 4000) == []
    (note,) = compare(trained(), 4000, tokenizer_model="/moved")
    assert note == (
        "the tokenizer is HuggingFaceTokenizer /moved; the checkpoint names HuggingFaceTokenizer "
        "/data/tokenizer. Whether both give the same ids was not compared. Its 4,000 tokens fit "
        "the checkpoint's 4,096 rows."
    )
    (note,) = compare(trained(**NULL, vocab_size=4000), 4000)
    assert "the checkpoint names NullTokenizer." in note
    (note,) = compare(trained(tokenizer_type=None, tokenizer_model=None), 4000)
    assert "the checkpoint names none." in note
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path / "tokenizer")
    assert compare(trained(tokenizer_model="./tokenizer"), 4000, tokenizer_model=here) == []


def test_rows_without_tokens_are_the_users_to_keep() -> None:
    """--use-checkpoint-args takes over the rows of the checkpoint that a run starts from."""
    (note,) = compare(trained(), 600, rows=4096)
    assert "600 tokens" in note and "--vocab-size=4096 keeps 4,096 rows" in note
    with pytest.raises(UsageError, match="not the tokenizer of training"):
        compare(trained(), 600, rows=700)  # neither are these the rows of training
    assert compare(trained(), 4000, rows=4096) == []
    with pytest.raises(UsageError, match=r"600 tokens, but --vocab-size=500 keeps fewer rows"):
        compare(trained(padded_vocab_size=512), 600, rows=500)


@requires_megatron
def test_sizes_that_megatron_records(runs: Runs) -> None:
    args = open_checkpoint(runs.checkpoint("qwen3 with bias, wide heads, tp2 dp2")).args
    assert (args.padded_vocab_size, args.tensor_model_parallel_size) == (512, 2)
    for num_tokens in (257, VOCAB_SIZE, 512):
        compare(args, num_tokens)
    for num_tokens in (256, 513):
        with pytest.raises(UsageError, match="padded_vocab_size is 512"):
            compare(args, num_tokens)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return one of 700 tokens, stored as 768 rows."""
    source = write_model(tmp_path / "hf", Architecture(**{**vars(LLAMA), "vocab_size": 700}))
    return import_model(source, tmp_path / "megatron").folder


def test_an_export_with_another_tokenizer_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.make_sentencepiece(tmp_path / "tokenizer.model", **IDENTITY)  # 330 tokens
    flags = ["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", str(model)]
    command = ["export-hf", str(checkpoint), str(tmp_path / "out"), *flags]
    for without in ([], ["--without-tokenizer"]):  # rows are counted by it all the same
        assert main([*command, *without]) == 1
        error = capsys.readouterr().err
        assert "330 tokens, which Megatron pads to 384 rows" in error
        assert "padded_vocab_size is 768" in error
    assert not list(tmp_path.glob("out*"))
    assert main([*command, "--vocab-size", "700"]) == 0
    assert "--vocab-size=700 keeps 700 rows" in capsys.readouterr().err


def test_a_recorded_name_that_leads_elsewhere_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint / "release" / "common.pt"
    state = torch.load(path, weights_only=False)
    state["args"].tokenizer_model = "tokenizer"
    torch.save(state, path)
    elsewhere = tiny.make_hf_folder(tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"HuggingFaceTokenizer {elsewhere} has 300 tokens"):
        export(checkpoint, tmp_path / "out")


def test_what_was_compared_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("transformers")
    source = write_model(tmp_path / "hf", LLAMA)
    checkpoint = import_model(source, tmp_path / "megatron").folder
    moved = tiny.make_hf_folder(tmp_path / "moved")
    given = argparse.Namespace(tokenizer_type=None, tokenizer_model=str(moved))
    with caplog.at_level(logging.INFO):
        done = export(checkpoint, tmp_path / "out", tokenizer=given)
    assert "sample texts get the ids of Megatron's tokenizer of the same flags" in caplog.text
    assert len(done.notes) == 1
    assert done.notes[0].startswith(f"the tokenizer is HuggingFaceTokenizer {moved}; ")
    assert done.notes[0].endswith("Its 300 tokens fit the checkpoint's 384 rows.")


def folder_of(path: Path, rows: int, **settings: object) -> Path:
    """Write a model of so many rows, and a tokenizer of 300 tokens and what the settings add."""
    source = write_model(path, Architecture(**{**vars(LLAMA), "vocab_size": rows}))
    return tiny.make_hf_folder(source, **settings)


@pytest.mark.parametrize(
    ("rows", "settings", "num_tokens"),
    [
        (256, {}, 300),  # Megatron would make 384 rows, of which the checkpoint has 256
        (299, {}, 300),  # of padding: no token had them
        (300, {"pad_token": "<pad>"}, 301),  # added by transformers, not in tokenizer.json
    ],
)
def test_tokens_without_rows_are_refused(
    tmp_path: Path, rows: int, settings: dict[str, object], num_tokens: int
) -> None:
    transformers = pytest.importorskip("transformers")
    source = folder_of(tmp_path / "hf", rows, **settings)
    message = f"has {num_tokens} tokens, but .* {rows} rows: .*resize_token_embeddings"
    with pytest.raises(UsageError, match=message):
        import_model(source, tmp_path / "megatron")
    assert not list(tmp_path.glob("megatron*"))
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(num_tokens)
    model.save_pretrained(source)
    assert import_model(source, tmp_path / "megatron").model.vocab_size == num_tokens


def test_tokens_added_to_a_sentencepiece_model_are_counted(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = write_model(tmp_path / "hf", LLAMA)
    tiny.make_sentencepiece(source / "tokenizer.model", **IDENTITY)  # 330, as the model
    import_model(source, tmp_path / "megatron")
    (source / "added_tokens.json").write_text(json.dumps({"<pad>": 330}))
    with pytest.raises(UsageError, match=r"has 331 tokens, but .* 330 rows"):
        import_model(source, tmp_path / "other")


def test_a_tokenizer_that_cannot_be_loaded_is_noted(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "hf", 300)
    config = {"auto_map": {"AutoTokenizer": ["own.Slow", "own.Fast"]}, "tokenizer_class": "Own"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    done = import_model(source, tmp_path / "megatron")
    assert "tokens were counted in tokenizer.json alone (" in done.notes[-1]
    (source / "tokenizer.json").unlink()
    done = import_model(source, tmp_path / "other")
    assert "tokens were not counted (" in done.notes[-1]
    assert "more than the model's 300 rows" in done.notes[-1]
