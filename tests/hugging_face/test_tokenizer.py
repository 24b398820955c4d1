"""Converted tokenizers give the ids of training, or nothing is written."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import prepare_inputs as tiny
import pytest
from random_models import LLAMA, write_model
from trained import VOCAB_SIZE

from megatron_skyladder.data import tokenizer_flags
from megatron_skyladder.hugging_face import checking, tokenizer
from megatron_skyladder.hugging_face.architecture import Architecture, hugging_face_config
from megatron_skyladder.hugging_face.exporting import export, tokenizer_arguments
from megatron_skyladder.hugging_face.importing import import_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

CONFIG = hugging_face_config(LLAMA, "float32")
IDENTITY = {"normalization_rule_name": "identity"}  # as Llama's


def flags(kind: str, model: Path, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tokenizer_flags.add_arguments(parser)
    return parser.parse_args(["--tokenizer-type", kind, "--tokenizer-model", str(model), *words])


def convert(kind: str, model: Path, *words: str) -> tokenizer.Tokenizer:
    return tokenizer.convert(flags(kind, model, *words), CONFIG, 64)


def load(converted: tokenizer.Tokenizer, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    for name, content in {**converted.files, "config.json": json.dumps(CONFIG)}.items():
        (folder / name).write_text(content)
    return transformers.AutoTokenizer.from_pretrained(folder, model_max_length=10**9)


def many_texts() -> list[str]:
    """Return other texts than those of the check: mixtures of letters, signs and spaces."""
    chance = random.Random(5)
    alphabet = "abc thé  \n\t_.,(){}0123日本é🙂Яß'\"\\/-#@\u00a0\u200b"
    lengths = [chance.randint(1, 80) for _ in range(500)]
    return tiny.make_texts(300, seed=9) + ["".join(chance.choices(alphabet, k=k)) for k in lengths]


SENTENCEPIECE = {
    "llama": IDENTITY,
    "characters normalized": {},
    "spaces removed": {"remove_extra_whitespaces": True, **IDENTITY},
    "no space in front": {"add_dummy_prefix": False, **IDENTITY},
    "digits split": {"split_digits": True, **IDENTITY},
    "no bytes": {"byte_fallback": False, "vocab_size": 80, **IDENTITY},
    "other ids": {"unk_id": 3, "bos_id": 0, "eos_id": 1, **IDENTITY},
    "padding": {"pad_id": 3, **IDENTITY},
    "unigram": {"model_type": "unigram", "hard_vocab_limit": False, **IDENTITY},
    "symbols": {"add_dummy_prefix": False, "user_defined_symbols": ["[X]", "cat"], **IDENTITY},
}


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece(tmp_path: Path, name: str) -> None:
    from sentencepiece import SentencePieceProcessor

    options = {"model_type": "bpe", **SENTENCEPIECE[name]}
    model = tiny.make_sentencepiece(tmp_path / "tokenizer.model", **options)
    converted = convert("Llama2Tokenizer", model)
    reference = SentencePieceProcessor(model_file=str(model))
    loaded = load(converted, tmp_path / "hf")
    special = [text for text in many_texts() if "<s>" not in text and "</s>" not in text]
    for text in special:
        expected = reference.encode(text)
        assert loaded(text).input_ids == expected, text
        if name not in ("spaces removed", "characters normalized", "no bytes"):
            assert loaded.decode(expected) == reference.decode(expected), text
    assert converted.vocab_size == reference.get_piece_size() == len(loaded)
    ids = (converted.bos, converted.eos, converted.pad)
    pad = reference.pad_id()
    assert ids == (reference.bos_id(), reference.eos_id(), None if pad < 0 else pad)
    assert (loaded.bos_token_id, loaded.eos_token_id) == ids[:2]


def test_no_token_is_put_in_front(tmp_path: Path) -> None:
    """Training documents had none; transformers 4's Llama tokenizer would add one."""
    model = tiny.make_sentencepiece(tmp_path / "tokenizer.model", **IDENTITY)
    converted = convert("SentencePieceTokenizer", model)
    settings = json.loads(converted.files["tokenizer_config.json"])
    assert settings["add_bos_token"] is False
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert load(converted, tmp_path / "hf")("the cat").input_ids[0] != converted.bos


