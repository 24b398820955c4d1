"""``skyladder prepare``: text, or the reference code's packed files, to .bin/.idx."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import Any

from megatron_skyladder import terminal
from megatron_skyladder.data import packed, tokenizer_flags, tool_flags
from megatron_skyladder.data.prepare import Request, prepare
from megatron_skyladder.data.progress import Progress
from megatron_skyladder.data.sources import FORMATS
from megatron_skyladder.errors import STOPPED

DESCRIPTION = """\
Encode text with a tokenizer and write it as Megatron reads it: PREFIX_text_document.bin and .idx.

The flags are those of Megatron's tools/preprocess_data.py, and so is the output, byte for byte;
the end-of-document token is appended unless you say --no-append-eod. Documents keep the order of
the input, whatever --workers is. A run that was stopped or killed goes on where it was when the
same command is given again, and a finished one returns at once.
"""

EPILOG = """\
examples:
  # JSON lines, one document a line: {"text": "..."}
  skyladder prepare --input corpus/*.jsonl.zst --output-prefix data/cc \\
      --tokenizer-type Llama2Tokenizer --tokenizer-model tokenizer.model
  # a folder of Parquet files with the text in the column "content"
  skyladder prepare --input hub/python --json-keys content --output-prefix data/python \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model starcoder/
  # the reference code's packed files, Llama-2 tokens; the validation files likewise
  skyladder prepare --from-packed 'bins/cc_8k/train_*' --output-prefix data/train --eod-id 2

Then train with --data-path data/cc_text_document and the same tokenizer flags, or look at it:
  skyladder inspect data/cc_text_document --tokenizer-type ... --tokenizer-model ...
"""

FROM_PACKED = """\
read these packed .bin files (LITPKDS) of the SkyLadder or TinyLlama code instead of text: a folder,
files or patterns of one data set. The token stream stays what it is, and a document ends after an
EOS, also where one file cuts it and the next goes on. Megatron shuffles documents and packs them
into sequences of --seq-length anew, so these are not the reference's, but any --seq-length can be
used. What a process left unfinished at its end stays, without an EOS; padding there goes.
"""


def add_parser(subparsers: Any, help_text: str) -> argparse.ArgumentParser:
    """Add the command to ``skyladder``."""
    parser = subparsers.add_parser(
        "prepare",
        help=help_text,
        usage="skyladder prepare --input PATH ... --output-prefix PREFIX --tokenizer-type TYPE "
        "[options]\n       skyladder prepare --from-packed PATH ... --output-prefix PREFIX "
        "--eod-id ID",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("input")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="files, folders or patterns. .jsonl/.json: one document a line. .parquet: one a row. "
        ".txt: one a file. All but Parquet may be .gz or .zst.",
    )
    source.add_argument("--from-packed", nargs="+", metavar="PATH", help=FROM_PACKED)
    group.add_argument(
        "--input-format",
        choices=FORMATS,
        help="read all input so, whatever it is called; text: one document a file (such as "
        "source code); lines: one document a line of plain text. Default: by name.",
    )
    group.add_argument(
        "--json-keys",
        nargs="+",
        metavar="KEY",
        help="fields or columns to encode, each into PREFIX_KEY_document. Default: text.",
    )
    group.add_argument(
        "--on-bad-line",
        choices=("fail", "skip"),
        default="fail",
        help="what to do where a line holds no document. fail (default): stop, naming file and "
        "line; skip: name it, count it, go on. Empty lines are passed over.",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-prefix", required=True, metavar="PREFIX", help="path and start of the names."
    )
    group.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        help="end each document with the tokenizer's end-of-document token, which document "
        "masking needs. Default: on.",
    )
    group.add_argument(
        "--eod-id",
        type=int,
        metavar="ID",
        help="for --from-packed: the EOS of the packed tokens, where no tokenizer is given. "
        "2 for Llama-2, 0 for StarCoder.",
    )
    group.add_argument(
        "--workers", type=int, metavar="N", help="encoding processes. Default: one for each core."
    )
    group.add_argument(
        "--same-input",
        action="store_true",
        help="go on, or be done, though large input files have other times than in the earlier "
        "run: you know that they are the same. Small ones are compared as a whole.",
    )
    group.add_argument(
        "--log-interval",
        type=int,
        metavar="N",
        help="write how far the run is every N documents. Default: every 30 seconds; a bar "
        "where it is a terminal.",
    )
    tokenizer_flags.add_arguments(parser)
    tool_flags.add_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tool_flags.check(args)
    display = ProgressDisplay(args.log_interval)
    try:
        records = _unpack(args, display) if args.from_packed else _prepare(args, display)
    except KeyboardInterrupt:
        display.end()
        print("stopped; the same command goes on from here", file=sys.stderr)
        return STOPPED
    finally:
        display.end()
    folder = os.path.dirname(args.output_prefix)
    for record in records:
        print(f"{os.path.join(folder, record['output'])}: {_summary(record)}")
    return 0


def _prepare(args: argparse.Namespace, display: ProgressDisplay) -> list[dict[str, Any]]:
    if args.eod_id is not None:
        raise ValueError("--eod-id is for --from-packed; with --input the tokenizer has one.")
    request = Request(
        inputs=args.input,
        output_prefix=args.output_prefix,
        keys=tuple(args.json_keys or ("text",)),
        input_format=args.input_format,
        append_eod=args.append_eod is not False,
        skip_bad_lines=args.on_bad_line == "skip",
        workers=available_cores() if args.workers is None else args.workers,
        same_input=args.same_input,
    )
    return prepare(request, tokenizer_flags.build_tokenizer(args), display.show)


def available_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # what a scheduler has given this job
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _unpack(args: argparse.Namespace, display: ProgressDisplay) -> list[dict[str, Any]]:
    unused = ("input_format", "json_keys", "append_eod", "workers")
    given = [name for name in unused if getattr(args, name) is not None]
    if given:
        raise ValueError(
            f"--{given[0].replace('_', '-')} does not go with --from-packed, which copies tokens "
            "as they are. Leave it out."
        )
    if args.eod_id is not None:
        eod = args.eod_id
    elif args.tokenizer_type:
        eod = tokenizer_flags.build_tokenizer(args).eod
    else:
        raise ValueError(
            "--from-packed needs the token that ends a document, which the files do not name. "
            "Give --eod-id (2 for Llama-2, 0 for StarCoder) or the tokenizer's flags."
        )
    return packed.unpack(
        args.from_packed, args.output_prefix, eod, display.show, same_input=args.same_input
    )


class ProgressDisplay:
    """Shows how far the run is: a bar on a terminal, a line a while in a log.

    Args:
        documents: write a line after so many of them instead.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, documents: int | None = None) -> None:
        if documents is not None and documents < 1:
            raise ValueError(f"--log-interval={documents}: give 1 document or more.")
        self._progress = terminal.Progress("prepare")
        self._documents = documents
        self._shown_documents = 0

    def show(self, progress: Progress) -> None:
        if self._documents is None:
            share = progress.read_bytes / max(1, progress.total_bytes)
            self._progress.show(share, progress_line(progress))
        elif progress.documents - self._shown_documents >= self._documents:
            self._shown_documents = progress.documents // self._documents * self._documents
            self._progress.line(progress_line(progress))

    def end(self) -> None:
        self._progress.end()


def progress_line(progress: Progress) -> str:
    """Return how far, how much, how fast and how long yet."""
    share = progress.read_bytes / max(1, progress.total_bytes)
    parts = [
        f"{share:6.1%}",
        f"{progress.documents:,} documents",
        f"{progress.tokens:,} tokens",
        f"{progress.tokens_per_second:,.0f} tokens/s",
    ]
    if progress.bad:
        parts.append(f"{progress.bad:,} bad lines")
    if progress.seconds_left is not None:
        parts.append(f"{_duration(progress.seconds_left)} left")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _summary(record: dict[str, Any]) -> str:
    parts = [f"{record['documents']:,} documents", f"{record['tokens']:,} tokens"]
    notes = {
        "empty": "documents without tokens",
        "bad": "bad lines left out",
        "cut_off": "documents cut off at a process's end, without EOS",
        "padding": "padding left out, in tokens",
    }
    parts += [f"{note}: {record[name]:,}" for name, note in notes.items() if record.get(name)]
    return ", ".join(parts)
