"""Megatron's ``--tokenizer-type`` names -> one small interface that encodes texts in batches.

The ids, the end-of-document token and the vocabulary size are those of Megatron 0.19, so that what
is prepared here fits a training run with the same flags. Each tokenizer is a value that pickles,
so that it is built once and handed to the worker processes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger(__name__)

# Texts that tell tokenizers apart: nothing, spaces, special tokens, accents, an emoji.
PROBES = ("", "a", " b  c ", "\n\tx", "</s><s><unk>", "Été, e\u0301 ﬁ 12345", "日本 🙂")


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    eod: int
    vocab_size: int

    @property
    def identity(self) -> bytes:
        """Everything that decides the ids, for telling two tokenizers apart."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without an end-of-document token."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of these ids, special tokens included where the library can."""


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return a short text that is equal for tokenizers that give the same ids."""
    parts = f"{type(tokenizer).__name__} {tokenizer.vocab_size} {tokenizer.eod} ".encode()
    return hashlib.sha256(parts + tokenizer.identity).hexdigest()[:16]


class FastTokenizer:
    """The Rust tokenizer of a Hugging Face folder."""

    def __init__(
        self, backend: Any, *, eod: int, vocab_size: int, special: bool, split_special: bool = False
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.json = backend.to_str()
        self.eod, self.vocab_size = eod, vocab_size
        self.special, self.split_special = special, split_special

    @cached_property
    def _backend(self) -> Any:
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self.json)
        backend.encode_special_tokens = self.split_special
        return backend

    @property
    def identity(self) -> bytes:
        return f"{self.special} {self.split_special} {self.json}".encode()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=self.special)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_backend"}


class SlowTokenizer:
    """A Hugging Face tokenizer as transformers runs it; each process loads it for itself."""

    def __init__(self, path: str, *, special: bool, trust_remote_code: bool) -> None:
        self.path, self.special, self.trust_remote_code = path, special, trust_remote_code
        self.eod = _checked_eod(self.wrapped.eos_token_id, path)
        self.vocab_size = len(self.wrapped)

    @cached_property
    def wrapped(self) -> Any:
        """What AutoTokenizer returns, with the special tokens that Megatron's wrapper adds."""
        from transformers import AutoTokenizer

        try:
            wrapped = AutoTokenizer.from_pretrained(
                self.path, trust_remote_code=self.trust_remote_code
            )
        except Exception as error:
            raise ValueError(
                f"--tokenizer-model={self.path} could not be loaded by transformers: {error}"
            ) from error
        _fill_in_special_tokens(wrapped)
        return wrapped

    @property
    def identity(self) -> bytes:
        vocab = sorted(self.wrapped.get_vocab().items())
        return repr((type(self.wrapped).__name__, self.special, vocab)).encode()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self.wrapped.decode(ids)

    def _encode(self, text: str) -> list[int]:
        if self.special:
            return self.wrapped(text).input_ids
        return self.wrapped.convert_tokens_to_ids(self.wrapped.tokenize(text))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "wrapped"}


class SentencePiece:
    """A SentencePiece model; no token is put in front, as in Megatron 0.17 and later."""

    def __init__(self, path: Path) -> None:
        self.model = path.read_bytes()
        self.vocab_size = self._processor.get_piece_size()
        self.eod = _checked_eod(self._processor.eos_id(), str(path))

    @cached_property
    def _processor(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=self.model)

    @property
    def identity(self) -> bytes:
        return self.model

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts, out_type=int, num_threads=1)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_processor"}


class TikToken:
    """A tiktoken vocabulary in Megatron's JSON form."""

    def __init__(self, encoding: Any, *, eod: int, vocab_size: int) -> None:
        self.encoding, self.eod, self.vocab_size = encoding, eod, vocab_size

    @property
    def identity(self) -> bytes:
        state = self.encoding.__getstate__()
        return repr(
            [state[name] for name in ("pat_str", "mergeable_ranks", "special_tokens")]
        ).encode()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encoding.encode(text, allowed_special="all") for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)


