"""``skyladder slurm``: a run as SLURM jobs; printed first, submitted when asked to."""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_skyladder.attention import limits
from megatron_skyladder.cli import slurm_status
from megatron_skyladder.ladder.flags import config_from_args, refuse_batches
from megatron_skyladder.megatron_bridge import command_line
from megatron_skyladder.planning import pasted, run_flags
from megatron_skyladder.slurm import evaluation, script
from megatron_skyladder.slurm.flags import overrides
from megatron_skyladder.slurm.settings import BRIDGE_ENTRY, DEFAULT_ENTRY, Settings, from_file

logger = logging.getLogger(__name__)

DESCRIPTION = """\
Print the job script for a run described by an example file (copy one of examples/slurm/), after
checking it: names of flags, what cannot be combined with SkyLadder, batch and layout against the
number of GPUs, the script with sbatch --test-only where there is one. With --submit: write the run
folder and submit it.

A run goes on until it is finished:
  time limit near            the ranks save, then the job is requeued
  preemption, requeue        the ranks save if KillWait allows; SLURM brings the job back
  node failure               SLURM brings the job back
  incomplete checkpoint      set aside and named; the newest complete one is loaded
  failures in a row          after max-tries of them it gives up
  touch RUN/stop             the ranks save; nothing goes on until you remove it and submit again
  scancel                    the ranks save; the job does not come back
Where jobs may not requeue themselves: --chain or --array. Details: docs/slurm.md.

RUN, the run folder, has
  status.txt                 how things stand, on its first line; then every attempt
  attempts/001/rank.0000.log what rank 0 printed in the first attempt
  checkpoints, tensorboard, slurm-JOB.out, settings.json, job.sbatch
"""

EPILOG = """\
examples:
  skyladder slurm examples/slurm/1b-8k.ini                    # look at it; nothing is written
  skyladder slurm examples/slurm/1b-8k.ini --nodes 4 --partition a100 --time 12:00:00 --submit
  skyladder slurm status runs/1b-8k                           # how it stands
  skyladder slurm examples/slurm/1b-8k.ini --variant constant --run-dir runs/constant --submit
  skyladder slurm examples/slurm/1b-8k.ini --chain 10 --submit -- --save-interval 1000
"""


def add_parser(subparsers: Any, help_text: str) -> argparse.ArgumentParser:
    """Add the command to ``skyladder``."""
    parser = subparsers.add_parser(
        "slurm",
        help=help_text,
        usage="skyladder slurm EXAMPLE [options] [-- flags]\n       skyladder slurm status "
        "[RUN_DIR ...] [--json]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="EXAMPLE", type=Path, help="an example file, or: status")
    parser.add_argument(
        "runs",
        metavar="RUN_DIR",
        nargs="*",
        help="for status: run folders. Default: those in this folder and two levels below.",
    )
    parser.add_argument("--json", action="store_true", help="for status: print a JSON list.")
    parser.add_argument("--submit", action="store_true", help="submit it. Default: print it.")
    for section, key, help_text in (
        ("slurm", "nodes", "nodes of one job."),
        ("slurm", "gpus-per-node", "GPUs to ask for on each."),
        ("slurm", "partition", "as for sbatch."),
        ("slurm", "account", "as for sbatch."),
        ("slurm", "time", "limit of one job, as for sbatch."),
        ("run", "variant", "see `skyladder example`."),
        ("run", "gpu", "the layout to use, see `skyladder example`."),
    ):
        parser.add_argument(f"--{key}", metavar="VALUE", dest=f"{section}:{key}", help=help_text)
    parser.add_argument("--run-dir", metavar="DIR", dest="run:folder", help="the run folder.")
    several = parser.add_mutually_exclusive_group()
    several.add_argument("--chain", type=int, metavar="N", help="N jobs, one after the other.")
    several.add_argument("--array", type=int, metavar="N", help="the same as one job array.")
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="the evaluation alone, at once: the job array of the file's section [evaluate]. With "
        "that section, --submit submits training and, after it, this array.",
    )
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="go on in a run folder that has a run with another command line.",
    )
    parser.epilog = f"What stands after -- are further flags of Megatron, which win.\n\n{EPILOG}"
    return parser


