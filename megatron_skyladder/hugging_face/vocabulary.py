"""Whether a tokenizer has as many tokens as a model has rows for."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.costs import padded_vocab_size

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def count_tokens(folder: Path, rows: int) -> tuple[int, list[str]]:
    """Count a Hugging Face folder's tokens as Megatron's HuggingFaceTokenizer does.

    That is len(AutoTokenizer): tokens of tokenizer_config.json or added_tokens.json are among them,
    which tokenizer.json need not have.

    Args:
        folder: with a tokenizer or without.
        rows: of the model's embedding; the number of tokens where nothing else is known.

    Returns:
        The number, and notes where it is not certain.

    Raises:
        ValueError: a package is missing.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return rows, []
    try:
        from transformers import AutoTokenizer

        # code of the folder's own is not run
        loaded = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
        return len(loaded), []
    except Exception as error:
        path = folder / "tokenizer.json"
        counted = _count_json(path) if path.is_file() else None
        how = "were not counted" if counted is None else "were counted in tokenizer.json alone"
        why = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(". ")
        note = (
            f"transformers could not load the tokenizer of {folder}, so its tokens {how} ({why}). "
            f"Where Megatron finds more than the model's {rows:,} rows, it trains the tokens "
            "beyond from random rows."
        )
        return rows if counted is None else counted, [note]


def _count_json(path: Path) -> int:
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError:
        raise ValueError(
            f"reading {path} needs the package tokenizers: pip install tokenizers."
        ) from None
    return int(Backend.from_file(str(path)).get_vocab_size(with_added_tokens=True))


def refuse_tokens_without_rows(folder: Path, num_tokens: int, rows: int) -> None:
    """Refuse a tokenizer that has more tokens than the model has rows.

    Megatron would make the embedding as large as the tokenizer needs it, and load the checkpoint
    into the first rows without a word (``allow_shape_mismatch``).

    Raises:
        UsageError: it has.
    """
    if num_tokens > rows:
        raise UsageError(
            f"the tokenizer of {folder} has {num_tokens:,} tokens, but the model's embedding only "
            f"{rows:,} rows: Megatron would train the tokens beyond from rows that nobody trained. "
            "Put the tokenizer that the model was trained with into the folder, or give each token "
            f"a row first: with transformers, model.resize_token_embeddings({num_tokens}), then "
            "model.save_pretrained."
        )


def compare_with_training(
    args: Namespace, flags: Namespace, *, num_tokens: int, rows: int
) -> list[str]:
    """Compare a tokenizer with the rows that training made for its own.

    Megatron pads the tokenizer's vocabulary to a multiple of --make-vocab-size-divisible-by times
    the tensor-parallel size. Beside the tokenizer's name, the result is all that a checkpoint
    records of it: tokenizers of one padded size are told apart by their names only, and a name may
    have changed because the file was moved. That is a note, another size an error.

    Args:
        args: the checkpoint's. Bridge's, among others, have no padded size.
        flags: of `tokenizer_flags.add_arguments`: the tokenizer.
        num_tokens: that it has.
        rows: of the embedding that are kept; other than ``num_tokens`` where the user said so.

    Returns:
        Notes for the user.

    Raises:
        UsageError: it is not the tokenizer of training, or has more tokens than rows.
    """
    if num_tokens > rows:
        raise UsageError(
            f"the tokenizer has {num_tokens:,} tokens, but --vocab-size={rows} keeps fewer rows of "
            f"the embedding. Leave --vocab-size out, or give at least {num_tokens}."
        )
    stored = getattr(args, "padded_vocab_size", None)
    if not stored or not getattr(args, "make_vocab_size_divisible_by", None):
        size = "The checkpoint does not record to how many rows its vocabulary was padded."
        return _note_on_names(args, flags, size)
    if _fits(num_tokens, args):
        size = f"Its {num_tokens:,} tokens fit the checkpoint's {stored:,} rows."
        return _note_on_names(args, flags, size)
    found = (
        f"{_place(flags)} has {num_tokens:,} tokens, which Megatron pads to "
        f"{_padded(num_tokens, args):,} rows of the embedding; the checkpoint's padded_vocab_size "
        f"is {stored:,}"
    )
    if rows != num_tokens and _fits(rows, args):  # the user knows of rows without tokens
        return [*_note_on_names(args, flags), f"{found}. --vocab-size={rows} keeps {rows:,} rows."]
    raise UsageError(
        f"this is not the tokenizer of training: {found}. Give that one (--tokenizer-type, "
        "--tokenizer-model), or --without-tokenizer and --vocab-size. If training took the number "
        "of rows from elsewhere (--padded-vocab-size, a NullTokenizer's --vocab-size, a loaded "
        f"checkpoint), say with --vocab-size how many of the {stored:,} to keep."
    )


def _padded(size: int, args: Namespace) -> int:
    return padded_vocab_size(
        size,
        divisible_by=args.make_vocab_size_divisible_by,
        tensor_parallel=getattr(args, "tensor_model_parallel_size", None) or 1,
    )


def _fits(size: int, args: Namespace) -> bool:
    """Return whether a vocabulary of this size can have got the checkpoint's rows.

    Rows that were given may be the vocabulary itself. Megatron's NullTokenizer has, up to 0.17, one
    token more than its --vocab-size, by which the real tokenizer goes.
    """
    is_null = getattr(args, "tokenizer_type", None) == "NullTokenizer"
    if is_null and size == getattr(args, "vocab_size", None):
        return True
    return args.padded_vocab_size in (size, _padded(size, args))


def _place(flags: Namespace) -> str:
    """Return the tokenizer's type and where it lies; a relative path may lead anywhere."""
    model = flags.tokenizer_model
    if model and Path(model).exists():
        model = Path(model).resolve()
    return f"{flags.tokenizer_type} {model or ''}".strip()


def _note_on_names(args: Namespace, flags: Namespace, size: str = "") -> list[str]:
    """Return a note where the checkpoint has another name for its tokenizer."""
    trained, used = (
        (getattr(each, "tokenizer_type", None), getattr(each, "tokenizer_model", None))
        for each in (args, flags)
    )
    if trained[0] == used[0] and _is_same_path(trained[1], used[1]):
        return []
    names = [" ".join(str(part) for part in each if part) or "none" for each in (trained, used)]
    note = (
        f"the tokenizer is {names[1]}; the checkpoint names {names[0]}. Whether both give the same "
        f"ids was not compared. {size}"
    )
    return [note.strip()]


def _is_same_path(one: str | None, other: str | None) -> bool:
    if one is None or other is None:
        return one == other
    return Path(one).resolve() == Path(other).resolve()
