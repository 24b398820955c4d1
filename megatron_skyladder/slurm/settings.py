"""What a SLURM run is: read from an example file, kept in the run folder as JSON.

An example file is INI text; ``examples/slurm/`` has some, with comments.
"""

from __future__ import annotations

import configparser
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_skyladder.planning.examples import DEFAULT_GPU, example
from megatron_skyladder.planning.layouts import GPUS_PER_NODE
from megatron_skyladder.slurm import masking

FILE_NAME = "settings.json"
DEFAULT_ENTRY = "megatron_skyladder.pretrain_gpt"
BRIDGE_ENTRY = "megatron_skyladder.megatron_bridge"  # which takes overrides in the place of flags
NO_VALUE = "\0"  # of a key without "=", which is not the same as an empty one
KINDS = ("bare", "pyxis", "apptainer")
# [section] -> the keys it knows; [slurm] takes every long option of sbatch beside these
SECTIONS: dict[str, tuple[str, ...]] = {
    "run": ("example", "variant", "gpu", "shrink", "flags", "entry", "folder"),
    "slurm": ("nodes", "gpus-per-node", "ranks-per-node"),
    "environment": ("kind", "image", "mounts", "setup", "python"),
    "survival": ("signal-seconds", "max-tries"),
    "evaluate": (
        *("data", "out", "name", "checkpoints", "tasks", "length", "full", "python", "setup"),
        *("gpus", "cpus", "time", "backend", "batch-size"),
    ),
    "variables": (),
}
_CLOSED = ("run", "environment", "survival", "evaluate")  # sections that take no other keys
LATEST = "latest"
_GPUS = re.compile(r"(?:([A-Za-z][\w.-]*):)?(\d+)", re.ASCII)  # of a node: 8, or h100:8
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)  # of a shell's variable
# $NAME, ${NAME}, ${NAME:-...}; not ${a.b}, which Bridge's overrides may have
_REFERENCE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*(?:[-:+=?#%][^}]*)?\})", re.ASCII)


@dataclass(frozen=True)
class Environment:
    """Where the processes of a job run.

    Args:
        kind: ``bare`` (the node itself), ``pyxis`` (srun starts the container) or ``apptainer``.
        image: the container's; empty for ``bare``.
        mounts: ``SOURCE:TARGET``, or one path for both.
        setup: shell lines before Python, inside the container if there is one.
        python: the interpreter after these lines.
        variables: set for the whole job.
        passed: names of variables that a job gets from the environment of sbatch: secrets, and
            what the file names without "=". Their values are written nowhere.
    """

    kind: str = "bare"
    image: str = ""
    mounts: tuple[str, ...] = ()
    setup: str = ""
    python: str = "python"
    variables: dict[str, str] = field(default_factory=dict)
    passed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated once a run is finished: an array, one task for each checkpoint and group.

    Args:
        data: the folder that ``skyladder evaluate --prepare`` wrote.
        out: gets a folder for each checkpoint.
        name: of the run, in tables and in the names of these folders.
        checkpoints: iterations; `LATEST` is the newest that there is when the task starts.
        groups: what a job evaluates: suites or tasks, joined by commas.
        options: further words of ``skyladder evaluate``.
        gpus: of a job; 0: none are asked for, and it runs on the CPU.
        gpu_type: which ones; empty: training's.
        time: limit of a job.
        python: the interpreter, where it is another one than training's.
        setup: shell lines before it, likewise.
        cpus: of a job; 0: a GPU's share of training's, or what the cluster gives.
    """

    data: str
    out: str
    name: str
    checkpoints: tuple[str, ...] = (LATEST,)
    groups: tuple[str, ...] = ("standard", "long")
    options: tuple[str, ...] = ()
    gpus: int = 1
    time: str = "04:00:00"
    python: str = ""
    setup: str = ""
    cpus: int = 0
    gpu_type: str = ""

    @property
    def num_jobs(self) -> int:
        """Tasks of the array."""
        return len(self.checkpoints) * len(self.groups)


@dataclass(frozen=True)
class Settings:
    """A run under SLURM, resolved.

    Args:
        folder: gets everything the run writes.
        flags: of Megatron and SkyLadder.
        entry: module or script that trains.
        nodes: of one job.
        ranks_per_node: processes; one per GPU.
        gpus_per_node: 0: none are asked for.
        gpu_type: as sbatch knows it, in front of their number; empty: any.
        sbatch: further options of sbatch, by their long names.
        environment: where processes run.
        signal_seconds: how long before the time limit a job starts to save.
        max_tries: failures in a row, without a new checkpoint, after which nothing is tried again.
        secrets: values that the example file gives to some of the passed variables; they go to
            sbatch, and into no file.
        evaluation: what follows training; None: nothing.
    """

    folder: str
    flags: tuple[str, ...]
    entry: str
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    sbatch: dict[str, str]
    environment: Environment
    signal_seconds: int = 600
    max_tries: int = 3
    secrets: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    evaluation: Evaluation | None = None
    gpu_type: str = ""

    @property
    def num_ranks(self) -> int:
        """Processes of a job."""
        return self.nodes * self.ranks_per_node

    def to_json(self) -> str:
        """Return it as text for the run folder, without secrets."""
        values = asdict(self)
        del values["secrets"]
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """Read the settings of a run folder.

        Raises:
            FileNotFoundError: it is not one.
        """
        values = json.loads((folder / FILE_NAME).read_text())
        environment = values.pop("environment")
        for name in ("mounts", "passed"):
            environment[name] = tuple(environment.get(name, ()))
        evaluation = values.pop("evaluation", None)
        if evaluation is not None:
            for name in ("checkpoints", "groups", "options"):
                evaluation[name] = tuple(evaluation[name])
            values["evaluation"] = Evaluation(**evaluation)
        return cls(
            **{**values, "flags": tuple(values["flags"]), "environment": Environment(**environment)}
        )


def from_file(path: Path, overrides: Mapping[tuple[str, str], Any], flags: list[str]) -> Settings:
    """Read an example file.

    Args:
        path: the file.
        overrides: (section, key) -> value in place of the file's; None: the file's.
        flags: added to Megatron's command line.

    Raises:
        ValueError: the file says something unknown, or something is missing.
    """
    sections = _read_sections(path)
    for (section, key), value in overrides.items():
        if value is not None:
            sections[section][key] = str(value)
    run, slurm = sections["run"], sections["slurm"]
    example_flags = _example_flags(run)
    gpu_type, gpus_per_node = _gpus(slurm, "gpus-per-node", GPUS_PER_NODE)
    ranks_per_node = _integer(slurm, "ranks-per-node", gpus_per_node)
    all_flags = (*example_flags, *_flags(run), *flags)
    _refuse_secrets(sections, all_flags)
    _refuse_references(sections)
    variables, passed, given = _split_variables(sections["variables"])
    folder = _folder(run, path)
    return Settings(
        folder=str(folder),
        flags=all_flags,
        entry=run.get("entry", DEFAULT_ENTRY),
        nodes=_integer(slurm, "nodes", 1),
        ranks_per_node=ranks_per_node,
        gpus_per_node=gpus_per_node,
        sbatch={k: v for k, v in slurm.items() if k not in SECTIONS["slurm"]},
        environment=_environment(sections["environment"], variables, passed),
        signal_seconds=_integer(sections["survival"], "signal-seconds", 600),
        max_tries=_integer(sections["survival"], "max-tries", 3),
        secrets=given,
        evaluation=_evaluation(sections["evaluate"], folder, path),
        gpu_type=gpu_type,
    )


def _read_sections(path: Path) -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser(
        interpolation=None, inline_comment_prefixes=("#",), allow_no_value=True
    )
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # variables have capitals
    try:
        parser.read_string(path.read_text(encoding="utf-8-sig"), source=str(path))
    except configparser.Error as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    unknown = set(parser.sections()) - SECTIONS.keys()
    if unknown:
        raise ValueError(
            f"{path} has a section [{min(unknown)}]. Known are: {', '.join(SECTIONS)}."
        )
    sections = {
        name: {key: NO_VALUE if value is None else value for key, value in parser[name].items()}
        if name in parser
        else {}
        for name in SECTIONS
    }
    sections["slurm"] = {key: value.strip(NO_VALUE) for key, value in sections["slurm"].items()}
    for name in _CLOSED:
        bare = next((key for key, value in sections[name].items() if value == NO_VALUE), None)
        if bare in SECTIONS[name]:
            raise ValueError(f"{path} has {bare} in [{name}] without a value: give {bare} = ...")
    for name, keys in SECTIONS.items():
        wrong = [key for key in sections[name] if key not in keys]
        if name in _CLOSED and wrong:
            raise ValueError(
                f"{path} has {wrong[0]} in [{name}]. Known there are: {', '.join(keys)}."
            )
    return sections


def _example_flags(run: dict[str, str]) -> list[str]:
    if "example" not in run:
        if any(key in run for key in ("variant", "gpu", "shrink")):
            raise ValueError("[run] has a variant, gpu or shrink, but no example they belong to.")
        return []
    return example(
        run["example"],
        run.get("variant", "skyladder"),
        gpu=run.get("gpu", DEFAULT_GPU),
        shrink=_boolean(run, "shrink"),
    ).words


def _flags(run: dict[str, str]) -> list[str]:
    """Return the file's flags, with ~ at the start of a value as the folder's."""
    words = [word.partition("=") for word in shlex.split(run.get("flags", ""))]
    return [f"{_at_home(name)}{sign}{_at_home(value)}" for name, sign, value in words]


def _folder(run: dict[str, str], path: Path) -> Path:
    if "folder" not in run:
        raise ValueError(
            f"{path} names no folder in [run]. Give one that all nodes see, such as "
            "folder = /scratch/me/1b-8k, or --run-dir."
        )
    folder = _absolute(run["folder"])
    if any(character.isspace() or character in "%'\"$\\:," for character in str(folder)):
        raise ValueError(
            f"the run folder {folder} has a character that job scripts or containers stumble over. "
            "Give a path without spaces, quotes, %, $, \\, : and commas."
        )
    return folder


def _evaluation(section: dict[str, str], run: Path, path: Path) -> Evaluation | None:
    if not section:
        return None
    if "data" not in section:
        raise ValueError(
            f"{path} names no data in [evaluate]. Give the folder that skyladder evaluate "
            "--prepare wrote: data = /data/evaluation."
        )
    iterations = tuple(section.get("checkpoints", LATEST).split())
    wrong = [each for each in iterations if each != LATEST and not each.isdigit()]
    if wrong or not iterations:
        raise ValueError(
            f"checkpoints = {' '.join(iterations)} in [evaluate]: give iterations that are kept, "
            f"such as 20000 40000, and {LATEST}."
        )
    groups = tuple(section.get("tasks", "standard long").split())
    if not groups:
        raise ValueError("tasks in [evaluate] is empty. Give groups, such as standard long.")
    gpu_type, gpus = _gpus(section, "gpus", 1)
    options = ["--length", str(_integer(section, "length", 8192))]
    options += ["--full"] if _boolean(section, "full") else []
    for key in ("backend", "batch-size"):
        options += [f"--{key}", section[key]] if key in section else []
    options += ["--device", "cuda" if gpus else "cpu"]
    return Evaluation(
        data=str(_absolute(section["data"])),
        out=_out(section, run),
        name=_name(section, run),
        checkpoints=tuple(each if each == LATEST else str(int(each)) for each in iterations),
        groups=groups,
        options=tuple(options),
        gpus=gpus,
        time=section.get("time", Evaluation.time),
        python=_at_home(section.get("python", "")),
        setup=section.get("setup", "").strip(),
        cpus=_integer(section, "cpus", 1) if "cpus" in section else 0,
        gpu_type=gpu_type,
    )


def _name(section: dict[str, str], run: Path) -> str:
    """Return the name that results go under: of folders, of a job, and a word of commands."""
    name = section.get("name", run.name)
    if not re.fullmatch(r"[^\s#%/\\'\"$,:.-][^\s#%/\\'\"$,:]*", name):
        given = f"name = {name}" if "name" in section else f"no name, and the run folder is {name}"
        raise ValueError(
            f"[evaluate] has {given}: results go into a folder of that name, and the job has it. "
            "Give a name = ... that does not start with a dot or a dash, without spaces, quotes, "
            "#, %, /, $, \\, : and commas."
        )
    return name


def _out(section: dict[str, str], run: Path) -> str:
    out = str(_absolute(section.get("out", str(run / "evaluation"))))
    if any(character in "%'\"$\\:,\n" for character in out):
        raise ValueError(
            f"out = {out} in [evaluate] has a character that sbatch or containers stumble over. "
            "Give a path without quotes, %, $, \\, : and commas."
        )
    return out


def _absolute(text: str) -> Path:
    path = Path(text).expanduser()
    return path if path.is_absolute() else Path.cwd() / path


def _at_home(text: str) -> str:
    """Return a path, or several between colons, with the home folder for ~ as a shell has it."""
    return re.sub(r"(^|:)~(?=[/:]|$)", lambda start: f"{start[1]}{Path.home()}", text)


def _refuse_references(sections: dict[str, dict[str, str]]) -> None:
    """Refuse a shell's variables where no shell expands them: the job would get the letters."""
    places = {
        "run": ("flags", "entry"),
        "environment": ("python", "image", "mounts"),
        "evaluate": ("python", "data"),
        "variables": tuple(sections["variables"]),
    }
    for section, keys in places.items():
        for key in keys:
            value = sections[section].get(key, "")
            # a password may have a dollar
            secret = section == "variables" and masking.is_secret(key, value)
            found = _REFERENCE.fullmatch(value) if secret else _REFERENCE.search(value)
            if found is None:
                continue
            advice = "Write out its value."
            if secret or value.strip("${}") == key:
                advice = f"To take {key} from the shell that submits, give its name without =."
            elif section == "variables":
                advice = f"Let setup in [environment] do it: export {key}={value}"
            raise ValueError(
                f"{key} in [{section}] has {found[0]}, which nothing expands. {advice}"
            )


def _refuse_secrets(sections: dict[str, dict[str, str]], flags: Sequence[str]) -> None:
    """Refuse secrets where their values would be written down; [variables] handles its own."""
    masking.refuse(shlex.join(flags), "flags in [run]")
    for section in ("slurm", "environment", "evaluate"):
        for key, value in sections[section].items():
            masking.refuse(value, f"{key} in [{section}]")


def _split_variables(
    section: dict[str, str],
) -> tuple[dict[str, str], tuple[str, ...], dict[str, str]]:
    """Return variables to write down, names to pass on, and values given for some of these.

    Raises:
        ValueError: a name that a shell does not take, which would end the job script.
    """
    wrong = next((name for name in section if not _NAME.fullmatch(name)), None)
    if wrong is not None:
        raise ValueError(
            f"[variables] has {wrong!r}, which is no name of a variable. Give NAME = VALUE, or the "
            "NAME alone to take its value from the shell that submits, without export."
        )
    passed = {n: v for n, v in section.items() if v == NO_VALUE or masking.is_secret(n, v)}
    written = {name: _at_home(value) for name, value in section.items() if name not in passed}
    given = {name: value for name, value in passed.items() if value not in ("", NO_VALUE)}
    return written, tuple(passed), given


def _environment(
    section: dict[str, str], variables: dict[str, str], passed: tuple[str, ...]
) -> Environment:
    kind, image = section.get("kind", "bare"), section.get("image", "")
    if kind not in KINDS:
        raise ValueError(f"kind = {kind} in [environment] is unknown. Choose: {', '.join(KINDS)}.")
    if (kind == "bare") == bool(image):
        needs = "takes no image" if image else "needs an image"
        raise ValueError(f"kind = {kind} in [environment] {needs}.")
    return Environment(
        kind=kind,
        image=_at_home(image),
        mounts=tuple(_at_home(mount) for mount in section.get("mounts", "").split()),
        setup=section.get("setup", "").strip(),
        python=_at_home(section.get("python", "python")),
        variables=variables,
        passed=passed,
    )


def _gpus(section: dict[str, str], key: str, default: int) -> tuple[str, int]:
    """Return type, which may be empty, and number of GPUs."""
    found = _GPUS.fullmatch(section.get(key, str(default)))
    if found is None:
        raise ValueError(
            f"{key} = {section[key]} in the example file: give a whole number from 0, or a type "
            "and a number, such as h100:8. What else training asks for goes into gres, beside "
            "gpus-per-node = 0 and ranks-per-node."
        )
    return found[1] or "", int(found[2])


def _integer(section: dict[str, str], key: str, default: int, least: int = 1) -> int:
    text = section.get(key, str(default))
    if not text.isdigit() or int(text) < least:
        raise ValueError(f"{key} = {text} in the example file: give a whole number from {least}.")
    return int(text)


def _boolean(section: dict[str, str], key: str) -> bool:
    text = section.get(key, "no").lower()
    if text not in ("yes", "no", "true", "false"):
        raise ValueError(f"{key} = {text} in the example file: give yes or no.")
    return text in ("yes", "true")
