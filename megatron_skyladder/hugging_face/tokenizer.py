"""Megatron's tokenizers as Hugging Face's, checked on sample texts.

The rules of the check: what transformers loads from the folder gives the ids that Megatron's
tokenizer of the same flags gives, for every sample text. Whether those flags are the ones of
training is not its question; see `vocabulary`. A SentencePiece model is rebuilt as a
``tokenizer.json``, because transformers 5 reads a bare ``tokenizer.model`` as another tokenizer,
without an error (up to 5.23 nearly any, from 5.24 on those that normalize characters). Texts that
spell a special token (``</s>``) are outside of the check: SentencePiece takes them for plain text,
transformers for the token.
"""

# ruff: noqa: RUF001 (sample texts in other scripts)

from __future__ import annotations

import importlib.util
import json
import logging
import tempfile
import unicodedata
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from megatron_skyladder.data import tokenizer_flags, tokenizers

logger = logging.getLogger(__name__)

NO_LIMIT = 10**9  # tokens; no warning that a sample text is long
SPACE = "▁"  # SentencePiece's
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
CODE_POINT_STEP = 29
CODE_POINTS_PER_TEXT = 24

_SAMPLES = (
    "",
    "a",
    "Hello world",
    " leading space",
    "trailing space ",
    "two  spaces   and three",
    "    indented\n\tby a tab\r\n",
    "\n\n\n",
    "   ",
    "0123456789 3.14159 1,000,000 -7e-5 0x1F",
    "don't can't it's we'll I'D",
    "C'est l'été à Zürich, où ça coûte 5 €.",
    "e\u0301 versus \u00e9, \ufb01 versus fi, \u00bd versus 1/2",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم",
    "日本語のテキスト、한국어 텍스트，中文文本。",
    "🙂👩‍💻🇨🇭 emoji ‒ dashes — “quotes” … ​zero-width",
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment\n\n\nclass A(B):\n\tpass\n",
    '{"key": [1, 2.5, null, true], "url": "https://example.org/a?b=c&d=%20e"}',
    "Question: What is 2 + 2?\nA. 3\nB. 4\nAnswer: B\n\nQuestion:",
    "SHOUTING mixedCase snake_case kebab-case CamelCase2",
    "<b>markup</b> &amp; [link](target) \\( \\frac{1}{2} \\)",
    "a" * 300,
    "the quick brown fox jumps over the lazy dog. " * 20,
)


class TokenizerMismatchError(ValueError):
    """A sample text gets other ids than from Megatron's tokenizer."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as files of a Hugging Face folder.

    Args:
        files: name and content.
        vocab_size: tokens.
        bos: id, None where there is none.
        eos: id; Megatron's end of document.
        pad: id, None where there is none.
    """

    files: dict[str, str]
    vocab_size: int
    bos: int | None
    eos: int | None
    pad: int | None


def sample_texts() -> list[str]:
    """Return the texts of the check: everyday ones, and letters and signs of every script."""
    letters = [
        chr(code)
        for code in range(0x20, 0x30000, CODE_POINT_STEP)
        if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")
    ]
    runs = range(0, len(letters), CODE_POINTS_PER_TEXT)
    return [*_SAMPLES, *("".join(letters[i : i + CODE_POINTS_PER_TEXT]) for i in runs)]


