"""``skyladder inspect``: what is in a .bin/.idx pair."""

from __future__ import annotations

import argparse
import json
from typing import Any

from megatron_skyladder.data import tokenizer_flags
from megatron_skyladder.data.indexed import IndexedReader
from megatron_skyladder.data.record import misfit, read_record, record_path
from megatron_skyladder.data.summary import summarize
from megatron_skyladder.data.tokenizers import Tokenizer, fingerprint
from megatron_skyladder.terminal import Progress, Share, table

DESCRIPTION = """\
Show what is in PREFIX.bin and PREFIX.idx: how many documents and tokens, how long documents are,
whether each ends in the end-of-document token and has none inside, and how many training sequences
hold more than one document (those are what --skyladder-intra-document changes). Any pair will do,
also one that Megatron's own tool made. All tokens are read once.
"""

EPILOG = """\
examples:
  skyladder inspect data/cc_text_document --seq-length 32768
  skyladder inspect data/cc_text_document --document 7 \\
      --tokenizer-type Llama2Tokenizer --tokenizer-model tokenizer.model
  skyladder inspect data/cc_text_document --json | jq .eod
"""

SAMPLE_TOKENS = 64  # shown from the beginning of a document; a quarter of it from its end


def add_parser(subparsers: Any, help_text: str) -> argparse.ArgumentParser:
    """Add the command to ``skyladder``."""
    parser = subparsers.add_parser(
        "inspect",
        help=help_text,
        usage="skyladder inspect PREFIX [--seq-length TOKENS] [--document N] [--json] "
        "[tokenizer's flags]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prefix", metavar="PREFIX", help="path without .bin or .idx.")
    parser.add_argument(
        "--seq-length",
        type=int,
        default=8192,
        metavar="TOKENS",
        help="of a sequence: how many hold several documents? Default: 8192.",
    )
    parser.add_argument(
        "--eod-id",
        type=int,
        metavar="ID",
        help="the end-of-document token. Default: the tokenizer's where one is given, what "
        "`skyladder prepare` noted, or else what most documents end in.",
    )
    parser.add_argument(
        "--document",
        type=int,
        default=0,
        metavar="N",
        help="which document to show a sample of. Default: 0.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead.")
    tokenizer_flags.add_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    reader = IndexedReader(args.prefix.removesuffix(".bin").removesuffix(".idx"))
    tokenizer = tokenizer_flags.build_tokenizer(args) if args.tokenizer_type else None
    record, notes = _record(reader.prefix)
    eod, source = _eod(args, record, tokenizer)
    with Progress("reading", every=None, stays=False) as progress:
        summary = summarize(
            reader,
            eod=eod,
            seq_length=args.seq_length,
            report=lambda share: progress.show(share, f"{share:4.0%}"),
        )
    summary["eod"]["source"] = source
    if tokenizer is not None:
        _check_largest(args, summary, tokenizer)
        notes += _other_tokenizer(record, tokenizer)
    summary["notes"] = notes
    summary["sample"] = _sample(reader, args.document, tokenizer)
    if args.json:
        print(json.dumps(summary, indent=1))
    else:
        print("\n".join(text_report(summary)))
    return 0


def _record(prefix: str) -> tuple[dict[str, Any] | None, list[str]]:
    """Return what `skyladder prepare` noted of this pair, and notes where it noted another."""
    try:
        record = read_record(prefix)
    except ValueError as error:
        return None, [str(error)]
    different = misfit(prefix, record) if record else ""
    if not different:
        return record, []
    return None, [
        f"{record_path(prefix)} is the record of another pair ({different}), and is not used. The "
        "files were replaced since; delete the record, or copy the pair that it is of again."
    ]


def _eod(
    args: argparse.Namespace, record: dict[str, Any] | None, tokenizer: Tokenizer | None
) -> tuple[int | None, str]:
    """Return the end-of-document token and where it is known from."""
    if args.eod_id is not None:
        return args.eod_id, "--eod-id"
    if tokenizer is not None:
        return tokenizer.eod, "the tokenizer"
    if record is not None:
        return record["settings"]["eod"], "skyladder prepare"
    return None, "the token most documents end in"