def take(parser: argparse.ArgumentParser, words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take out of the words what argparse cannot tell apart.

    What follows ``--``, flags of Megatron, not of this command; the folders of ``status``, which
    may stand behind an option.
    """
    end = words.index("--") if "--" in words else len(words)
    own, taken = words[:end], {"flags": words[end + 1 :]}
    if own[:1] == ["status"]:
        taken["runs"] = [word for word in own[1:] if not word.startswith("-")]
        own = ["status", *(word for word in own[1:] if word.startswith("-"))]
    return own, taken


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="skyladder slurm: %(message)s")
    if str(args.file) == "status":
        return slurm_status.show([Path(run) for run in args.runs], as_json=args.json)
    if args.runs or args.json:
        raise ValueError("RUN_DIR and --json go with `skyladder slurm status` only.")
    overrides = {
        (section, key): value
        for name, value in vars(args).items()
        for section, found, key in [name.partition(":")]
        if found
    }
    settings = from_file(args.file, overrides, args.flags)
    jobs = args.array if args.chain is None else args.chain
    if jobs is not None and jobs < 1:
        raise ValueError(f"--chain or --array {jobs}: give at least 1.")
    if args.evaluate:
        return _evaluate(settings, submit=args.submit)
    form: dict[str, Any] = {"jobs": jobs, "array": args.array is not None}
    text, options = script.job_script(settings, **form), script.job_options(settings, **form)
    _check_flags(settings)
    if not args.submit:
        return _show(settings, text, options)
    array = "" if settings.evaluation is None else _checked_array(settings, text, options)
    ids = script.submit_run(settings, text, **form, allow_changes=args.allow_changes)
    print(f"submitted {', '.join(ids)}")
    if settings.evaluation is not None:
        number = settings.evaluation.num_jobs
        print(f"evaluation after it: {_submit_behind(settings, array, ids)}, {number} jobs")
    print(f"how it stands: {Path(settings.folder) / 'status.txt'}")
    return 0


def _checked_array(settings: Settings, training: str, options: Mapping[str, str]) -> str:
    """Return the evaluation's script, which sbatch takes: asked before training is submitted.

    Raises:
        ValueError: its data is not there, or sbatch refuses it.
    """
    evaluation.check(settings)
    text = evaluation.job_script(settings, only_finished=True)
    refused = _refusal(settings, text, evaluation.job_options(settings))
    # sbatch queues what --test-only refuses, such as jobs for nodes that are all down just now
    if refused and not _refusal(settings, training, options):
        raise ValueError(
            f"{refused}\nThis is the evaluation behind training; nothing is submitted. Correct "
            "[evaluate], or leave it out. --evaluate shows its script."
        )
    if refused:
        logger.warning("the evaluation's script could not be checked: %s", refused)
    return text


def _refusal(settings: Settings, text: str, options: Mapping[str, str]) -> str | None:
    try:
        script.check_script(settings, text, options)
    except ValueError as error:
        return str(error)
    return None


def _submit_behind(settings: Settings, array: str, ids: list[str]) -> str:
    """Submit the evaluation after training and return its id."""
    try:
        return evaluation.submit(settings, array, ids)
    except ValueError as error:
        raise ValueError(
            f"{error}\nTraining is submitted ({', '.join(ids)}). To evaluate it, give --evaluate "
            "--submit once it is finished."
        ) from None


def _evaluate(settings: Settings, *, submit: bool) -> int:
    array = evaluation.job_script(settings, only_finished=False)
    if not submit:
        return _show(settings, array, evaluation.job_options(settings), evaluating=True)
    print(f"submitted {evaluation.submit(settings, array)}")
    print(f"results: {evaluation.of(settings).out}")
    return 0


def _check_flags(settings: Settings) -> None:
    """Check what would end the job after it has waited: names, conflicts, batch and layout.

    The model is not looked at: Megatron knows more kinds of it than `skyladder plan` can count.

    Raises:
        ValueError: they do not fit.
    """
    if settings.entry == BRIDGE_ENTRY:
        command_line.read(settings.flags)
        saves = overrides(settings.flags).get("checkpoint.save")
        if saves is not None:
            raise ValueError(
                f"checkpoint.save={saves} in [run] would have no effect: checkpoints go to "
                f"{Path(settings.folder) / 'checkpoints'}. Leave it out; to begin with the weights "
                "of another run, give checkpoint.pretrained_checkpoint, or checkpoint.load to go "
                "on with all of it."
            )
        return
    if settings.entry != DEFAULT_ENTRY:
        return  # a script's own flags are not ours to know
    parser = argparse.ArgumentParser(prog="skyladder slurm", add_help=False)
    run_flags.add_run_flags(parser)
    words, found = pasted.take(parser, settings.flags)
    for note in found.notes:
        logger.warning("%s", note)
    flags = run_flags.complete(parser.parse_args([*words, "--gpus", str(settings.num_ranks)]))
    if flags.stage_batches:  # filled in here, and missing in the launch
        refuse_batches("the flag is not there", flags.stage_batches)
    if config_from_args(flags) is not None:
        limits.refuse(found.findings)


def _show(
    settings: Settings, text: str, options: Mapping[str, str], *, evaluating: bool = False
) -> int:
    """Print the script; let sbatch check it where there is one."""
    print(text, end="")
    code, verdict = 0, "there is no sbatch here, so it has not checked the script"
    if shutil.which("sbatch") is not None:
        try:
            verdict = script.check_script(settings, text, options)
        except ValueError as error:
            code, verdict = 1, str(error)
    print(f"# run folder: {settings.folder}\n# {verdict}", file=sys.stderr)
    for name in settings.environment.passed:
        print(f"# {name}: handed to jobs by sbatch's environment, written nowhere", file=sys.stderr)
    if settings.evaluation is not None and not evaluating:
        jobs = settings.evaluation.num_jobs
        print(
            f"# evaluation after it: an array of {jobs} jobs; --evaluate shows it", file=sys.stderr
        )
    print("# nothing was written or submitted: add --submit", file=sys.stderr)
    return code
