"""How many processes a launch starts, by the options of its launchers and ``#SBATCH`` lines.

A count that is not written out (``--nnodes=$SLURM_NNODES``, ``--nproc-per-node=gpu``) is taken from
what the job asks for. Where that does not tell either, nothing is guessed. Standard library only.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

PYTHON = re.compile(r"(python[0-9.]*|pypy3?)$")
LAUNCHERS = ("torchrun", "srun", "mpirun", "mpiexec", "deepspeed", "accelerate")
LAUNCHER_MODULES = ("torch.distributed.run", "torch.distributed.launch")
# what may stand in front of another program, with options of its own: numactl -N 0, nice -n 10
WRAPPERS = ("env", "nohup", "numactl", "nice", "time", "timeout", "taskset", "stdbuf", "nsys")
_CONTAINERS = ("docker", "podman", "apptainer", "singularity", "enroot", "conda")
_RUNNERS = ("uv", "poetry", "pipenv", "pixi", "coverage")  # of Python
# their -m, where they have one, is no module
WITHOUT_MODULES = ("srun", "mpirun", "mpiexec", *WRAPPERS, *_CONTAINERS)
_UNKNOWN = ""  # the program is a variable without a value

Counts = dict[str, int | None]  # what is counted -> how many; None: given, but not as a number
# Slurm's nodes; its tasks and GPUs on each node, and in all; torchrun's nodes, and its processes on
# each; accelerate's processes in all
_NODES, _TASKS, _ALL_TASKS, _GPUS, _ALL_GPUS = "nodes", "tasks", "all_tasks", "gpus", "all_gpus"
_MEMBERS, _PROCESSES, _ALL = "members", "processes", "all"

_OF_TRAINERS = {
    "--nproc-per-node": _PROCESSES,
    "--nnodes": _MEMBERS,
    "--num-gpus": _PROCESSES,
    "--num-nodes": _MEMBERS,
    "--num-processes": _ALL,
}
_OF_SLURM = {
    "--nodes": _NODES,
    "--ntasks-per-node": _TASKS,
    "--tasks-per-node": _TASKS,
    "--ntasks": _ALL_TASKS,
    "--gpus-per-node": _GPUS,
    "--gres": _GPUS,
    "--gpus": _ALL_GPUS,
}
_SHORT = {"-N": _NODES, "-n": _ALL_TASKS, "-G": _ALL_GPUS}
_ATTACHED = re.compile(r"(-[NnG])(\d\S*)")
_OPTIONS = {  # of each program; the trainers' ones are looked for behind all of them
    "srun": {**_OF_SLURM, **_SHORT},
    "mpirun": {"-np": _ALL_TASKS, "-n": _ALL_TASKS},
    "mpiexec": {"-np": _ALL_TASKS, "-n": _ALL_TASKS},
    _UNKNOWN: _OF_SLURM,
}
_PROGRAMS = (*LAUNCHERS, *LAUNCHER_MODULES, *WRAPPERS, *_CONTAINERS, *_RUNNERS)


def program_of(word: str) -> str | None:
    """Return the program that a word names; empty: one that is not known; None: it names none."""
    name = word.rpartition("/")[2]
    if name in _PROGRAMS or PYTHON.match(name):
        return name
    return _UNKNOWN if word.startswith("$") else None


def of_job(script: str) -> Counts:
    """Return what the ``#SBATCH`` lines of a script ask for."""
    counts: Counts = {}
    for line in re.findall(r"^#SBATCH\s+(.*)$", script, flags=re.MULTILINE):
        try:
            words = shlex.split(line)
        except ValueError:  # a quote in a comment
            words = line.split()
        comment = next((i for i, word in enumerate(words) if word.startswith("#")), len(words))
        counts |= _read(words[:comment], "srun")
    return _shared_out(counts)