def convert(flags: Namespace, config: dict[str, Any], max_positions: int) -> Tokenizer:
    """Convert the tokenizer that Megatron's flags name, and check it.

    Args:
        flags: of `tokenizer_flags.add_arguments`.
        config: the model's config.json, by which transformers chooses a class too.
        max_positions: tokens that the model takes.

    Raises:
        TokenizerMismatchError: it encodes sample texts differently.
        ValueError: it has no counterpart.
    """
    for module in ("transformers", "tokenizers"):
        if importlib.util.find_spec(module) is None:
            raise ValueError(
                f"converting the tokenizer needs the package {module}: pip install {module}, or "
                "leave the tokenizer out with --without-tokenizer."
            )
    if flags.tokenizer_type == "NullTokenizer":
        raise ValueError(
            "the run's NullTokenizer has no texts. Leave the tokenizer out with "
            "--without-tokenizer, or give the real one's flags."
        )
    reference = tokenizer_flags.build_tokenizer(flags)
    if isinstance(reference, tokenizers.SentencePiece):
        converted = _from_sentencepiece(reference)
    elif isinstance(reference, tokenizers.TikToken):
        converted = _from_tiktoken(reference)
    elif isinstance(reference, tokenizers.FastTokenizer):
        converted = _from_folder(reference, flags)
    else:
        raise ValueError(
            f"--tokenizer-model={flags.tokenizer_model} runs in Python only and has no "
            "tokenizer.json. Save it as a fast tokenizer first, or leave the tokenizer out with "
            "--without-tokenizer and add it by hand."
        )
    backend, settings = converted
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_positions}
    ids = {role: backend.token_to_id(settings[role]) for role in ROLES if settings.get(role)}
    tokenizer = Tokenizer(
        files={
            "tokenizer.json": backend.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
        },
        vocab_size=reference.vocab_size,
        bos=ids.get("bos_token"),
        eos=reference.eod,
        pad=ids.get("pad_token"),
    )
    added = backend.get_added_tokens_decoder().values()
    symbols = [token.content for token in added if not token.special]
    within = [text for t in symbols for text in (f"see {t} there", f"{t}{t} {t}x", f" {t}\n{t}")]
    _check(tokenizer, config, reference, [*sample_texts(), *within])
    return tokenizer


def _check(
    tokenizer: Tokenizer,
    config: dict[str, Any],
    reference: tokenizers.Tokenizer,
    texts: Sequence[str],
) -> None:
    """Load it as a user will and compare ids.

    Raises:
        TokenizerMismatchError: some text gets other ids.
        ValueError: documents end with another token.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="skyladder-tokenizer-") as folder:
        files = {**tokenizer.files, "config.json": json.dumps(config)}
        for name, content in files.items():
            (Path(folder) / name).write_text(content, encoding="utf-8")
        loaded = AutoTokenizer.from_pretrained(folder, model_max_length=NO_LIMIT)
    expected = reference.encode_batch(list(texts))
    found = [loaded(text).input_ids for text in texts]
    wrong = [i for i in range(len(texts)) if expected[i] != found[i]]
    if wrong:
        theirs, ours = expected[wrong[0]], found[wrong[0]]
        pairs = zip_longest(theirs, ours)
        place = next(i for i, (their, our) in enumerate(pairs) if their != our)
        raise TokenizerMismatchError(
            f"the converted tokenizer encodes {len(wrong)} of {len(texts)} sample texts otherwise "
            f"than Megatron's; the first is {texts[wrong[0]][:40]!r}, from token {place} on: "
            f"{ours[place:][:8]} instead of {theirs[place:][:8]}. Nothing was written. Leave the "
            "tokenizer out with --without-tokenizer and add one that you have checked."
        )
    if loaded.eos_token_id != reference.eod:
        raise ValueError(
            f"the converted tokenizer ends documents with {loaded.eos_token_id}, Megatron's with "
            f"{reference.eod}. Set eos_token in the tokenizer's tokenizer_config.json."
        )
    logger.info(
        "tokenizer: %d sample texts get the ids of Megatron's tokenizer of the same flags",
        len(texts),
    )


def _from_folder(
    reference: tokenizers.FastTokenizer, flags: Namespace
) -> tuple[Any, dict[str, Any]]:
    """Take the Rust tokenizer as it was used, whatever class the folder names."""
    from tokenizers import Tokenizer as Backend
    from transformers import AutoTokenizer

    backend = Backend.from_str(reference.json)
    path = Path(flags.tokenizer_model)
    folder = path.parent if path.is_file() else path
    loaded = AutoTokenizer.from_pretrained(
        str(folder), trust_remote_code=bool(flags.trust_remote_code)
    )
    settings: dict[str, Any] = {
        role: token for role in ROLES if (token := getattr(loaded, role, None)) is not None
    }
    settings["eos_token"] = backend.id_to_token(reference.eod)
    settings["clean_up_tokenization_spaces"] = False
    if loaded.chat_template:
        settings["chat_template"] = loaded.chat_template
    if reference.split_special:
        settings["split_special_tokens"] = True
    if not reference.encode_batch([""])[0]:  # nothing is put around a text
        backend.post_processor = None
        settings |= _NO_ADDITIONS
    return backend, settings


_NO_ADDITIONS = {"add_bos_token": False, "add_eos_token": False}


def _from_sentencepiece(reference: tokenizers.SentencePiece) -> tuple[Any, dict[str, Any]]:
    """Rebuild a BPE or unigram model."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    proto = _sentencepiece_proto(reference.model)
    backend = Backend(_sentencepiece_model(proto))
    backend.normalizer = _sentencepiece_normalizer(proto.normalizer_spec)
    backend.decoder = _sentencepiece_decoder(proto)
    kinds = proto.SentencePiece.Type
    special = [p.piece for p in proto.pieces if p.type in (kinds.CONTROL, kinds.UNKNOWN)]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    chosen = [piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=False) for token in chosen])
    trainer = proto.trainer_spec
    roles = {"bos": trainer.bos_id, "eos": trainer.eos_id, "unk": trainer.unk_id}
    settings: dict[str, Any] = {
        f"{role}_token": proto.pieces[index].piece
        for role, index in {**roles, "pad": trainer.pad_id}.items()
        if 0 <= index < len(proto.pieces)
    }
    return backend, {**settings, "clean_up_tokenization_spaces": False, **_NO_ADDITIONS}