class NullTokenizer:
    """Numbers written out, separated by single spaces; for synthetic data."""

    def __init__(self, *, eod: int, vocab_size: int) -> None:
        self.eod, self.vocab_size = eod, vocab_size

    @property
    def identity(self) -> bytes:
        return b""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[int(word) for word in text.split(" ")] for text in texts]

    def decode(self, ids: list[int]) -> str:
        return " ".join(str(token) for token in ids)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add Megatron's tokenizer flags, those that can decide what a text becomes."""
    group = parser.add_argument_group("tokenizer", "Megatron's flags; give training the same.")
    group.add_argument(
        "--tokenizer-type",
        choices=tuple(BUILDERS),
        help="HuggingFaceTokenizer: a folder with tokenizer.json. SentencePieceTokenizer and "
        "Llama2Tokenizer: a tokenizer.model. TikTokenizer: Megatron's vocabulary JSON (needs "
        "megatron-core). NullTokenizer: texts are numbers.",
    )
    group.add_argument(
        "--tokenizer-model",
        metavar="PATH",
        help="the folder or file; for HuggingFaceTokenizer a hub name works where transformers "
        "can reach or has cached it.",
    )
    group.add_argument(
        "--vocab-size", type=int, metavar="N", help="for NullTokenizer and TikTokenizer."
    )
    group.add_argument(
        "--null-tokenizer-eod-id", type=int, metavar="ID", help="default: vocab-size - 1."
    )
    group.add_argument("--tiktoken-pattern", choices=("v1", "v2"), help="default: v2.")
    group.add_argument("--tiktoken-num-special-tokens", type=int, default=1000, metavar="N")
    group.add_argument(
        "--tokenizer-special-tokens", nargs="+", metavar="TOKEN", help="for TikTokenizer."
    )
    group.add_argument(
        "--tokenizer-hf-no-include-special-tokens",
        action="store_true",
        help="leave out what a Hugging Face tokenizer puts around a text, such as <s>.",
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="allow a Hugging Face folder to bring Python code.",
    )


def build_tokenizer(args: argparse.Namespace) -> Tokenizer:
    """Build the tokenizer these flags describe.

    Args:
        args: a namespace with the flags of `add_arguments`.

    Raises:
        ValueError: a flag or a file is missing, a library is not installed, or the tokenizer has
            no end-of-document token.
    """
    if args.tokenizer_type is None:
        raise ValueError(
            f"--tokenizer-type is missing. Give one of {', '.join(BUILDERS)}, with "
            "--tokenizer-model PATH."
        )
    return BUILDERS[args.tokenizer_type](args)


def _checked_eod(eod: int | None, model: str) -> int:
    if eod is None or eod < 0:
        raise ValueError(
            f"--tokenizer-model={model} has no end-of-document token: Megatron takes eos_token "
            "(Hugging Face) or the model's eos_id (SentencePiece). Set eos_token in "
            "tokenizer_config.json, or train the model with one."
        )
    return eod


def _huggingface(args: argparse.Namespace) -> Tokenizer:
    path = Path(_model(args))
    special = not args.tokenizer_hf_no_include_special_tokens
    if path.is_file():
        return _from_json(path, special)
    if not path.is_dir() and (len(path.parts) > 2 or path.parts[0] in ("/", ".", "..", "~")):
        raise ValueError(f"--tokenizer-model={path} does not exist. Give a folder or a hub name.")
    if importlib.util.find_spec("transformers"):
        return _from_transformers(str(path), special, args.trust_remote_code)
    if (path / "tokenizer.json").is_file():
        return _from_json(path / "tokenizer.json", special)
    raise ValueError(
        f"--tokenizer-model={path} has no tokenizer.json, and without it transformers is needed: "
        "pip install transformers, or give a folder with tokenizer.json."
    )


