"""Whether a tokenizer has as many tokens as a model has rows for."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.costs import padded_vocab_size


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
