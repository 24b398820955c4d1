"""Megatron's --tokenizer-type names: the ids, the EOD and the size that Megatron has."""

from __future__ import annotations

import argparse
import http.server
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import prepare_inputs as tiny
import pytest

from megatron_skyladder.data import hub, tokenizer_flags
from megatron_skyladder.data.tokenizer_flags import add_arguments, build_tokenizer
from megatron_skyladder.data.tokenizers import FastTokenizer, SlowTokenizer, Tokenizer, fingerprint

TEXTS = tiny.make_texts(20)


def build(kind: str, model: Path | str | None = None, *flags: str) -> Tokenizer:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    model_flags = [] if model is None else ["--tokenizer-model", str(model)]
    return build_tokenizer(parser.parse_args(["--tokenizer-type", kind, *model_flags, *flags]))


def megatron(kind: str, model: Path, **options: Any) -> Any:
    """Build Megatron's tokenizer as its preprocess tool does."""
    pytest.importorskip("megatron.core")
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer as build_theirs

    flags = dict.fromkeys(("chat_template", "vocab_file", "merge_file", "special_tokens"))
    flags |= dict.fromkeys(("metadata_path", "tiktoken_pattern", "vocab_size"))
    flags |= {"tokenizer_hf_no_use_fast": False, "trust_remote_code": False}
    flags |= {"tokenizer_hf_no_include_special_tokens": False, "pad_vocab_size": False}
    flags |= {"tokenizer_sentencepiece_legacy": False, "tiktoken_num_special_tokens": 1000}
    flags |= {"tokenizer_sentencepiece_ignore_extra_whitespaces": True}
    flags |= {"tokenizer_type": kind, "tokenizer_model": str(model), **options}
    return build_theirs(argparse.Namespace(**flags))


def check_same(ours: Tokenizer, theirs: Any) -> None:
    assert ours.encode_batch(TEXTS) == [theirs.tokenize(text) for text in TEXTS]
    assert (ours.eod, ours.vocab_size) == (theirs.eod, theirs.vocab_size)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("special", [False, True])
def test_hugging_face_folder(tmp_path: Path, bos: bool, special: bool) -> None:
    pytest.importorskip("transformers")
    folder = tiny.make_hf_folder(tmp_path / "hf", bos=bos)
    flags = [] if special else ["--tokenizer-hf-no-include-special-tokens"]
    ours = build("HuggingFaceTokenizer", folder, *flags)
    assert isinstance(ours, FastTokenizer)
    assert (ours.encode_batch([""]) == [[0]]) == (bos and special)
    options = {"tokenizer_hf_no_include_special_tokens": not special}
    check_same(ours, megatron("HuggingFaceTokenizer", folder, **options))


