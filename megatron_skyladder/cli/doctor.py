"""``skyladder doctor``: what is installed, how SkyLadder would enter, what does not fit."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from megatron_skyladder.ladder.flags import add_arguments
from megatron_skyladder.ladder.numbers import argument, whole
from megatron_skyladder.planning import doctor, pasted, verdict
from megatron_skyladder.planning.doctor import Report
from megatron_skyladder.planning.pasted import Pasted
from megatron_skyladder.terminal import GOOD, HEAD, MARKED, led, paragraph, styled

_INTEGERS = (  # what the schedule is made of, beside our own flags
    *("--seq-length", "--global-batch-size", "--train-iters", "--train-samples"),
    *("--context-parallel-size", "--log-interval", "--num-layers"),
)
_OF_HEADS = (  # which kernels have them
    *("--hidden-size", "--num-attention-heads", "--kv-channels"),
    *("--qk-head-dim", "--qk-pos-emb-head-dim", "--v-head-dim"),
)
_OF_LAYERS = (  # which of them are local
    *("--window-size", "--window-attn-skip-freq"),
    *("--hybrid-layer-pattern", "--hybrid-override-pattern"),
)


def add_parser(subparsers: Any, help_text: str) -> argparse.ArgumentParser:
    """Add this command to the ``skyladder`` parser."""
    parser = subparsers.add_parser(
        "doctor",
        help=help_text,
        usage="skyladder doctor [-v] [--json] [--from-script FILE | torchrun ... pretrain_gpt.py "
        "<flags>]",
        allow_abbrev=False,
        description="Say what is installed, which attention backend and which integration "
        "will be used, what does not fit and what to do. With a launch, pasted or in a script, "
        "also its schedule; nothing is started. Under torchrun (torchrun ... -m megatron_skyladder "
        "doctor <flags>) all ranks compare versions, flags and schedule.",
        epilog="Exit code: 0 nothing is wrong, 1 something is or has to change, 2 wrong usage.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("-v", "--verbose", action="store_true", help="show all that was found")
    pasted.add_source_flags(parser)
    megatron = parser.add_argument_group(
        "Megatron's flags",
        "These decide the schedule and the kernels; all others are compared, and looked up in the "
        "table of flags that matter.",
    )
    for flag in (*_INTEGERS, *_OF_HEADS):
        megatron.add_argument(flag, type=argument(whole), metavar="N")
    for flag in _OF_LAYERS:
        megatron.add_argument(flag, metavar="LAYERS")
    megatron.add_argument("--multi-latent-attention", action="store_true")
    megatron.add_argument("--softmax-type", metavar="NAME")
    parser.set_defaults(context_parallel_size=1)
    megatron.add_argument("--step-batch-size-schedule", metavar="TOKENS:SAMPLES ...")
    add_arguments(parser)
    return parser


def take(parser: argparse.ArgumentParser, words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take the launch out of the command's words."""
    rest, found = pasted.take(parser, words, here=True)
    misspelt = [each for each in found.unknown if each.is_ours]
    if misspelt:
        raise ValueError(str(misspelt[0]))
    own = ("--json", "-v", "--verbose")
    flags = tuple(word for word in found.launch.flags if word.text not in own)
    found.launch = replace(found.launch, flags=flags)
    return rest, {"pasted": found}


def run(arguments: argparse.Namespace) -> int:
    """Examine, compare with the other ranks where there are any, and print on rank 0."""
    report = doctor.examine(arguments, arguments.pasted)
    size = os.environ.get("WORLD_SIZE", "")
    given = int(size) if size.isdigit() else 1
    ranks = given if _is_rank(os.environ) else 1
    if given > ranks:
        report.notes.append(
            f"WORLD_SIZE={given} is set, but neither torchrun nor srun started this process as one "
            "of so many: it looked at itself alone. To compare all ranks: torchrun ... -m "
            "megatron_skyladder doctor <flags>."
        )
    if ranks > 1 and doctor.has_torch(report):
        problems = report.problems
        others = doctor.compare_ranks(report)
        report.problems = problems + others
        report.run["ranks"] = "disagree" if others else f"{ranks}, all alike"
    if ranks == 1 or os.environ.get("RANK", "0") == "0":
        if arguments.json:
            lines = _verdict(report, arguments.pasted)
            print(json.dumps({"verdict": lines, **asdict(report)}, indent=2))
        else:
            print(_page(report, arguments.pasted, details=arguments.verbose))
    fit = _fit(arguments.pasted)
    return 1 if report.problems or (fit is not None and not fit.fits) else 0


def _is_rank(environment: Mapping[str, str]) -> bool:
    """Whether the other ranks of WORLD_SIZE were started as well, so that they can be waited for.

    Pods of a PyTorchJob, Azure ML and shells in such a place have RANK and WORLD_SIZE whatever
    runs there.
    """
    if "TORCHELASTIC_RUN_ID" in environment:  # torchrun's
        return True
    step = environment.get("SLURM_PROCID"), environment.get("SLURM_STEP_NUM_TASKS")
    return None not in step and step == (environment.get("RANK"), environment.get("WORLD_SIZE"))


def _fit(found: Pasted) -> verdict.Fit | None:
    """Return what a launch needs before SkyLadder can be in it; None where no launch is given."""
    return verdict.fit(found) if found.is_launch and found.launch.entry else None


def _page(report: Report, found: Pasted, *, details: bool) -> str:
    """Return the verdict in three lines, then what is wrong, then (on request) all facts."""
    parts: list[tuple[str, dict[str, str]]] = [
        ("Problems", {str(n): text for n, text in enumerate(report.problems, 1)}),
    ]
    if details:
        parts += [
            ("Installed", report.installed),
            ("A run here", report.run),
            ("Integrations", report.integrations),
            ("Notes", {str(n): text for n, text in enumerate(report.notes, 1)}),
        ]
    first = GOOD if not report.problems else MARKED
    styles = [first, HEAD, HEAD]
    lines = [led(line, style) for line, style in zip(_verdict(report, found), styles, strict=True)]
    lines.append("")
    for title, entries in parts:
        if not entries:
            continue
        margin = max(len(name) for name in entries) + 4
        lines.append(styled(title, HEAD))
        lines += [paragraph(f"  {name}", text, margin) for name, text in entries.items()]
        lines.append("")
    return "\n".join(lines).rstrip()


def _verdict(report: Report, found: Pasted) -> list[str]:
    """Return three lines: does it fit, what would run, what is next."""
    count = len(report.problems)
    wrong = f"{count} problem{'s' * (count > 1)}, see below"
    fit = _fit(found)
    if fit is None or (fit.fits and count):
        first = f"Change: {wrong}" if count else "Fits: nothing is wrong"
    else:
        first = str(fit)
    runs = ", ".join(
        [
            f"Megatron {report.installed.get('megatron', 'none').partition(',')[0]}",
            f"torch {report.installed.get('torch', 'none').partition(' ')[0]}",
            f"attention on {report.run.get('attention backend', 'unknown').partition(':')[0]}",
            f"device {report.run.get('device', 'none')}",
        ]
    )
    following = "-v shows all that was found"
    if count:
        following = "do what the problems say, then ask again"
    elif report.run["schedule"].startswith("off"):
        following = "skyladder plan with the flags of your launch; -v shows all that was found"
    return [first, f"Runs: {runs}", f"Next: {following}"]
