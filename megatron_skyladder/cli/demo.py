"""``skyladder demo``: pretrain a small model twice on this machine and compare."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_skyladder.demo.runs import RATE
from megatron_skyladder.files import write_text
from megatron_skyladder.terminal import Progress

EXPORTED = "exported"  # folder of both models
GENERATING = ("transformers", "safetensors")

DESCRIPTION = """\
Pretrain the same small Llama-style model twice from the same weights, on Megatron's own trainer
with two ranks: once with a constant window of 2,048 tokens, once with SkyLadder. The text is
Python's own documentation and standard library. Ends with a table, a plot, and both models as
Hugging Face folders with a line that each writes; takes about six minutes on two cores. What is
finished is kept: a second call goes on where the first was stopped.
"""


def add_parser(subparsers: Any, help_text: str) -> argparse.ArgumentParser:
    """Add the sub-command."""
    parser = subparsers.add_parser("demo", help=help_text, description=DESCRIPTION)
    parser.add_argument("--output", default="demo", help="folder for everything (default: demo)")
    parser.add_argument(
        "--train-iters", type=int, default=160, help="steps of 4,096 tokens (default: 160)"
    )
    parser.add_argument(
        "--lr",
        type=float,
        default=RATE,
        help=f"learning rate of both runs (default: {RATE}, the best that was tried for the "
        "constant window)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="forget what an earlier call has finished"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the demo."""
    from megatron_skyladder.demo.runs import NUM_RANKS, SCHEDULES, SEQ_LENGTH, Run

    if args.train_iters < 40:
        raise ValueError(
            f"--train-iters={args.train_iters} is too short to see anything: 40 or more."
        )
    if not args.lr > 0:
        raise ValueError(f"--lr={args.lr}: give a learning rate above 0.")
    _check_packages()
    output = Path(args.output).resolve()
    runs = [Run(name, output / name, args.train_iters, args.lr) for name in SCHEDULES]
    _forget_other_settings(output, args)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "settings", _settings(args))
    data_prefix, tokenizer = _prepare(output)
    for training in runs:
        if training.is_finished():
            print(f"{training.name}: finished earlier, in {training.folder}")
            continue
        for name in (training.name, f"{training.name}.partial"):  # of the run that this replaces
            shutil.rmtree(output / EXPORTED / name, ignore_errors=True)
        print(
            f"\n{training.name}: {training.train_iters} steps on {NUM_RANKS} ranks, sequences of "
            f"{SEQ_LENGTH} tokens; log in {training.log}"
        )
        try:
            with Progress(f"  {training.name}", sys.stdout, every=None) as progress:
                training.train(data_prefix, tokenizer, _show_step(progress))
        except RuntimeError as error:
            print(f"\nskyladder demo: {error}", file=sys.stderr)
            return 1
    _conclude(output, runs)
    _generate(output, runs)
    return 0


def _check_packages() -> None:
    """Look for everything before minutes are spent.

    Raises:
        ValueError: a package is missing.
    """
    needed = ("torch", "megatron", "tokenizers", "matplotlib", "bokeh", "jinja2")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"the demo trains for real and needs {', '.join(missing)} too, which are not "
            "installed. Everything at once: pip install 'megatron-skyladder[training,data,plot]'."
        )


def _forget_other_settings(output: Path, args: argparse.Namespace) -> None:
    """Remove finished runs of another length or learning rate; nothing else of the folder."""
    settings = output / "settings"
    changed = settings.exists() and settings.read_text() != _settings(args)
    if args.fresh or changed:
        for name in ("constant", "skyladder"):
            shutil.rmtree(output / name, ignore_errors=True)


def _settings(args: argparse.Namespace) -> str:
    return f"{args.train_iters} steps, learning rate {args.lr}\n"


def _prepare(output: Path) -> tuple[Path, Path]:
    """Make corpus, tokenizer and Megatron's files, or find them made."""
    from megatron_skyladder.cli import main
    from megatron_skyladder.data.bpe import train_tokenizer
    from megatron_skyladder.demo import corpus, runs

    text, tokenizer, prefix = output / "corpus.jsonl", output / "tokenizer", output / "corpus"
    if not text.exists():
        print("corpus: Python's documentation topics and standard library")
        print(f"  {corpus.write_corpus(text)} documents in {text}")
    if not (tokenizer / "tokenizer.json").exists():
        print(f"tokenizer: byte-level BPE with {runs.VOCAB_SIZE:,} tokens")
        train_tokenizer(corpus.texts(text), tokenizer, runs.VOCAB_SIZE)
    command = ["prepare", "--input", str(text), "--output-prefix", str(prefix), "--workers", "2"]
    command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
    if main(command):
        raise ValueError("the corpus could not be prepared; see above.")
    return output / "corpus_text_document", tokenizer


def _show_step(progress: Progress) -> Callable[[int, int, float], None]:
    """Return what is called after each step: a bar on a terminal, ten lines elsewhere."""
    started = time.monotonic()

    def show(step: int, num_steps: int, loss: float) -> None:
        seconds = time.monotonic() - started
        left = seconds / step * (num_steps - step)
        text = f"{step}/{num_steps} loss {loss:.3f}, {seconds:.0f} s, about {left:.0f} s left"
        progress.show(step / num_steps, text)
        if not progress.on_terminal and step % max(1, num_steps // 10) == 0:
            progress.line(f"  {text}")

    return show


def _conclude(output: Path, runs: list[Any]) -> None:
    """Print the table, write it, the plot and the report."""
    from megatron_skyladder.demo import summary
    from megatron_skyladder.demo.runs import BATCH_SAMPLES, SEQ_LENGTH, SHAPE, schedule
    from megatron_skyladder.report.curves import load_runs
    from megatron_skyladder.report.page import write_report
    from megatron_skyladder.report.runlog import read_run

    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    constant, ladder = (
        summary.Outcome(run.name, read_run(run.log), SEQ_LENGTH, SEQ_LENGTH * BATCH_SAMPLES)
        for run in runs
    )
    saving = summary.predicted_saving(SHAPE, schedule(runs[1].train_iters), ladder)
    text = summary.table(constant, ladder, saving)
    print(f"\n{text}\n")
    write_text(output / "table.txt", text + "\n")
    summary.plot(constant, ladder, output / "demo.png")
    page = write_report(load_runs([f"{run.name}={run.log}" for run in runs]), output / "report")
    print(f"plot: {output / 'demo.png'}\ntable: {output / 'table.txt'}\nreport: {page}")


def _generate(output: Path, runs: list[Any]) -> None:
    """Export both models, and let transformers write a line with each."""
    from megatron_skyladder.demo import generation

    missing = [name for name in GENERATING if importlib.util.find_spec(name) is None]
    if missing:
        print(f"no lines from the models: {', '.join(missing)} not installed (pip install them)")
        return
    for run in runs:
        folder = generation.export_run(run.checkpoints, output / EXPORTED / run.name)
        print(f"{folder}: {generation.line_of(folder)}")