def test_hugging_face_folder_with_sep_instead_of_eos(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = tiny.make_hf_folder(tmp_path / "hf", eos_token=None, sep_token="</s>", cls_token="<s>")
    ours = build("HuggingFaceTokenizer", folder)
    assert ours.eod == 1
    check_same(ours, megatron("HuggingFaceTokenizer", folder))


def test_hugging_face_without_transformers_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    eos = {"__type": "AddedToken", "content": "</s>"}
    folder = tiny.make_hf_folder(tmp_path / "hf", bos=True, eos_token=eos)
    with_it = build("HuggingFaceTokenizer", folder)
    of_file = build("HuggingFaceTokenizer", folder / "tokenizer.json")
    hide(monkeypatch, "transformers")
    without = build("HuggingFaceTokenizer", folder)
    for other in (of_file, without):
        assert other.encode_batch(TEXTS) == with_it.encode_batch(TEXTS)
        assert (other.eod, other.vocab_size) == (with_it.eod, with_it.vocab_size)


def test_transformers_that_change_the_ids_are_used_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("transformers")
    folder = tiny.make_hf_folder(tmp_path / "hf")
    monkeypatch.setattr(SlowTokenizer, "_encode", lambda self, text: [7])
    ours = build("HuggingFaceTokenizer", folder)
    assert isinstance(ours, SlowTokenizer) and ours.encode_batch(["a"]) == [[7]]
    assert "using it whole, slowly" in caplog.text


@pytest.mark.parametrize("special", [False, True])
def test_slow_tokenizer_equals_the_fast_one(tmp_path: Path, special: bool) -> None:
    pytest.importorskip("transformers")
    folder = tiny.make_hf_folder(tmp_path / "hf", bos=True)
    slow = SlowTokenizer(str(folder), special=special, trust_remote_code=False)
    flags = [] if special else ["--tokenizer-hf-no-include-special-tokens"]
    fast = build("HuggingFaceTokenizer", folder, *flags)
    assert slow.encode_batch(TEXTS) == fast.encode_batch(TEXTS)
    check_pickles(slow)
    assert slow.decode(fast.encode_batch(["the cat"])[0]).endswith("the cat")


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "Llama2Tokenizer"])
@pytest.mark.parametrize("options", [{}, {"remove_extra_whitespaces": True}])
def test_sentencepiece(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    model = tiny.make_sentencepiece(tmp_path / "tokenizer.model", **options)
    ours = build(kind, model)
    assert ours.encode_batch([""]) == [[]]
    check_same(ours, megatron(kind, model))
    check_pickles(ours)


@pytest.mark.parametrize("pattern", [None, "v1"])
def test_tiktoken(tmp_path: Path, pattern: str | None) -> None:
    pytest.importorskip("tiktoken")
    path, size = tiny.make_tiktoken(tmp_path / "tik.json")
    theirs = megatron("TikTokenizer", path, vocab_size=size, tiktoken_pattern=pattern)
    flags = ["--tiktoken-pattern", pattern] if pattern else []
    ours = build("TikTokenizer", path, "--vocab-size", str(size), *flags)
    check_same(ours, theirs)
    check_pickles(ours)
    assert ours.decode(ours.encode_batch(["the cat"])[0]) == "the cat"


def test_null_tokenizer() -> None:
    ours = build("NullTokenizer", None, "--vocab-size", "100")
    assert (ours.eod, ours.vocab_size) == (99, 100)
    assert ours.encode_batch(["1 2", "7"]) == [[1, 2], [7]]
    assert ours.decode([1, 2]) == "1 2"
    other = build("NullTokenizer", None, "--vocab-size", "100", "--null-tokenizer-eod-id", "0")
    assert other.eod == 0
    check_pickles(ours)


def check_pickles(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode_batch(TEXTS[:1] if tokenizer.vocab_size > 100 else ["1"])
    assert fingerprint(copy) == fingerprint(tokenizer)


def test_decoding_shows_special_tokens(tmp_path: Path) -> None:
    ours = build("HuggingFaceTokenizer", tiny.make_hf_folder(tmp_path / "hf") / "tokenizer.json")
    assert ours.decode([*ours.encode_batch(["the 日本 🙂"])[0], ours.eod]) == "the 日本 🙂</s>"
    check_pickles(ours)


def test_fingerprints_differ_where_ids_do(tmp_path: Path) -> None:
    folder = tiny.make_hf_folder(tmp_path / "a", bos=True)
    other = tiny.make_hf_folder(tmp_path / "b", bos=True, eos_token="<s>")
    no_bos = tiny.make_hf_folder(tmp_path / "c")
    built = [
        build("HuggingFaceTokenizer", folder / "tokenizer.json"),
        build("HuggingFaceTokenizer", other / "tokenizer.json"),
        build("HuggingFaceTokenizer", no_bos / "tokenizer.json"),
        build(
            "HuggingFaceTokenizer",
            folder / "tokenizer.json",
            "--tokenizer-hf-no-include-special-tokens",
        ),
        build("NullTokenizer", None, "--vocab-size", "300"),
    ]
    assert len({fingerprint(tokenizer) for tokenizer in built}) == len(built)
    again = build("HuggingFaceTokenizer", folder / "tokenizer.json")
    assert fingerprint(again) == fingerprint(built[0])


# --- what is refused ------------------------------------------------------------------------------


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        tokenizer_flags.importlib.util,
        "find_spec",
        lambda name: None if name in names else real(name),
    )


def test_no_type() -> None:
    with pytest.raises(ValueError, match=r"--tokenizer-type is missing\. Give one of Hugging"):
        build_tokenizer(argparse.Namespace(tokenizer_type=None))


def test_no_model() -> None:
    with pytest.raises(ValueError, match="Llama2Tokenizer needs --tokenizer-model PATH"):
        build("Llama2Tokenizer")


def test_no_vocab_size() -> None:
    with pytest.raises(ValueError, match="NullTokenizer needs --vocab-size N"):
        build("NullTokenizer")


def test_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing is not a file"):
        build("Llama2Tokenizer", tmp_path / "missing")
    with pytest.raises(ValueError, match=r"missing does not exist\. Give a folder or a hub name"):
        build("HuggingFaceTokenizer", tmp_path / "missing")


# --- names of the hub, where it is not there ------------------------------------------------------


@pytest.fixture
def hub_answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None], None]]:
    """Put a hub of the test's own in place of the real one; None: it never answers."""
    constants = pytest.importorskip("huggingface_hub.constants")
    statuses: list[int | None] = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if statuses[-1] is None:
                time.sleep(3)
                return
            self.send_response(statuses[-1])
            if statuses[-1] == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield statuses.append
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "the hub has none of this name that you may see"),
        (None, "the hub does not answer"),
    ],
)
def test_a_misspelt_folder_is_found_out_in_seconds(
    hub_answers: Callable[[int | None], None],
    monkeypatch: pytest.MonkeyPatch,
    status: int | None,
    message: str,
) -> None:
    monkeypatch.setattr(hub, "SECONDS", 0.5)
    hub_answers(status)
    begun = time.monotonic()
    with pytest.raises(ValueError, match=rf"data/tokenizr is no file or folder here, .*{message}"):
        build("HuggingFaceTokenizer", "data/tokenizr")
    assert time.monotonic() - begun < 10