def test_a_bare_model_file_would_be_another_tokenizer(tmp_path: Path) -> None:
    """Why the model is rebuilt: transformers reads it without an error, and wrongly.

    Up to 5.23 also a model that leaves characters as they are (`IDENTITY`).
    """
    model = tiny.make_sentencepiece(tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    bare = transformers.AutoTokenizer.from_pretrained(tmp_path, model_max_length=10**9)
    reference = tokenizer_flags.build_tokenizer(flags("Llama2Tokenizer", model))
    texts = tokenizer.sample_texts()
    found = [bare(text, add_special_tokens=False).input_ids for text in texts]
    assert found != reference.encode_batch(texts)


@pytest.mark.parametrize(
    "step",
    ["_sentencepiece_normalizer", "_merges", "bos in front", "other end"],
)
def test_a_conversion_that_is_wrong_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    from tokenizers import normalizers, processors

    original = tokenizer._from_sentencepiece

    def bos_in_front(reference):
        backend, settings = original(reference)
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        return backend, {k: v for k, v in settings.items() if not k.startswith("add_")}

    def other_end(reference):
        backend, settings = original(reference)
        return backend, {**settings, "eos_token": "<s>"}

    wrong: dict[str, tuple[str, Any]] = {
        "_sentencepiece_normalizer": (step, lambda spec: normalizers.Replace(" ", "▁")),
        "_merges": (step, lambda proto: []),
        "bos in front": ("_from_sentencepiece", bos_in_front),
        "other end": ("_from_sentencepiece", other_end),
    }
    model = tiny.make_sentencepiece(tmp_path / "tokenizer.model", **IDENTITY)
    monkeypatch.setattr(tokenizer, *wrong[step])
    with pytest.raises(ValueError, match=r"sample texts otherwise|ends documents with"):
        convert("Llama2Tokenizer", model)


def test_symbols_within_texts_are_part_of_the_check(tmp_path: Path) -> None:
    """SentencePiece puts one space in front of the text, transformers one after every symbol."""
    options = {"user_defined_symbols": ["[X]"], **IDENTITY}
    model = tiny.make_sentencepiece(tmp_path / "tokenizer.model", **options)
    with pytest.raises(ValueError, match=r"the first is 'see \[X\] there'"):
        convert("Llama2Tokenizer", model)


def test_words_and_characters_cannot_be_converted(tmp_path: Path) -> None:
    model = tiny.make_sentencepiece(
        tmp_path / "tokenizer.model",
        model_type="char",
        hard_vocab_limit=False,
        byte_fallback=False,
        vocab_size=60,
    )
    with pytest.raises(ValueError, match="BPE and unigram can be converted"):
        convert("SentencePieceTokenizer", model)


@pytest.mark.parametrize("words", [(), ("--tokenizer-hf-no-include-special-tokens",)])
@pytest.mark.parametrize("bos", [False, True])
def test_hugging_face_folder(tmp_path: Path, bos: bool, words: tuple[str, ...]) -> None:
    settings = {"bos_token": "<s>", "chat_template": "{{ messages }}", "pad_token": "<s>"}
    folder = tiny.make_hf_folder(tmp_path / "source", bos=bos, **settings)
    converted = convert("HuggingFaceTokenizer", folder, *words)
    reference = tokenizer_flags.build_tokenizer(flags("HuggingFaceTokenizer", folder, *words))
    loaded = load(converted, tmp_path / "hf")
    texts = many_texts()
    assert [loaded(text).input_ids for text in texts] == reference.encode_batch(texts)
    assert (loaded("the").input_ids[0] == 0) == (bos and not words)
    assert (converted.bos, converted.eos, converted.pad) == (0, 1, 0)
    assert loaded.chat_template == "{{ messages }}"


def test_a_single_file_is_a_folder_too(tmp_path: Path) -> None:
    folder = tiny.make_hf_folder(tmp_path / "source")
    assert convert("HuggingFaceTokenizer", folder / "tokenizer.json").eos == 1


def test_tiktoken(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    model, size = tiny.make_tiktoken(tmp_path / "vocab.json")
    converted = convert("TikTokenizer", model, "--vocab-size", str(size))
    words = ("--vocab-size", str(size))
    reference = tokenizer_flags.build_tokenizer(flags("TikTokenizer", model, *words))
    loaded = load(converted, tmp_path / "hf")
    for text in many_texts():
        assert [loaded(text).input_ids] == reference.encode_batch([text]), text
    assert converted.vocab_size == len(loaded) == size


def test_numbers_are_no_texts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"NullTokenizer has no texts.*--without-tokenizer"):
        convert("NullTokenizer", tmp_path, "--vocab-size", "9")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return import_model(write_model(tmp_path / "model", LLAMA), tmp_path / "megatron").folder


def named(kind: str, path: Path) -> argparse.Namespace:
    return argparse.Namespace(tokenizer_type=kind, tokenizer_model=str(path))


def test_the_export_has_its_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    """Ids in config.json are the tokenizer's; StarCoder's end of text is 0, not 2."""
    options = {"unk_id": 2, "eos_id": 0, "bos_id": -1, **IDENTITY}
    model = tiny.make_sentencepiece(tmp_path / "tokenizer.model", **options)
    done = export(checkpoint, tmp_path / "out", tokenizer=named("Llama2Tokenizer", model))
    config = json.loads((done.folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, 0)
    assert config["vocab_size"] == VOCAB_SIZE
    generation = json.loads((done.folder / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 0, "do_sample": False}
    assert not list(done.folder.glob("*.model"))
    loaded = transformers.AutoTokenizer.from_pretrained(done.folder)
    network = transformers.AutoModelForCausalLM.from_pretrained(done.folder)
    ids = loaded("the cat sat", return_tensors="pt").input_ids
    assert network.generate(ids, max_new_tokens=3).shape[1] > ids.shape[1]
    assert network.generation_config.eos_token_id == 0


def test_nothing_is_written_where_the_tokenizer_differs(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.make_sentencepiece(tmp_path / "tokenizer.model", **IDENTITY)
    monkeypatch.setattr(tokenizer, "_merges", lambda proto: [])
    with pytest.raises(ValueError, match="Nothing was written"):
        export(checkpoint, tmp_path / "out", tokenizer=named("Llama2Tokenizer", model))
    assert not list(tmp_path.glob("out*"))


def test_flags_that_are_given_win(tmp_path: Path) -> None:
    recorded = argparse.Namespace(
        tokenizer_type="Llama2Tokenizer",
        tokenizer_model="/elsewhere/tokenizer.model",
        vocab_size=None,
        tokenizer_hf_no_include_special_tokens=True,
        trust_remote_code=True,
    )
    kept = tokenizer_arguments(recorded, None)
    assert kept.tokenizer_model == "/elsewhere/tokenizer.model"
    assert not kept.trust_remote_code  # a checkpoint does not decide that
    moved = tokenizer_arguments(
        recorded, argparse.Namespace(tokenizer_type=None, tokenizer_model="here.model")
    )
    assert (moved.tokenizer_type, moved.tokenizer_model) == ("Llama2Tokenizer", "here.model")
    other = tokenizer_arguments(recorded, named("HuggingFaceTokenizer", tmp_path))
    assert other.tokenizer_type == "HuggingFaceTokenizer"
    assert not other.tokenizer_hf_no_include_special_tokens


def test_a_checkpoint_that_names_no_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    import torch

    path = checkpoint / "release" / "common.pt"
    state = torch.load(path, weights_only=False)
    del state["args"].tokenizer_type
    torch.save(state, path)
    with pytest.raises(ValueError, match="does not name its tokenizer"):
        export(checkpoint, tmp_path / "out")
    state["args"].tokenizer_type = "GPT2BPETokenizer"
    torch.save(state, path)
    with pytest.raises(ValueError, match="the run's GPT2BPETokenizer cannot be converted"):
        export(checkpoint, tmp_path / "out")
    state["args"].normalization = "LayerNorm"  # said first: no tokenizer would help
    torch.save(state, path)
    with pytest.raises(ValueError, match="normalization=LayerNorm"):
        export(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("missing", ["transformers", "tokenizers"])
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    find = tokenizer.importlib.util.find_spec
    monkeypatch.setattr(
        tokenizer.importlib.util, "find_spec", lambda n, *a: None if n == missing else find(n, *a)
    )
    with pytest.raises(ValueError, match=f"needs the package {missing}: pip install"):
        convert("Llama2Tokenizer", tmp_path)


def test_qwen2_would_get_qwens_tokenizer(tmp_path: Path) -> None:
    """transformers 5 does not ask the folder for the class; as a Llama with biases it does."""
    model = Architecture(**{**vars(LLAMA), "qkv_bias": True})
    source = write_model(tmp_path / "model", model)
    checkpoint = import_model(source, tmp_path / "megatron").folder
    pieces = tiny.make_sentencepiece(tmp_path / "tokenizer.model", **IDENTITY)
    with pytest.raises(tokenizer.TokenizerMismatchError):
        config = hugging_face_config(model, "float32")
        tokenizer.convert(flags("Llama2Tokenizer", pieces), config, 64)
    done = export(checkpoint, tmp_path / "out", tokenizer=named("Llama2Tokenizer", pieces))
    assert (done.model.family, done.model.output_bias) == ("Llama", True)
    reference = tokenizer_flags.build_tokenizer(flags("Llama2Tokenizer", pieces))
    loaded = transformers.AutoTokenizer.from_pretrained(done.folder)
    texts = many_texts()[:50]
    assert [loaded(text).input_ids for text in texts] == reference.encode_batch(texts)
    tokens = checking.sample_tokens(hugging_face_config(model, "float32"))
    qwen, llama = (checking.hugging_face_logits(f, tokens) for f in (source, done.folder))
    assert checking.difference(qwen, llama).difference < 1e-5