def _sentencepiece_proto(model: bytes) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ValueError(
            f"reading a SentencePiece model's settings needs the package protobuf ({error}): "
            "pip install protobuf."
        ) from None
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    return proto


def _sentencepiece_model(proto: Any) -> Any:
    from tokenizers import models

    trainer = proto.trainer_spec
    unknown = proto.pieces[trainer.unk_id].piece
    if trainer.model_type == trainer.UNIGRAM:
        pieces = [(piece.piece, piece.score) for piece in proto.pieces]
        return models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    if trainer.model_type != trainer.BPE:
        raise ValueError(
            "the SentencePiece model is of type word or char; BPE and unigram can be converted."
        )
    return models.BPE(
        vocab={piece.piece: index for index, piece in enumerate(proto.pieces)},
        merges=_merges(proto),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Return the pairs that SentencePiece would merge, the earliest first.

    A piece can be made of every pair of pieces that spells it; pieces with a higher score are made
    first. SentencePiece keeps no merges, a ``tokenizer.json`` needs them.
    """
    normal = proto.SentencePiece.Type.NORMAL
    scores = {p.piece: p.score for p in proto.pieces if p.type == normal}
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _sentencepiece_normalizer(spec: Any) -> Any:
    """Do in SentencePiece's order: characters, spaces, the prefix, the visible space."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        # tokenizers looks characters up by grapheme, so a line end of two would become one space;
        # SentencePiece's own tables (nfkc, nmt_nfkc) make a space of each
        steps.append(normalizers.Replace("\r\n", "\n\n"))
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        # of spaces alone, which Strip() is not
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _sentencepiece_decoder(proto: Any) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(SPACE, " ")]
    if proto.trainer_spec.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _from_tiktoken(reference: tokenizers.TikToken) -> tuple[Any, dict[str, Any]]:
    """Rebuild a byte-level BPE; in Megatron's form special tokens have the lowest ids."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    state = reference.encoding.__getstate__()
    ranks: dict[bytes, int] = state["mergeable_ranks"]
    special: dict[str, int] = state["special_tokens"]
    spell = _byte_letters()
    words = {token: "".join(spell[byte] for byte in token) for token in ranks}
    merges = sorted(
        (rank, ranks[token[:cut]], ranks[token[cut:]], words[token[:cut]], words[token[cut:]])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    )
    vocab = {**special, **{words[token]: rank for token, rank in ranks.items()}}
    model = models.BPE(vocab, [(left, right) for *_, left, right in merges], ignore_merges=True)
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(state["pat_str"]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    tokens = sorted(special, key=lambda token: special[token])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
    names = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
    settings: dict[str, Any] = {
        f"{role}_token": token for role, token in names.items() if token in special
    }
    return backend, {**settings, "clean_up_tokenization_spaces": False, **_NO_ADDITIONS}


def _byte_letters() -> dict[int, str]:
    """Return the letter that byte-level tokenizers write for each byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}