def test_a_name_that_is_none(hub_answers: Callable[[int | None], None]) -> None:
    with pytest.raises(ValueError, match="it is no name of the hub either"):
        build("HuggingFaceTokenizer", "a b")


def test_a_hub_in_trouble_is_left_to_transformers(
    hub_answers: Callable[[int | None], None],
) -> None:
    hub_answers(500)
    assert hub.is_local_only("org/name") is False


def test_a_tokenizer_of_the_cache_without_a_network(tmp_path: Path) -> None:
    """In a process of its own: the library reads its variables once."""
    pytest.importorskip("transformers")
    cached = tmp_path / "hub" / "models--org--name"
    folder = tiny.make_hf_folder(cached / "snapshots" / "1234")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1234")
    (cached / ".no_exist" / "1234").mkdir(parents=True)
    for name in ("config.json", "added_tokens.json", "special_tokens_map.json"):  # not on the hub
        (cached / ".no_exist" / "1234" / name).touch()
    script = (
        "import argparse, pickle, sys\n"
        "from megatron_skyladder.data.tokenizer_flags import add_arguments, build_tokenizer\n"
        "parser = argparse.ArgumentParser(); add_arguments(parser)\n"
        "ours = build_tokenizer(parser.parse_args(sys.argv[1:]))\n"
        "print(ours.encode_batch(['the cat']), ours.eod)\n"
    )
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "org/name"]
    variables = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", script, *flags],
        env={**os.environ, **variables, "HF_HUB_OFFLINE": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    local = build("HuggingFaceTokenizer", folder)
    assert done.stdout.strip() == f"{local.encode_batch(['the cat'])} {local.eod}"


def test_types_that_are_not_built_say_why() -> None:
    with pytest.raises(ValueError, match="GPT2BPETokenizer is not known here: convert vocabulary"):
        build("GPT2BPETokenizer")
    with pytest.raises(ValueError, match=r"HuggingfaceTokenizer .*: it is no type of Megatron's"):
        build("HuggingfaceTokenizer")


def test_folder_that_transformers_cannot_read(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="could not be loaded by transformers"):
        build("HuggingFaceTokenizer", tmp_path)


def test_folder_without_tokenizer_json_and_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "transformers")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json, and without it transformers is"):
        build("HuggingFaceTokenizer", tmp_path)


@pytest.mark.parametrize(
    ("kind", "package"),
    [
        ("HuggingFaceTokenizer", "tokenizers"),
        ("Llama2Tokenizer", "sentencepiece"),
        ("TikTokenizer", "tiktoken"),
    ],
)
def test_library_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, package: str
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    hide(monkeypatch, package)
    with pytest.raises(ValueError, match=f"needs the package {package}: pip install {package}"):
        build(kind, tmp_path / "tokenizer.json")


def test_tiktoken_without_megatron(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tiktoken")
    path, _ = tiny.make_tiktoken(tmp_path / "tik.json")
    name = "megatron.core.tokenizers.text.libraries.tiktoken_tokenizer"
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ValueError, match=r"TikTokenizer needs megatron-core 0\.17 or later"):
        build("TikTokenizer", path)


@pytest.mark.parametrize("eos", [None, "<nowhere>"])
def test_no_end_of_document_token(tmp_path: Path, eos: str | None) -> None:
    folder = tiny.make_hf_folder(tmp_path / "hf")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    with pytest.raises(ValueError, match=r"tokenizer\.json has no end-of-document token"):
        build("HuggingFaceTokenizer", folder / "tokenizer.json")


def test_sentencepiece_without_end_of_document_token(tmp_path: Path) -> None:
    model = tiny.make_sentencepiece(tmp_path / "tokenizer.model", eos_id=-1)
    with pytest.raises(ValueError, match=r"tokenizer\.model has no end-of-document token"):
        build("Llama2Tokenizer", model)
