"""From settings to a job script, a run folder, and jobs."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_skyladder.files import write_text
from megatron_skyladder.slurm.attempts import RunFolder
from megatron_skyladder.slurm.flags import by_flag
from megatron_skyladder.slurm.settings import FILE_NAME, Environment, Settings

BEGIN, END = "# <settings>\n", "# </settings>\n"
SCRIPT_NAME = "job.sbatch"
# what the job script itself relies on; an example file may not set it otherwise
OWNED = (
    "job-name",
    "ntasks",
    "ntasks-per-node",
    "output",
    "error",
    "open-mode",
    "requeue",
    "no-requeue",
    "signal",
    "dependency",
    "array",
    "chdir",
    "wrap",
)
# variables that say which cluster to talk to, and how; other SLURM_... are a job's
OF_CLUSTERS = (
    "SLURM_CLUSTERS",
    "SLURM_CONF",
    "SLURM_CONF_SERVER",
    "SLURM_JWT",
    "SLURM_SACK_SOCKET",
)
_JOB_LINE = re.compile(r"\d+(;.*)?")  # of sbatch --parsable: the id, and the cluster's name
FSDP_FLAGS = {"--use-torch-fsdp2", "--use-megatron-fsdp"}

logger = logging.getLogger(__name__)


def template(name: str = SCRIPT_NAME) -> Path:
    """Return a job script without settings: installed with the package, or beside it."""
    installed = Path(__file__).with_name("template") / name
    repository = Path(__file__).parents[2]
    return installed if installed.is_file() else repository / "slurm" / name


def filled(name: str, lines: Iterable[str]) -> str:
    """Return a job script with lines in the place of its settings."""
    before, _, rest = template(name).read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n".join(lines) + "\n" + END + after


def job_script(settings: Settings, *, jobs: int | None = None, array: bool = False) -> str:
    """Return the text to submit.

    Args:
        settings: of the run.
        jobs: how many, one after the other, where each goes on with what the one before it left;
            None: one, which is requeued at its time limit.
        array: whether these are the tasks of one job array.

    Raises:
        ValueError: an option of sbatch that is ours to set.
    """
    options = job_options(settings, jobs=jobs, array=array)
    return filled(SCRIPT_NAME, [*directives(options), "", *_assignments(settings, jobs)])


def job_options(
    settings: Settings, *, jobs: int | None = None, array: bool = False
) -> dict[str, str]:
    """Return the options of sbatch for training, by their long names; see `job_script`.

    Raises:
        ValueError: one that is ours to set, or that sbatch would not read as it is meant.
    """
    wrong = [name for name in settings.sbatch if name in OWNED]
    if wrong:
        raise ValueError(
            f"{wrong[0]} in [slurm] is set by the job script, which relies on it. Leave it out; "
            "the keys signal-seconds and folder, and --chain or --array, decide it."
        )
    if "gres" in settings.sbatch and settings.gpus_per_node:
        raise ValueError(
            "gres and gpus-per-node in [slurm] both ask for GPUs. Give gpus-per-node = 0 and "
            "ranks-per-node beside gres, or leave gres out."
        )
    folder = Path(settings.folder)
    options: dict[str, Any] = {
        "job-name": folder.name,
        "nodes": settings.nodes,
        "ntasks-per-node": 1,
    }
    if settings.gpus_per_node:
        options["gpus-per-node"] = typed(settings.gpu_type, settings.gpus_per_node)
    options |= settings.sbatch
    options |= {
        "output": folder / ("slurm-%A_%a.out" if array else "slurm-%j.out"),
        "open-mode": "append",  # a requeued job keeps its log
        "requeue": "",  # where a node fails or the job is preempted
        "signal": f"B:USR1@{settings.signal_seconds}",  # B: to the script alone
        # not beside another job of the run; what this does not cover, the script looks for itself
        "dependency": "singleton",
    }
    if array:
        options["array"] = f"1-{jobs}%1"
    return one_line_each(options)


def typed(gpu_type: str, gpus: int) -> str:
    """Return what sbatch is asked for: h100:8, or 8."""
    return f"{gpu_type}:{gpus}" if gpu_type else str(gpus)


def one_line_each(options: Mapping[str, Any]) -> dict[str, str]:
    """Return options with their values as sbatch takes them: without quotes around, or backslashes.

    Raises:
        ValueError: one has several lines. The second would be a command of the script, and behind
            the first command sbatch reads no directive.
    """
    return {name: _one_line(name, str(value)) for name, value in options.items()}


def _one_line(name: str, value: str) -> str:
    lines = [line.strip() for line in value.splitlines() if line.strip()]
    if len(lines) > 1:
        raise ValueError(
            f"{name} has {len(lines)} lines ({', '.join(lines)}), and sbatch reads an option from "
            f"one. Write it on one line; a list has commas: {name} = {','.join(lines)}."
        )
    text = "".join(lines)
    quoted = len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]
    return re.sub(r"\\(.)", r"\1", text[1:-1] if quoted else text)


def directives(options: Mapping[str, str]) -> Iterable[str]:
    """Return options of sbatch as lines of a script; an empty value makes a switch.

    sbatch ends a value at a blank or a #, but for those in quotes, where a backslash escapes.
    """
    for name, value in options.items():
        if re.search(r"""[\s#'"\\]""", value):
            escaped = value.replace("\\", "\\\\").replace('"', '\\"')
            yield f'#SBATCH --{name}="{escaped}"'
        else:
            yield f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}"