def _from_transformers(path: str, special: bool, trust_remote_code: bool) -> Tokenizer:
    """Load as Megatron does, then encode with the Rust tokenizer underneath where there is one."""
    slow = SlowTokenizer(path, special=special, trust_remote_code=trust_remote_code)
    if not slow.wrapped.is_fast:
        return slow
    fast = FastTokenizer(
        slow.wrapped.backend_tokenizer,
        eod=slow.eod,
        vocab_size=slow.vocab_size,
        special=special,
        split_special=getattr(slow.wrapped, "split_special_tokens", False),
    )
    if fast.encode_batch(list(PROBES)) == slow.encode_batch(list(PROBES)):
        return fast
    logger.warning(
        "%s: transformers changes what the tokenizer underneath gives; using it whole, slowly", path
    )
    return slow


def _fill_in_special_tokens(wrapped: Any) -> None:
    """Let eos and sep, bos and cls stand in for each other, as Megatron's wrapper does."""
    pairs = (("eos_token", "sep_token"), ("sep_token", "eos_token"), ("bos_token", "cls_token"))
    missing = {
        name: getattr(wrapped, other)
        for name, other in (*pairs, ("cls_token", "bos_token"))
        if getattr(wrapped, name, None) is None and getattr(wrapped, other, None)
    }
    wrapped.add_special_tokens(missing)


def _from_json(path: Path, special: bool) -> Tokenizer:
    """Load a tokenizer.json without transformers; eos_token stands in the file beside it."""
    _need("tokenizers")
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(path))
    config = path.with_name("tokenizer_config.json")
    settings = json.loads(config.read_text()) if config.is_file() else {}
    token = settings.get("eos_token") or settings.get("sep_token")
    if isinstance(token, dict):
        token = token["content"]
    return FastTokenizer(
        backend,
        eod=_checked_eod(None if token is None else backend.token_to_id(token), str(path)),
        vocab_size=backend.get_vocab_size(with_added_tokens=True),
        special=special,
        split_special=settings.get("split_special_tokens", False),
    )


def _sentencepiece(args: argparse.Namespace) -> Tokenizer:
    _need("sentencepiece")
    return SentencePiece(_file(args))


def _tiktoken(args: argparse.Namespace) -> Tokenizer:
    """Build Megatron's own tokenizer, which brings the patterns, and keep its encoding."""
    _need("tiktoken")
    path = _file(args)
    try:
        from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer
    except ImportError as error:
        raise ValueError(
            "--tokenizer-type=TikTokenizer needs megatron-core 0.17 or later, which holds the "
            f"splitting patterns ({error}). Install it, or convert the vocabulary to a Hugging "
            "Face tokenizer.json and use HuggingFaceTokenizer."
        ) from error
    options = {"pattern": args.tiktoken_pattern, "vocab_size": args.vocab_size}
    built = TikTokenTokenizer(
        str(path),
        special_tokens=args.tokenizer_special_tokens,
        num_special_tokens=args.tiktoken_num_special_tokens,
        **{name: value for name, value in options.items() if value},
    )
    return TikToken(built.tokenizer, eod=built.eod, vocab_size=built.vocab_size)


def _null(args: argparse.Namespace) -> Tokenizer:
    if args.vocab_size is None:
        raise ValueError("--tokenizer-type=NullTokenizer needs --vocab-size N.")
    eod = args.null_tokenizer_eod_id
    return NullTokenizer(
        eod=args.vocab_size - 1 if eod is None else eod, vocab_size=args.vocab_size
    )


def _model(args: argparse.Namespace) -> str:
    if not args.tokenizer_model:
        raise ValueError(f"--tokenizer-type={args.tokenizer_type} needs --tokenizer-model PATH.")
    return args.tokenizer_model


def _file(args: argparse.Namespace) -> Path:
    path = Path(_model(args))
    if not path.is_file():
        raise ValueError(f"--tokenizer-model={path} is not a file; give the tokenizer's file.")
    return path


def _need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"this tokenizer needs the package {module}: pip install {module}.")


BUILDERS: dict[str, Callable[[argparse.Namespace], Tokenizer]] = {
    "HuggingFaceTokenizer": _huggingface,
    "SentencePieceTokenizer": _sentencepiece,
    "GPTSentencePieceTokenizer": _sentencepiece,
    "Llama2Tokenizer": _sentencepiece,
    "TikTokenizer": _tiktoken,
    "NullTokenizer": _null,
}
