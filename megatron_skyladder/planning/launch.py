"""A training launch as people have it: a pasted command line or a script, taken apart, not run.

    torchrun --nproc-per-node 8 pretrain_gpt.py --num-layers 24 ...
    srun -N 4 --ntasks-per-node 8 python -u pretrain_gpt.py ...

What starts the processes tells the number of GPUs, the script says which way SkyLadder can enter,
and everything behind it are flags of Megatron's and ours. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_skyladder.planning import processes, shell
from megatron_skyladder.planning.shell import Word

ENTRY_POINT = "megatron_skyladder.pretrain_gpt"
_NOT_LAUNCHING = (
    "echo",
    "printf",
    "cat",
    "ls",
    "cp",
    "mv",
    "rm",
    "mkdir",
    "cd",
    "tee",
    "grep",
    "set",
)
_ENVIRONMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_STARTING = (*processes.LAUNCHERS, *processes.WRAPPERS)
_TRAINS = ("--num-layers", "--seq-length", "--train-iters", "--train-samples", "--hidden-size")


@dataclass(frozen=True)
class Launch:
    """A launch, taken apart.

    Args:
        flags: words behind the script: Megatron's flags and ours.
        entry: the script or module that trains, as it was given; empty where only flags were.
        num_gpus: processes in all, or None where the text does not say.
        source: the script file that it was read from, or an empty string.
        environment: variables that it sets.
        notes: what was not read in the script, one sentence each.
    """

    flags: tuple[Word, ...] = ()
    entry: str = ""
    num_gpus: int | None = None
    source: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """The flags as plain words."""
        return [word.text for word in self.flags]

    @property
    def is_ours(self) -> bool:
        """Whether it starts our entry point."""
        return self.entry == ENTRY_POINT

    def place(self, flag: str) -> str:
        """Return where a flag stands, such as ``train.sh:14``, or an empty string."""
        lines = [word.line for word in self.flags if word.text.partition("=")[0] == flag]
        return f"{self.source}:{lines[-1]}" if self.source and lines and lines[-1] else ""

    def at(self, flag: str) -> str:
        """Return the place of a flag as the beginning of a message, ``train.sh:14: ``."""
        place = self.place(flag)
        return f"{place}: " if place else ""


def from_words(words: Sequence[str], switches: Collection[str] = ()) -> Launch:
    """Take a pasted launch apart.

    Args:
        words: of a command such as ``skyladder plan``, whose own flags may stand before the launch
            and behind it.
        switches: flags of the command that take no value.

    Returns:
        The launch; its flags are all the words but those of launcher and script.
    """
    typed = tuple(Word(word, 0) for word in words)
    start = _start_of_launch(words, switches)
    if start is None:
        return Launch(typed)
    launch = _take_apart(typed[start:])
    return replace(launch, flags=(*typed[:start], *launch.flags))


def from_script(path: str, values: Mapping[str, str]) -> Launch:
    """Read a launch script; nothing in it is run.

    Args:
        path: a shell script, also one with ``#SBATCH`` lines.
        values: of variables, in place of what the script sets.

    Raises:
        ValueError: it cannot be read, or starts no training.
    """
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    interpreter = shell.Interpreter(dict(values))
    try:
        interpreter.run(shell.parse(text))
    except shell.ShellError as error:
        raise ValueError(
            f"{path} cannot be read as a shell script: {error} Paste the command instead: "
            "torchrun ... pretrain_gpt.py <flags>."
        ) from None
    job = processes.of_job(text)
    launches = [launch for ran in interpreter.commands if (launch := _launch_of(ran, job))]
    if not launches:
        raise ValueError(
            f"{path} starts no training that can be seen: wanted is a command such as torchrun ... "
            "pretrain_gpt.py <flags>. Paste it instead, or give the script that has it."
        )
    training = [
        each for each in launches if set(_TRAINS) & {w.partition("=")[0] for w in each.words}
    ]
    chosen = (training or launches)[-1]
    notes = [f"{Path(path).name}, {note}" for note in interpreter.notes]
    if len(training) > 1:
        notes.append(f"{Path(path).name} starts {len(training)} trainings; read was the last one")
    return replace(chosen, source=Path(path).name, notes=tuple(notes))


def _launch_of(ran: shell.Ran, job: processes.Counts) -> Launch | None:
    """Return the launch that a command is, or None."""
    if not ran.words or ran.words[0].text in _NOT_LAUNCHING:
        return None
    if _entry_of(ran.words) is None:
        return None
    return replace(_take_apart(ran.words, job), environment=ran.environment)


def _start_of_launch(words: Sequence[str], switches: Collection[str]) -> int | None:
    """Return the index of the first word of a launcher, or None where only flags were given."""
    for index, word in enumerate(words):
        name = word.rpartition("/")[2]
        before = words[index - 1] if index else ""
        if before.startswith("-") and "=" not in before and before not in switches:
            continue  # the value of a flag
        if name in _STARTING or processes.PYTHON.match(name) or name.endswith(".py"):
            return _with_environment(words, index)
    return None


def _with_environment(words: Sequence[str], index: int) -> int:
    """Return the index of the first ``NAME=value`` in front of a launcher."""
    while index and _ENVIRONMENT.fullmatch(words[index - 1]):
        index -= 1
    return index


def _entry_of(words: Sequence[Word]) -> tuple[int, str] | None:
    """Return the index behind the script or module that trains, and its name."""
    program: str | None = None
    for index, word in enumerate(words):
        named = processes.program_of(word.text)
        program = program if named is None else named
        runs_modules = program not in processes.WITHOUT_MODULES
        if word.text in ("-m", "--module") and runs_modules and index + 1 < len(words):
            module = words[index + 1].text
            if module not in processes.LAUNCHER_MODULES:
                return index + 2, module
        if word.text.endswith(".py"):
            return index + 1, word.text
    return None


def _take_apart(words: Sequence[Word], job: processes.Counts | None = None) -> Launch:
    found = _entry_of(words)
    if found is None:
        return Launch(tuple(words))
    end, entry = found
    environment = {
        match[1]: match[2] for word in words[:end] if (match := _ENVIRONMENT.fullmatch(word.text))
    }
    num_gpus = processes.number([word.text for word in words[:end]], job)
    return Launch(tuple(words[end:]), entry, num_gpus, environment=environment)