def on_command_line(options: Mapping[str, str]) -> list[str]:
    """Return options as words, beside the same in the script: variables (SBATCH_...) beat those."""
    return [f"--{name}={value}" if value else f"--{name}" for name, value in options.items()]


def _assignments(settings: Settings, jobs: int | None) -> Iterable[str]:
    environment = settings.environment
    yield f"RUN_DIR={shlex.quote(settings.folder)}"
    yield f"AFTER={'requeue' if jobs is None else 'next'}"
    yield f"PYTHON={shlex.quote(environment.python)}"
    yield "# shellcheck disable=SC2016  # it expands where it runs"
    yield f"SETUP={shlex.quote(environment.setup)}"
    options, prefix = container(settings)
    yield f"SRUN_OPTIONS=({words(options)})"
    yield f"PREFIX=({words(prefix)})"
    yield f"PASSED=({words(list(environment.passed))})"
    for name, value in {**_variables_of(settings), **environment.variables}.items():
        yield f"export {name}={shlex.quote(value)}"


def _variables_of(settings: Settings) -> dict[str, str]:
    """Return what the run's flags need otherwise than the script's default."""
    if by_flag(settings.flags).keys() & FSDP_FLAGS:
        return {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}  # Megatron refuses 1 here; 8 is CUDA's default
    return {}


def words(given: Iterable[str]) -> str:
    """Return words for a shell array, all in quotes: a comma outside looks like a slip."""
    return " ".join("'" + word.replace("'", "'\\''") + "'" for word in given)


def container(settings: Settings) -> tuple[list[str], list[str]]:
    """Return the options of srun, and the command in front of what it starts."""
    environment = settings.environment
    mounts = [f"{path}:{path}" if ":" not in path else path for path in environment.mounts]
    mounts.insert(0, f"{settings.folder}:{settings.folder}")
    if environment.kind == "pyxis":
        image = f"--container-image={environment.image}"
        return [image, f"--container-mounts={','.join(mounts)}"], []
    if environment.kind == "apptainer":
        binds = [word for mount in mounts for word in ("--bind", mount)]
        nvidia = ["--nv"] if settings.gpus_per_node else []
        return [], ["apptainer", "exec", *nvidia, *binds, environment.image]
    return [], []


def write_run_folder(settings: Settings, script: str, *, allow_changes: bool = False) -> None:
    """Write what a job needs into the run folder.

    Raises:
        ValueError: the folder has a run with another command line.
    """
    run = RunFolder(Path(settings.folder))
    known = run.path / FILE_NAME
    if known.exists():
        earlier = Settings.read(run.path)
        changes = _changes(earlier, settings)
        if changes and not allow_changes:
            raise ValueError(
                f"{run.path} has a run with other settings:\n  "
                + "\n  ".join(changes)
                + "\nGive another --run-dir, or --allow-changes to go on with the new ones."
            )
        for change in (
            *changes,
            *_changes_of_environment(earlier.environment, settings.environment),
        ):
            logger.warning("changed in %s: %s", run.path, change)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    write_text(known, settings.to_json())
    write_text(run.path / SCRIPT_NAME, script)
    (run.path / "submitted").touch()


