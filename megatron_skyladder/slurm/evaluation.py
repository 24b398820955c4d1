"""Evaluation behind a run: a job array over its checkpoints and groups of benchmarks."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_skyladder.files import write_text
from megatron_skyladder.slurm import script
from megatron_skyladder.slurm.settings import Evaluation, Settings

SCRIPT_NAME = "evaluate.sbatch"
# Options of sbatch that say what a job that trains needs, which is whole nodes. What is counted by
# GPU (mem-per-gpu, cpus-per-gpu) suits both, where there is one; partition, account, constraint,
# reservation, exclude and the like say where a user may run.
_OF_TRAINING = (
    *("gres", "gpus", "gpus-per-task", "gpus-per-socket", "gpu-bind", "tres-per-task"),
    *("cpus-per-task", "mincpus", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-socket"),
    *("mem", "mem-per-cpu", "mem-bind", "exclusive", "time", "time-min"),
    *("nodelist", "nodefile", "use-min-nodes", "switches", "contiguous", "spread-job"),
    *("distribution", "core-spec", "thread-spec", "cores-per-socket", "sockets-per-node"),
    *("threads-per-core", "extra-node-info"),
)
_BY_GPU = ("mem-per-gpu", "cpus-per-gpu")


def job_script(settings: Settings, *, only_finished: bool) -> str:
    """Return the text of the array to submit.

    Args:
        settings: of the run; its partition, account and the like go for evaluation too.
        only_finished: whether a task ends at once where the run is not finished.

    Raises:
        ValueError: the example file has no [evaluate].
    """
    evaluation = of(settings)
    lines = [*script.directives(job_options(settings)), ""]
    lines += _assignments(settings, evaluation, only_finished)
    return script.filled(SCRIPT_NAME, lines)


def job_options(settings: Settings) -> dict[str, str]:
    """Return the options of sbatch for the array, by their long names.

    Raises:
        ValueError: sbatch would not read one as it is meant.
    """
    evaluation = of(settings)
    options: dict[str, Any] = {"job-name": f"{evaluation.name}-evaluation", "nodes": 1, "ntasks": 1}
    if evaluation.gpus:
        gpu_type = evaluation.gpu_type or settings.gpu_type
        options["gpus-per-node"] = script.typed(gpu_type, evaluation.gpus)
    cpus = _cpus(settings, evaluation)
    left_out = {*_OF_TRAINING, *(() if evaluation.gpus else _BY_GPU)}
    if cpus:
        options["cpus-per-task"] = cpus
        left_out.add("cpus-per-gpu")
    options |= {k: v for k, v in settings.sbatch.items() if k not in left_out}
    options |= {
        "time": evaluation.time,
        "output": Path(evaluation.out) / "slurm-%A_%a.out",
        "open-mode": "append",
        "requeue": "",
        "array": f"0-{evaluation.num_jobs - 1}",
    }
    return script.one_line_each(options)


def of(settings: Settings) -> Evaluation:
    """Return what is to be evaluated.

    Raises:
        ValueError: the example file has no [evaluate].
    """
    if settings.evaluation is None:
        raise ValueError(
            "the example file has no section [evaluate]. It needs at least data = FOLDER, as "
            "skyladder evaluate --prepare wrote it; docs/slurm.md has the other keys."
        )
    return settings.evaluation


def submit(settings: Settings, text: str, after: Sequence[str] = ()) -> str:
    """Write the script into the run folder, submit it and return the array's id.

    Args:
        settings: of the run.
        text: of `job_script`.
        after: jobs that have to end before it starts.

    Raises:
        ValueError: sbatch refuses it, or the data is not there.
    """
    check(settings)
    evaluation = of(settings)
    Path(settings.folder).mkdir(parents=True, exist_ok=True)
    Path(evaluation.out).mkdir(parents=True, exist_ok=True)
    path = Path(settings.folder) / SCRIPT_NAME
    write_text(path, text)
    # however they end: a chain may fail once and finish; the script looks for the end
    words = [f"--dependency=afterany:{':'.join(after)}"] if after else []
    options = job_options(settings)
    try:
        return script.submit_script(settings, path, options, *words)
    except script.UnclearAnswer as error:
        raise ValueError(
            f"{error}\nLook with squeue --name={options['job-name']} whether the array is there "
            "before you submit it again."
        ) from None


def check(settings: Settings) -> None:
    """Refuse what would end the array after it has waited for training.

    Raises:
        ValueError: the data is not there.
    """
    evaluation = of(settings)
    if not Path(evaluation.data).is_dir():
        raise ValueError(
            f"data = {evaluation.data} in [evaluate] is not there. Make it first, where there is "
            f"a network: skyladder evaluate --prepare {evaluation.data} ..."
        )


def _cpus(settings: Settings, evaluation: Evaluation) -> int:
    """Return the cores of a job; 0: what the cluster gives.

    Where nothing is said, a GPU has as many as in training, whose cpus-per-task are a node's.
    """
    of_training = settings.sbatch.get("cpus-per-task", "")
    if evaluation.cpus or not of_training.isdigit():
        return evaluation.cpus
    gpus = min(evaluation.gpus or settings.ranks_per_node, settings.ranks_per_node)
    return max(1, int(of_training) * gpus // settings.ranks_per_node)


def _assignments(settings: Settings, evaluation: Evaluation, only_finished: bool) -> Iterable[str]:
    mounts = (*settings.environment.mounts, evaluation.data, evaluation.out)
    container = replace(
        settings,
        environment=replace(settings.environment, mounts=tuple(dict.fromkeys(mounts))),
        gpus_per_node=evaluation.gpus,
    )
    options, prefix = script.container(container)
    yield f"RUN_DIR={shlex.quote(settings.folder)}"
    yield f"ONLY_FINISHED={'yes' if only_finished else shlex.quote('')}"
    yield f"NAME={shlex.quote(evaluation.name)}"
    yield f"DATA={shlex.quote(evaluation.data)}"
    yield f"OUT={shlex.quote(evaluation.out)}"
    yield f"CHECKPOINTS=({script.words(evaluation.checkpoints)})"
    yield f"TASKS=({script.words(evaluation.groups)})"
    yield f"OPTIONS=({script.words(evaluation.options)})"
    yield f"PYTHON={shlex.quote(evaluation.python or settings.environment.python)}"
    yield "# shellcheck disable=SC2016  # it expands where it runs"
    yield f"SETUP={shlex.quote(evaluation.setup or settings.environment.setup)}"
    yield f"SRUN_OPTIONS=({script.words(options)})"
    yield f"PREFIX=({script.words(prefix)})"
    for name, value in settings.environment.variables.items():
        yield f"export {name}={shlex.quote(value)}"
