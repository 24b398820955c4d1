"""The ``skyladder`` command. Each sub-command is a module here with ``add_parser`` and ``run``."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from typing import Any

from megatron_skyladder import __version__
from megatron_skyladder.cli import completion
from megatron_skyladder.errors import STOPPED, TRACEBACK_VARIABLE

# Listed by name and imported on use: --help must not wait for numpy, let alone for Megatron.
COMMANDS = {
    "demo": "pretrain a small model twice on this machine: constant window and SkyLadder",
    "plan": "what a schedule does to windows, work, time and cost, before you launch",
    "flags": "the training flags that SkyLadder adds, and those of Megatron's that matter to it",
    "compare": "several schedules side by side, and the rate that fits a budget",
    "prepare": "text (JSON lines, Parquet, plain files) -> Megatron's .bin/.idx",
    "example": "Megatron's flags for the paper's runs, each with where it comes from",
    "slurm": "print or submit a run as SLURM jobs that survive time limits and preemption",
    "inspect": "what is in a .bin/.idx: documents, lengths, end-of-document tokens, a sample",
    "export-hf": "a checkpoint as a Hugging Face folder, with its tokenizer",
    "import-hf": "a Hugging Face folder as a checkpoint to go on training from",
    "evaluate": "the paper's benchmarks: prepare their data, run models, the table of two",
    "doctor": "what is installed, how SkyLadder would enter, what does not fit and what to do",
    "check-gpu": "check the kernels on the GPU here, and find the fastest; --toy without a GPU",
    "patch": "put SkyLadder into a Megatron-LM checkout, by lines that are only inserted",
    "report": "what runs did, from their logs: one HTML page",
    "study": "a queue of small runs without a GPU that compares schedules; stopped at will",
    "completion": "tab completion for bash, zsh and fish",
}


EPILOG = """\
a run from beginning to end:
  skyladder doctor                                        what is installed, what will be used
  skyladder prepare --input corpus/ --output-prefix data/cc --tokenizer-type ...
  skyladder plan torchrun ... pretrain_gpt.py <flags>     does it fit, what does it save
  skyladder flags                                         the flags to add
  torchrun ... -m megatron_skyladder.pretrain_gpt <Megatron's flags> --skyladder-start-window 32
  skyladder report runs/constant runs/ladder              what came out

skyladder COMMAND --help explains a command, with examples.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 done, 1 failed, 2 wrong usage."""
    _open_streams()
    arguments = sys.argv[1:] if argv is None else argv
    completing = "_ARGCOMPLETE" in os.environ  # a shell asks what may follow the cursor
    parser = argparse.ArgumentParser(
        prog="skyladder",
        usage="skyladder COMMAND ...",
        description="Context-window scheduling (SkyLadder) for Megatron-LM: plan a run, prepare "
        "its\ndata, look at what came out.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatron-skyladder {__version__}")
    subparsers = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", prog="skyladder"
    )
    words = completion.words_before_cursor() if completing else arguments
    named = next((word for word in words if not word.startswith("-")), None)
    command = parser
    take = None
    for name, help_text in COMMANDS.items():
        if name == named:
            module = importlib.import_module(f"megatron_skyladder.cli.{name.replace('-', '_')}")
            command = module.add_parser(subparsers, help_text)
            command.set_defaults(run=module.run)
            take = getattr(module, "take", None)  # takes a pasted launch out of the words
        else:
            subparsers.add_parser(name, help=help_text)
    if completing:
        completion.answer(parser)
    taken: dict[str, Any] = {}
    if take is not None and named is not None:
        behind = arguments.index(named) + 1
        try:
            words, taken = take(command, arguments[behind:])
        except (ValueError, OSError) as error:
            return _report(error, named)
        arguments = [*arguments[:behind], *words]
    parsed, unknown = parser.parse_known_args(arguments)
    vars(parsed).update(taken)
    if parsed.command is None:
        parser.print_help(sys.stderr)
        return 2
    if unknown:
        command.error(_explain_unknown(unknown[0], command))
    return _run(parsed)


def _open_streams() -> None:
    """Open what was closed (``>&-``): Python has None there, and the next file would be in it."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (until the end)


def _explain_unknown(word: str, command: argparse.ArgumentParser) -> str:
    known = [flag for flag in command._option_string_actions if flag.startswith("--")]
    close = difflib.get_close_matches(word.partition("=")[0], known, n=1)
    meant = f" Did you mean {close[0]}?" if close else ""
    return f"unrecognized arguments: {word}.{meant}"


def _run(parsed: argparse.Namespace) -> int:
    try:
        code = int(parsed.run(parsed) or 0)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # "| head" has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", __package__.partition(".")[0]) or os.environ.get(TRACEBACK_VARIABLE):
            raise  # not the user's to install, or to be looked into
        print(
            f"skyladder {parsed.command}: this needs the package {package}, which is not installed "
            "here. Everything at once: pip install 'megatron-skyladder[training,data,plot]'.",
            file=sys.stderr,
        )
        return 1
    except (OSError, ValueError) as error:
        return _report(error, parsed.command)
    except KeyboardInterrupt:
        print(f"\nskyladder {parsed.command}: stopped", file=sys.stderr)
        return STOPPED


def _report(error: Exception, command: str) -> int:
    """Print what the user can fix and return the exit code; SKYLADDER_TRACEBACK shows where."""
    if os.environ.get(TRACEBACK_VARIABLE):
        raise error
    what = str(error)
    if isinstance(error, OSError) and error.filename:
        what = f"{error.filename}: {error.strerror}"
    print(f"skyladder {command}: {what}", file=sys.stderr)
    return 1
