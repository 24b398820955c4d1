"""``skyladder study``: a queue of small training runs on the CPU, and the page about them."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_skyladder import terminal
from megatron_skyladder.cli.prepare import ProgressDisplay, available_cores
from megatron_skyladder.errors import STOPPED, UsageError
from megatron_skyladder.files import write_bytes, write_text
from megatron_skyladder.study.settings import LOWEST_PRIORITY

DEFAULT_CONFIG, DEFAULT_OUTPUT = "examples/study.ini", "study"
NEEDED = ("torch", "megatron", "tokenizers", "transformers", "safetensors")

DESCRIPTION = """\
Train the runs of a study on Megatron's own trainer without a GPU, one core for each, at the lowest
priority, and write the page that compares them. What is finished is kept: Ctrl-C or SIGTERM lets
each run save and ends, and the same command goes on. A record of other flags, other text or another
test of copying than the study's is refused.
"""

EPILOG = f"""\
examples:
  skyladder study --run          text, tokenizer, then every run that has no record yet
  skyladder study --status       how far each run is, and how many core hours are left
  skyladder study --write        the page, from the records of finished runs
  skyladder study --run --continue
                                 on another machine: takes the finished runs of the page as
                                 they are and trains what is missing

The study is {DEFAULT_CONFIG}; another one is a file like it. docs/experiments.md is what came out.
"""


def add_parser(subparsers: Any, help_text: str) -> argparse.ArgumentParser:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "study",
        help=help_text,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config", nargs="?", default=DEFAULT_CONFIG, help=f"the study (default: {DEFAULT_CONFIG})"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--run", action="store_true", dest="is_run", help="train what is not finished"
    )
    what.add_argument("--status", action="store_true", help="say how far it is")
    what.add_argument("--write", action="store_true", help="write the page from the records")
    parser.add_argument(
        "--continue",
        action="store_true",
        dest="is_continued",
        help="with --run: take the records beside the page as finished, if they are of the same "
        "text and flags; without it every run that has no record in the output folder is trained",
    )
    parser.add_argument(
        "--output",
        default=DEFAULT_OUTPUT,
        help=f"folder for text, runs and checkpoints (default: {DEFAULT_OUTPUT})",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="runs at a time (default: one for each core)"
    )
    parser.add_argument(
        "--nice",
        type=int,
        default=LOWEST_PRIORITY,
        metavar="N",
        help="priority of the runs, 0 (as others) to 19 (behind all others; default)",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the sub-command."""
    from megatron_skyladder.study import settings

    config, output = Path(args.config), Path(args.output).resolve()
    if not config.is_file():
        raise UsageError(
            f"there is no {config}. Name the study's file, or start the command in a checkout of "
            f"megatron-skyladder, whose {DEFAULT_CONFIG} is the default."
        )
    if args.workers is not None and args.workers < 1:
        raise UsageError(f"--workers={args.workers}: give 1 or more.")
    if not 0 <= args.nice <= LOWEST_PRIORITY:
        raise UsageError(f"--nice={args.nice}: give 0 (as others) to {LOWEST_PRIORITY}.")
    if args.is_continued and not args.is_run:
        raise UsageError("--continue goes with --run; --status and --write change no queue.")
    study = settings.read(config)
    if args.is_run:
        workers = args.workers or available_cores()
        return _run(study, output, workers, args.nice, is_continued=args.is_continued)
    if args.status:
        print(_status(study, output))
        return 0
    _write(study, config, output)
    return 0


def _run(study: Any, output: Path, workers: int, priority: int, *, is_continued: bool) -> int:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the study trains for real and needs {', '.join(missing)} too, which are not "
            "installed. Everything at once: pip install 'megatron-skyladder[training,data,plot]' "
            "safetensors."
        )
    from megatron_skyladder.study import preparation, queue, records

    logging.getLogger().setLevel(logging.WARNING)
    with queue.locked(output) as lock:
        encoding = ProgressDisplay()
        made = preparation.make(study, output, print, encoding.show, workers)
        encoding.end()
        (output / queue.RECORDS).mkdir(exist_ok=True)
        shown = {name: value for name, value in made.items() if name != "request"}
        write_text(output / queue.RECORDS / records.CORPUS, json.dumps(shown, indent=1) + "\n")
        if is_continued:
            print(f"{queue.take(study, output, made['identity'])} record(s) taken from the page's")
        found = queue.states(study, output)
        with terminal.Progress("study", every=300.0) as progress:
            display = _Display(found, progress)
            training = queue.Queue(
                *(study, output, made["identity"], display.say, display.step),
                priority=priority,
                lock=lock,
            )
            with _Stops(training, display):
                training.run(workers)
    left = sum(state.word != "finished" for state in queue.states(study, output))
    if training.is_stopping:
        print("stopped; the same command goes on from here")
        return STOPPED
    print(f"{len(study.runs) - left} of {len(study.runs)} runs are finished")
    return 1 if training.failures else 0


