"""Megatron's tokenizer flags -> a tokenizer: which files and libraries each type needs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path

from megatron_skyladder.data import hub
from megatron_skyladder.data.tokenizers import (
    FastTokenizer,
    NullTokenizer,
    SentencePiece,
    SlowTokenizer,
    TikToken,
    Tokenizer,
    checked_eod,
)

logger = logging.getLogger(__name__)

_NOT_BUILT = {  # Megatron's other types
    "GPT2BPETokenizer": "convert vocabulary and merges to a Hugging Face folder, and train with "
    "HuggingFaceTokenizer too",
    "BertWordPieceLowerCase": "it is for BERT",
    "BertWordPieceCase": "it is for BERT",
    "MultimodalTokenizer": "it is for images and text",
    "NullMultimodalTokenizer": "it is for images and text",
    "SFTTokenizer": "it is for conversations, which are not packed into .bin/.idx",
}
# Texts that tell tokenizers apart: nothing, spaces, special tokens, accents, an emoji.
PROBES = ("", "a", " b  c ", "\n\tx", "</s><s><unk>", "Été, e\u0301 ﬁ 12345", "日本 🙂")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add Megatron's tokenizer flags, those that can decide what a text becomes."""
    group = parser.add_argument_group("tokenizer", "Megatron's flags; give training the same.")
    group.add_argument(
        "--tokenizer-type",
        metavar="TYPE",
        help="HuggingFaceTokenizer: a folder with tokenizer.json. SentencePieceTokenizer, "
        "GPTSentencePieceTokenizer and Llama2Tokenizer: a tokenizer.model. TikTokenizer: "
        "Megatron's vocabulary JSON (needs megatron-core). NullTokenizer: texts are numbers.",
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
        "--tokenizer-special-tokens",
        "--tiktoken-special-tokens",  # as Megatron up to 0.17 has it
        nargs="+",
        metavar="TOKEN",
        help="for TikTokenizer.",
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
    if args.tokenizer_type not in BUILDERS:
        why = _NOT_BUILT.get(args.tokenizer_type, "it is no type of Megatron's")
        raise ValueError(
            f"--tokenizer-type={args.tokenizer_type} is not known here: {why}. Known are "
            f"{', '.join(BUILDERS)}."
        )
    return BUILDERS[args.tokenizer_type](args)


def build_from_files(args: argparse.Namespace) -> Tokenizer | None:
    """Build the tokenizer these flags describe where its files are here and are read at once.

    transformers, Megatron and the hub are not asked: that takes seconds, or a network.

    Returns:
        None where it takes more than that, or the files cannot be read.
    """
    kind, path = args.tokenizer_type, Path(args.tokenizer_model or "")
    try:
        if kind == "HuggingFaceTokenizer":
            file = path / "tokenizer.json" if path.is_dir() else path
            special = not args.tokenizer_hf_no_include_special_tokens
            return _from_json(file, special) if file.is_file() else None
        return build_tokenizer(args) if kind in _BUILT_AT_ONCE else None
    except Exception:  # of the libraries, which have no class for it
        return None


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
    local_only = not Path(path).exists() and hub.is_local_only(path)
    slow = SlowTokenizer(
        path, special=special, trust_remote_code=trust_remote_code, local_only=local_only
    )
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
        eod=checked_eod(None if token is None else backend.token_to_id(token), str(path)),
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
_BUILT_AT_ONCE = {kind for kind, it in BUILDERS.items() if it in (_sentencepiece, _null)}