def _changes(old: Settings, new: Settings) -> list[str]:
    """Return what differs in what is trained; nodes, partitions and times may change freely."""
    if (old.flags, old.entry) == (new.flags, new.entry):
        return []
    changes = []
    if old.entry != new.entry:
        changes.append(f"entry: {old.entry} -> {new.entry}")
    before, after = by_flag(old.flags), by_flag(new.flags)
    for flag in sorted(before.keys() | after.keys()):
        if before.get(flag) != after.get(flag):
            changes.append(f"{flag}: {before.get(flag, 'absent')} -> {after.get(flag, 'absent')}")
    return changes


def _changes_of_environment(old: Environment, new: Environment) -> list[str]:
    """Return what the next job finds otherwise; it may, but not without a word."""
    before, after = asdict(old), asdict(new)
    names = [name for name in before if name != "variables" and before[name] != after[name]]
    changes = [f"[environment] {name}: {before[name]!r} -> {after[name]!r}" for name in names]
    for name in sorted(old.variables.keys() | new.variables.keys()):
        given = [each.variables.get(name, "absent") for each in (old, new)]
        if given[0] != given[1]:
            changes.append(f"[variables] {name}: {given[0]} -> {given[1]}")
    return changes


def submit_run(
    settings: Settings,
    script: str,
    *,
    jobs: int | None = None,
    array: bool = False,
    allow_changes: bool = False,
) -> list[str]:
    """Write the run folder, submit its script and return the jobs' ids.

    Where nothing is submitted, the folder is left as it was found. Where that is not known, as the
    controller did not answer in time or somebody pressed Ctrl-C, it is ready for the job.

    Args:
        settings: of the run.
        script: what `job_script` made of them.
        jobs: see there.
        array: see there.
        allow_changes: see `write_run_folder`.

    Raises:
        ValueError: the folder has another run, a variable is missing, sbatch refuses a job, or it
            is interrupted.
    """
    options = job_options(settings, jobs=jobs, array=array)
    _need_sbatch()
    _check_passed(settings)
    files = _FilesBefore(Path(settings.folder))
    times = 1 if array or jobs is None else jobs
    ids: list[str] = []
    try:
        write_run_folder(settings, script, allow_changes=allow_changes)
        path = Path(settings.folder) / SCRIPT_NAME
        for _ in range(times):
            ids.append(submit_script(settings, path, options))
    except (ValueError, OSError, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        why = "interrupted while sbatch was at work" if interrupted else str(error)
        # the controller may have taken the job all the same
        unsure = interrupted or isinstance(error, UnclearAnswer) or "timed out" in why
        look = f"Look with squeue --name={Path(settings.folder).name} whether"
        if ids:
            one_more = f" {look} there is one more." if unsure else ""
            raise ValueError(
                f"{why}\n{len(ids)} of {times} jobs are submitted ({', '.join(ids)}) and will "
                f"train.{one_more} Give the command again with the number that is missing, or "
                "scancel them."
            ) from None
        if unsure:
            raise ValueError(
                f"{why}\n{look} the job is there before you submit again. If it is not: the run "
                "folder has the settings of this command, so give it again, or another one with "
                "--allow-changes."
            ) from None
        files.restore()
        raise
    return ids


class _FilesBefore:
    """What a run folder held before a submission, to put it back."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._there = {path for path in (folder, RunFolder(folder).checkpoints) if path.exists()}
        self._texts = {
            path: path.read_text() if path.exists() else None
            for path in (folder / FILE_NAME, folder / SCRIPT_NAME)
        }
        submitted = folder / "submitted"
        self._submitted = submitted.stat().st_mtime_ns if submitted.exists() else None

    def restore(self) -> None:
        """Put back files, and take away folders that were not there and hold nothing."""
        for path, text in self._texts.items():
            if text is None:
                path.unlink(missing_ok=True)
            else:
                write_text(path, text)
        submitted = self._folder / "submitted"
        if self._submitted is None:
            submitted.unlink(missing_ok=True)
        else:
            os.utime(submitted, ns=(self._submitted, self._submitted))
        for path in (RunFolder(self._folder).checkpoints, self._folder):
            if path not in self._there:
                with contextlib.suppress(OSError):  # it is not there, or somebody uses it
                    path.rmdir()


def _check_passed(settings: Settings) -> None:
    missing = [
        name
        for name in settings.environment.passed
        if name not in settings.secrets and not os.environ.get(name)
    ]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} in [variables] has no value, and is not set in this shell "
            "either. Export it and submit from the same shell, or leave it out."
        )


def export_option(settings: Settings) -> list[str]:
    """Return the option that hands passed variables to jobs, where sbatch would not do it."""
    names = settings.environment.passed
    chosen = settings.sbatch.get("export") or os.environ.get("SBATCH_EXPORT") or "ALL"
    if not names or chosen.split(",")[0] == "ALL":
        return []
    others = () if chosen in ("NONE", "NIL") else chosen.split(",")
    return [f"--export={','.join([*others, *names])}"]


class UnclearAnswer(ValueError):
    """sbatch named no job, and may have taken one."""


def submit_script(settings: Settings, path: Path, options: Mapping[str, str], *more: str) -> str:
    """Submit a script and return the job's id.

    Args:
        settings: of the run.
        path: the script.
        options: those in the script, which no SBATCH_... variable then changes.
        more: further words of sbatch's command line.

    Raises:
        ValueError: there is no sbatch, or it refuses.
        UnclearAnswer: it does not say which job it is.
    """
    words = [*on_command_line(options), *export_option(settings), *more]
    answer = sbatch("--parsable", *words, str(path), variables=_handed_over(settings))
    # a site's wrapper may say more than sbatch does
    found = [line.strip() for line in answer.splitlines() if _JOB_LINE.fullmatch(line.strip())]
    if not found:
        raise UnclearAnswer(
            f"sbatch does not say which job it submitted, but: {answer or 'nothing'}"
        )
    return found[-1].split(";")[0]


def check_script(settings: Settings, text: str, options: Mapping[str, str]) -> str:
    """Let sbatch check a script without submitting it, and return what it says.

    Raises:
        ValueError: there is no sbatch, or it refuses.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
        file.write(text)
        file.flush()
        words = [*on_command_line(options), *export_option(settings)]
        return sbatch("--test-only", *words, file.name, variables=_handed_over(settings))


def _handed_over(settings: Settings) -> dict[str, str]:
    """Return the variables that jobs get from sbatch's environment."""
    names = settings.environment.passed
    return {n: os.environ[n] for n in names if n in os.environ} | settings.secrets


def sbatch(*words: str, variables: Mapping[str, str] | None = None) -> str:
    """Run sbatch and return what it prints.

    Args:
        words: of its command line.
        variables: added to its environment.

    Raises:
        ValueError: there is none, or it refuses.
    """
    _need_sbatch()
    environment = {n: v for n, v in os.environ.items() if not _of_another_job(n)}
    done = subprocess.run(
        ["sbatch", *words],
        capture_output=True,
        text=True,
        errors="replace",  # a message in another encoding must not look like a refusal
        env=environment | dict(variables or {}),
    )
    if done.returncode:
        reason = done.stderr.strip() or f"it ends with {done.returncode} and says nothing"
        raise ValueError(f"sbatch refuses the job: {reason}")
    return (done.stdout or done.stderr).strip()


def _of_another_job(variable: str) -> bool:
    """Whether sbatch would hand on what the job says that this shell runs in, or make an array.

    In a job, srun takes SLURM_MEM_PER_NODE, SLURM_CPUS_PER_TASK and the like for its options.
    """
    if variable == "SBATCH_ARRAY_INX":  # --chain and --array decide it
        return True
    return variable.startswith(("SLURM_", "SRUN_")) and variable not in OF_CLUSTERS


def _need_sbatch() -> None:
    if shutil.which("sbatch") is None:
        raise ValueError("there is no sbatch here. Submit on a login node of the cluster.")
