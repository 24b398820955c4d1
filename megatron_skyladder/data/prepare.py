"""Text -> .bin/.idx with all cores: one process reads and writes in order, workers encode."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from megatron_skyladder.data import sources
from megatron_skyladder.data.encode import EncodedBatch, Encoder
from megatron_skyladder.data.identity import identity
from megatron_skyladder.data.indexed import best_dtype
from megatron_skyladder.data.output import ResumableOutput, finished_records, opened
from megatron_skyladder.data.progress import Progress, ProgressMeter
from megatron_skyladder.data.sources import Batch
from megatron_skyladder.data.tokenizers import Tokenizer, fingerprint

logger = logging.getLogger(__name__)

BATCHES_PER_WORKER = 4  # in flight: enough to never wait for the reader, few enough for memory
SHOWN_BAD_LINES = 100


@dataclass(frozen=True)
class Request:
    """What to prepare.

    Args:
        inputs: files, folders, patterns; see `sources.find_inputs`.
        output_prefix: the outputs are ``PREFIX_KEY_document.bin`` and ``.idx``.
        keys: fields of a document (JSON keys, Parquet columns) to encode.
        input_format: one of `sources.FORMATS`; None goes by the names.
        append_eod: whether an end-of-document token follows each document.
        skip_bad_lines: leave out what holds no document instead of stopping there.
        workers: encoding processes.
        same_input: large files of another time than in an earlier run are the same.
    """

    inputs: list[str]
    output_prefix: str
    keys: tuple[str, ...] = ("text",)
    input_format: str | None = None
    append_eod: bool = True
    skip_bad_lines: bool = False
    workers: int = 1
    same_input: bool = False


def prepare(
    request: Request, tokenizer: Tokenizer, report: Callable[[Progress], None]
) -> list[dict[str, Any]]:
    """Encode the input into .bin/.idx files, or go on where an earlier run was stopped.

    Args:
        request: what to prepare.
        tokenizer: see tokenizers.py.
        report: called after every batch that has been written.

    Returns:
        What is known about each output: settings and counts. A run that is already finished
        returns them at once.

    Raises:
        ValueError: something the user can fix; the work so far is kept.
    """
    files = sources.find_inputs(request.inputs, request.input_format)
    keys = list(dict.fromkeys(request.keys))
    _check(request, keys, files)
    dtype = best_dtype(tokenizer.vocab_size)
    settings: dict[str, Any] = {
        **identity(files),
        "num_files": len(files),
        "num_bytes": sum(file.num_bytes for file in files),
        "keys": keys,
        "append_eod": request.append_eod,
        "tokenizer": fingerprint(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "dtype": dtype.name,
    }
    same_input = request.same_input
    records = finished_records(request.output_prefix, keys, settings, same_input=same_input)
    if records is not None:
        logger.info("%s is prepared already: nothing to do", request.output_prefix)
        return records
    encoder = Encoder(tokenizer, keys, append_eod=request.append_eod, dtype=dtype)
    output = ResumableOutput(request.output_prefix, keys, dtype, settings, same_input=same_input)
    with opened(output), _worker_pool(request.workers, encoder) as pool:
        meter = ProgressMeter(output, settings["num_bytes"], report)
        batches = sources.read_batches(files, keys, output.place)
        in_flight = BATCHES_PER_WORKER * request.workers
        for batch, encoded in _in_order(pool, batches, in_flight):
            _note_bad(batch, encoded, output, skip=request.skip_bad_lines)
            output.add(encoded.documents, batch.next_place, bad=len(encoded.bad))
            meter.show(batch.read_bytes)
        return _finish(output)


def _check(request: Request, keys: list[str], files: list[sources.InputFile]) -> None:
    for key in keys:
        if not key or "\0" in key or ".." in key.split("/")[1:]:
            raise ValueError(
                f"--json-keys {key!r}: the output is named after the key, PREFIX_KEY_document, and "
                "this makes no name. Rename the field."
            )
    if request.workers < 1:
        raise ValueError(f"--workers={request.workers}: give 1 or more.")
    plain = [file for file in files if file.format in ("text", "lines")]
    if plain and len(keys) > 1:
        raise ValueError(
            f"{plain[0].path} is plain text, which has one field, but --json-keys names "
            f"{len(keys)}: {' '.join(keys)}. Give one."
        )


def _finish(output: ResumableOutput) -> list[dict[str, Any]]:
    if not output.num_tokens:
        raise ValueError(
            "the input holds no tokens at all, and Megatron cannot read an empty .bin. Check "
            "--input and --json-keys."
        )
    return output.finish()


def _note_bad(batch: Batch, encoded: EncodedBatch, output: ResumableOutput, *, skip: bool) -> None:
    """Show what is bad, or stop there with everything before it made safe."""
    for number, bad in enumerate(encoded.bad, start=output.counts["bad"]):
        where = f"{batch.locate(bad.item)}: {bad.reason}"
        if not skip:
            output.commit()
            raise ValueError(
                f"{where}. Run the same command with --on-bad-line skip: it goes on here and "
                f"leaves such lines out. Or correct the input, delete {output.journal} and start "
                "from the beginning."
            )
        if number < SHOWN_BAD_LINES:
            logger.warning("skipped %s", where)
        elif number == SHOWN_BAD_LINES:
            logger.warning("skipped more than %d; from here on they are counted", SHOWN_BAD_LINES)


def _in_order(
    pool: ProcessPoolExecutor, batches: Iterable[Batch], in_flight: int
) -> Iterator[tuple[Batch, EncodedBatch]]:
    """Yield batches with their results in the order of the batches, a few of them in the works."""
    waiting: deque[tuple[Batch, Future[EncodedBatch]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode, batch)))
            if len(waiting) >= in_flight:
                first, result = waiting.popleft()
                yield first, result.result()
        while waiting:
            first, result = waiting.popleft()
            yield first, result.result()
    except BrokenProcessPool:
        raise ValueError(
            "a worker process died, most likely killed for want of memory. Run the same command "
            "again to go on, with fewer --workers if memory is short."
        ) from None


@contextmanager
def _worker_pool(workers: int, encoder: Encoder) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(encoder,),
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None  # this worker process's


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the reader decides
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Leave no workers behind when the reader is killed outright."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode(batch: Batch) -> EncodedBatch:
    assert _encoder is not None
    return _encoder.encode(batch)