def _check_largest(args: argparse.Namespace, summary: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Raise where the data holds tokens that the tokenizer has not."""
    largest, highest = summary["eod"]["largest_token"], max(tokenizer.vocab_size - 1, tokenizer.eod)
    if largest is not None and largest > highest:
        given = f"--tokenizer-type={args.tokenizer_type}"
        given += f" --tokenizer-model={args.tokenizer_model}" if args.tokenizer_model else ""
        raise ValueError(
            f"{summary['prefix']} holds tokens up to {largest:,}, but {given} has tokens up to "
            f"{highest:,}: the data was made with another one. Give that one, or leave the "
            "tokenizer's flags out to see counts and ids alone."
        )


def _other_tokenizer(record: dict[str, Any] | None, tokenizer: Tokenizer) -> list[str]:
    """Return a note where the data was made with another tokenizer than this, by the record."""
    noted = record["settings"].get("tokenizer") if record else None
    given = fingerprint(tokenizer)
    if noted in (None, given):  # there is none where tokens were prepared, not text
        return []
    return [
        f"the data was prepared with a tokenizer of fingerprint {noted}, and the given one has "
        f"{given}: other files, other flags, or another version of the tokenizer's library. Texts "
        "below may not be those of the data, and training needs the tokenizer that it was made "
        "with."
    ]


def _sample(
    reader: IndexedReader, document: int, tokenizer: Tokenizer | None
) -> dict[str, Any] | None:
    if not len(reader):
        return None
    if not 0 <= document < len(reader):
        raise ValueError(f"--document={document}: there are {len(reader):,}, counted from 0.")
    tokens = reader[document]
    tail = SAMPLE_TOKENS // 4
    parts = (
        [tokens]
        if len(tokens) <= SAMPLE_TOKENS + tail
        else [tokens[:SAMPLE_TOKENS], tokens[-tail:]]
    )
    ids = [part.tolist() for part in parts]
    return {
        "document": document,
        "length": len(tokens),
        "ids": ids,
        "text": [tokenizer.decode(part) for part in ids] if tokenizer else None,
    }


def text_report(summary: dict[str, Any]) -> list[str]:
    """Return the lines that are printed."""
    lengths, rows, eod = summary["lengths"], summary["rows"], summary["eod"]
    lines = [
        f"{summary['prefix']}: {summary['documents']:,} documents, {summary['tokens']:,} tokens "
        f"({summary['dtype']})",
        *(f"note: {note}" for note in summary["notes"]),
    ]
    if summary["empty_documents"]:
        lines.append(f"documents without tokens: {summary['empty_documents']:,}")
    if summary["sequences"] != summary["documents"] - summary["empty_documents"]:
        lines.append(f"{summary['sequences']:,} sequences: documents are split into several")
    if not summary["documents"]:
        return lines
    lines += [
        "",
        f"length in tokens: {lengths['min']:,} to {lengths['max']:,}, mean {lengths['mean']:,.1f}, "
        f"half up to {lengths['p50']:,.0f}, 90 % up to {lengths['p90']:,.0f}, "
        f"99 % up to {lengths['p99']:,.0f}",
        _histogram(lengths["histogram"], summary["tokens"]),
        "",
        *_eod_lines(eod, summary["documents"] - summary["empty_documents"]),
        "",
        *_row_lines(rows),
    ]
    return [*lines, "", *_sample_lines(summary["sample"])]


def _histogram(histogram: list[tuple[int, int, int, int]], num_tokens: int) -> str:
    num_documents = sum(count for _, _, count, _ in histogram)
    rows: list[list[str | Share]] = [["from", "to", "documents", "", "tokens", ""]]
    for low, high, count, tokens in histogram:
        shares = Share(count / num_documents), Share(tokens / max(1, num_tokens))
        rows.append([f"{low:,}", f"{high:,}", f"{count:,}", shares[0], f"{tokens:,}", shares[1]])
    return table(rows)


def _eod_lines(eod: dict[str, Any], documents: int) -> list[str]:
    lines = [f"end-of-document token: {eod['id']} (from {eod['source']})"]
    if eod["documents_without"]:
        lines.append(
            f"  {eod['documents_without']:,} of {documents:,} documents do not end in it; the "
            f"first is document {eod['first_without']:,}"
        )
    else:
        lines.append("  every document ends in it")
    if eod["inside"]:
        lines.append(
            f"  {eod['inside']:,} more are inside documents, where they look like a document's "
            f"end; the first is in document {eod['first_inside']:,}"
        )
    else:
        lines.append("  none is inside a document")
    return [*lines, f"largest token: {eod['largest_token']}"]


def _row_lines(rows: dict[str, Any]) -> list[str]:
    if not rows["rows"]:
        return [f"sequences of {rows['seq_length']:,} tokens: not one is full"]
    return [
        f"sequences of {rows['seq_length']:,} tokens: {rows['rows']:,}, "
        f"{rows['with_several_documents']:.1%} of them with more than one document, "
        f"{rows['mean_documents']:.1f} documents a sequence on average (in file order)"
    ]


def _sample_lines(sample: dict[str, Any]) -> list[str]:
    lines = [f"document {sample['document']:,}, {sample['length']:,} tokens:"]
    for shown in sample["text"] or sample["ids"]:
        lines.append(f"  {shown!r}")
    if sample["text"] is None:
        lines.append("  (give --tokenizer-type and --tokenizer-model to read it)")
    return lines