def number(words: Sequence[str], job: Counts | None = None) -> int | None:
    """Return the number of processes that a launch starts, or None where the text does not say.

    Args:
        words: of the launch, up to what trains.
        job: what the job asks for that it is in, see `of_job`.
    """
    own = _read(words, _UNKNOWN)
    counts = _shared_out(_merged(job or {}, own))
    if counts.get(_ALL):
        return counts[_ALL]
    nodes = _first_known(counts, _NODES)
    is_torchrun = any(word.rpartition("/")[2] in ("torchrun", *LAUNCHER_MODULES) for word in words)
    if is_torchrun or _PROCESSES in counts:
        members = _first_known(counts, _MEMBERS, _NODES)
        on_each = counts.get(_PROCESSES, 1)  # torchrun's default
        return _times(on_each, members) if on_each else _gpus(counts, members)
    if started := _tasks(own, nodes):
        return started
    if job and {_GPUS, _ALL_GPUS} & job.keys():
        # where it cannot be read not by tasks either: they may be one a node
        return _gpus(job, nodes)
    return _tasks(counts, nodes)


def _read(words: Sequence[str], program: str) -> Counts:
    """Return the counts among a program's words, and those of the programs that it starts."""
    counts: Counts = {}
    for index, word in enumerate(words):
        if (named := program_of(word)) is not None:
            program = named
            continue
        option, equals, value = word.partition("=")
        if match := _ATTACHED.fullmatch(word):
            option, equals, value = match[1], "=", match[2]
        known = {**_OF_TRAINERS, **_OPTIONS.get(program, {})}
        what = known.get(option.replace("_", "-"))
        if what is None:
            continue
        if not equals:
            value = words[index + 1] if index + 1 < len(words) else ""
        if option == "--gres":
            if "gpu" in value or "$" in value:  # else it is about something else
                counts[what] = _gpus_of_gres(value)
        else:
            counts[what] = _sum_of_types(value) if what in (_GPUS, _ALL_GPUS) else _whole(value)
    return counts


def _merged(job: Counts, own: Counts) -> Counts:
    """Return a launch's own counts, and the job's where it has none that can be read."""
    readable = {name: count for name, count in own.items() if count is not None}
    taken = dict(job)
    for group in ({_TASKS, _ALL_TASKS}, {_GPUS, _ALL_GPUS}):
        if group & readable.keys():
            taken = {name: count for name, count in taken.items() if name not in group}
    return {**own, **taken, **readable}


def _shared_out(counts: Counts) -> Counts:
    """Return GPUs in all as those of each node, where the nodes are known."""
    total, nodes = counts.get(_ALL_GPUS), counts.get(_NODES)
    if not total or not nodes or total % nodes:
        return counts
    rest = {name: count for name, count in counts.items() if name != _ALL_GPUS}
    return {_GPUS: total // nodes, **rest}


def _first_known(counts: Mapping[str, int | None], *names: str) -> int | None:
    """Return the first count that can be read; 1 where none is given, None where none can be."""
    given = [counts[name] for name in names if name in counts]
    return next((count for count in given if count), None) if given else 1


def _tasks(counts: Counts, nodes: int | None) -> int | None:
    if counts.get(_ALL_TASKS):
        return counts[_ALL_TASKS]
    return _times(counts.get(_TASKS), nodes)


def _gpus(counts: Counts, members: int | None) -> int | None:
    """Return the GPUs of as many nodes."""
    return _times(counts.get(_GPUS), members) or counts.get(_ALL_GPUS)


def _times(on_each: int | None, nodes: int | None) -> int | None:
    return on_each * nodes if on_each and nodes else None


def _gpus_of_gres(text: str) -> int | None:
    """Return the GPUs of ``gpu:h100:8(S:0-1),nvme:1``; ``gpu`` and ``gpu:h100`` are one."""
    items = re.sub(r"\([^)]*\)", "", text).split(",")
    total = 0
    for name, *rest in (item.split(":") for item in items):
        if "$" in name or any("$" in part for part in rest):
            return None
        if name == "gpu":
            total += int(rest[-1]) if rest and rest[-1].isdigit() else 1
    return total


def _sum_of_types(text: str) -> int | None:
    """Return the GPUs of ``8``, ``h100:8``, ``gpu:h100:8`` or ``a100:4,h100:4``."""
    counts = [_whole(item.rpartition(":")[2]) for item in text.split(",")]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _whole(text: str) -> int | None:
    """Return a count; ``2:4`` (elastic), ``2-4``, ``gpu`` and variables count None."""
    return int(text) if text.isdigit() else None
