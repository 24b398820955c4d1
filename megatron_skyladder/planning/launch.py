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

from megatron_skyladder.planning import shell
from megatron_skyladder.planning.shell import Word

ENTRY_POINT = "megatron_skyladder.pretrain_gpt"
_LAUNCHERS = ("torchrun", "srun", "mpirun", "mpiexec", "deepspeed", "accelerate", "env", "nohup")
_PYTHON = re.compile(r"(python[0-9.]*|pypy3?)$")
_LAUNCHER_MODULES = ("torch.distributed.run", "torch.distributed.launch")
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
# option of a launcher -> what it counts; several nodes or processes multiply
_COUNTS = {
    "--nproc-per-node": "per_node",
    "--nproc_per_node": "per_node",
    "--nnodes": "nodes",
    "--num_processes": "all",
    "--num_gpus": "per_node",
    "--num_nodes": "nodes",
    "--nodes": "nodes",
    "-N": "nodes",
    "--ntasks-per-node": "tasks",
    "--ntasks": "all_tasks",
    "-n": "all_tasks",
    "-np": "all_tasks",
    "--gpus-per-node": "gpus",
    "--gres": "gpus",
}
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
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    interpreter = shell.Interpreter(dict(values))
    try:
        interpreter.run(shell.parse(text))
    except shell.ShellError as error:
        raise ValueError(
            f"{path} cannot be read as a shell script: {error} Paste the command instead: "
            "torchrun ... pretrain_gpt.py <flags>."
        ) from None
    launches = [launch for ran in interpreter.commands if (launch := _launch_of(ran)) is not None]
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
    num_gpus = chosen.num_gpus or _gpus_of_job(text)
    return replace(chosen, source=Path(path).name, num_gpus=num_gpus, notes=tuple(notes))


def _launch_of(ran: shell.Ran) -> Launch | None:
    """Return the launch that a command is, or None."""
    if not ran.words or ran.words[0].text in _NOT_LAUNCHING:
        return None
    if _entry_of(ran.words) is None:
        return None
    return replace(_take_apart(ran.words), environment=ran.environment)


def _start_of_launch(words: Sequence[str], switches: Collection[str]) -> int | None:
    """Return the index of the first word of a launcher, or None where only flags were given."""
    for index, word in enumerate(words):
        name = word.rpartition("/")[2]
        before = words[index - 1] if index else ""
        if before.startswith("-") and "=" not in before and before not in switches:
            continue  # the value of a flag
        if name in _LAUNCHERS or _PYTHON.match(name) or name.endswith(".py"):
            return _with_environment(words, index)
    return None


def _with_environment(words: Sequence[str], index: int) -> int:
    """Return the index of the first ``NAME=value`` in front of a launcher."""
    while index and _ENVIRONMENT.fullmatch(words[index - 1]):
        index -= 1
    return index


def _entry_of(words: Sequence[Word]) -> tuple[int, str] | None:
    """Return the index behind the script or module that trains, and its name."""
    for index, word in enumerate(words):
        if word.text in ("-m", "--module") and index + 1 < len(words):
            module = words[index + 1].text
            if module not in _LAUNCHER_MODULES:
                return index + 2, module
        if word.text.endswith(".py"):
            return index + 1, word.text
    return None


def _take_apart(words: Sequence[Word]) -> Launch:
    found = _entry_of(words)
    if found is None:
        return Launch(tuple(words))
    end, entry = found
    environment = {
        match[1]: match[2] for word in words[:end] if (match := _ENVIRONMENT.fullmatch(word.text))
    }
    return Launch(tuple(words[end:]), entry, _num_gpus(words[:end]), environment=environment)


def _num_gpus(words: Sequence[Word]) -> int | None:
    """Return the number of processes that launchers start, or None."""
    counts: dict[str, int | None] = {}
    for index, word in enumerate(words):
        name, equals, value = word.text.partition("=")
        if name in _COUNTS:
            if not equals:
                value = words[index + 1].text if index + 1 < len(words) else ""
            counts[_COUNTS[name]] = _whole(value)
    names = {word.text.rpartition("/")[2] for word in words}
    if None in counts.values():
        return None
    known: dict[str, int] = {name: count for name, count in counts.items() if count is not None}
    nodes = known.get("nodes", 1)
    if "all" in known:
        return known["all"]
    if "per_node" in known:  # torchrun, perhaps once on each node under srun
        return known["per_node"] * nodes
    if names & {"torchrun"} or any(word.text in _LAUNCHER_MODULES for word in words):
        return nodes  # one process a node is torchrun's default
    if "all_tasks" in known:
        return known["all_tasks"]
    if "tasks" in known:
        return known["tasks"] * nodes
    return None


def _whole(text: str) -> int | None:
    """Return a count; ``gpu:h100:8`` counts 8, ``2:4`` (elastic) and names count None."""
    if text.startswith("gpu:"):
        text = text.rpartition(":")[2]
    return int(text) if text.isdigit() else None


def _gpus_of_job(text: str) -> int | None:
    """Return the GPUs that the ``#SBATCH`` lines of a script ask for, or None."""
    counts: dict[str, int | None] = {}
    for line in re.findall(r"^#SBATCH\s+(.*)$", text, flags=re.MULTILINE):
        match = re.match(r"(--?[\w-]+)[=\s]*([^\s#]*)", line)
        if match and match[1] in _COUNTS:
            counts[_COUNTS[match[1]]] = _whole(match[2])
    per_node = counts.get("gpus") or counts.get("tasks")
    nodes = counts.get("nodes", 1)
    return per_node * nodes if per_node and nodes else None