class _Display:
    """Shows how far the whole queue is; called from the threads of several runs."""

    def __init__(self, found: list[Any], progress: terminal.Progress) -> None:
        self._progress, self._lock = progress, threading.Lock()
        self._steps = {state.planned.name: state.iteration for state in found}
        self._total = sum(state.planned.train_iters for state in found)
        self._whole = {state.planned.name: state.planned.train_iters for state in found}
        self._begin, self._started = sum(self._steps.values()), time.monotonic()
        self._running: set[str] = set()

    def say(self, text: str) -> None:
        with self._lock:
            self._running.discard(text.partition(":")[0])
            self._progress.line(f"{time.strftime('%H:%M:%S')} {text}")

    def step(self, name: str, iteration: int) -> None:
        with self._lock:
            self._steps[name] = iteration
            self._running.add(name)
            done = sum(self._steps.values())
            parts = [f"{done:,}/{self._total:,} steps"]
            parts += [
                f"{run} {self._steps[run] / self._whole[run]:.0%}" for run in sorted(self._running)
            ]
            gained = done - self._begin
            if gained > 0:
                seconds = (time.monotonic() - self._started) / gained * (self._total - done)
                parts.append(f"about {_hours(seconds)} left at this pace")
            self._progress.show(done / self._total, ", ".join(parts))


class _Stops:
    """Turns Ctrl-C and SIGTERM into a stop of the queue while it runs."""

    def __init__(self, queue: Any, display: _Display) -> None:
        self._queue, self._display = queue, display
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._stop)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        # not through the display: a thread that the signal met may hold its lock
        again = self._queue.is_stopping
        self._queue.stop()
        text = "ending at once" if again else "each run saves after its step; once more: at once"
        os.write(2, f"\nstopping: {text}\n".encode())


def _status(study: Any, output: Path) -> str:
    from megatron_skyladder.study import queue

    queue.check(study, output)
    found = queue.states(study, output)
    rows: list[tuple[str | terminal.Share, ...]] = [
        ("run", "state", "steps", "", "s a step", "core hours left")
    ]
    for state in found:
        left = queue.seconds_left([state]) if state.step_seconds else None
        rows.append(
            (
                state.planned.name,
                state.word,
                f"{state.iteration:,}/{state.planned.train_iters:,}",
                terminal.Share(state.iteration / state.planned.train_iters),
                "" if state.step_seconds is None else f"{state.step_seconds:.2f}",
                "" if left is None else f"{left / 3600:.2f}",
            )
        )
    done = sum(state.word == "finished" for state in found)
    left = queue.seconds_left(found)
    lines = [terminal.table(rows, left=2), "", f"{done} of {len(found)} runs are finished."]
    if left is not None:
        lines[-1] += f" About {left / 3600:.1f} core hours are left, validation not counted."
    if num_kept := len(queue.kept(study, output)):
        lines.append(
            f"{num_kept} more have records in {study.records}, which --run --continue takes."
        )
    lines += [f"{state.planned.name} failed: {state.failure}" for state in found if state.failure]
    return "\n".join(lines)


def _write(study: Any, config: Path, output: Path) -> None:
    from megatron_skyladder.study import page, queue, records

    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    new = 0
    for path in sorted((output / queue.RECORDS).glob("[!.]*.json*")):
        study.records.mkdir(parents=True, exist_ok=True)
        target, data = study.records / path.name, path.read_bytes()
        if not target.exists() or target.read_bytes() != data:
            write_bytes(target, data)
            new += path.name not in (records.CORPUS, records.FAILURES)
    page.write(study, config)
    print(f"{study.page}: written, {new} new record(s) from {output}")


def _hours(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
