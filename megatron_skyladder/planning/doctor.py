"""What is installed, how SkyLadder would enter, what does not fit: facts for ``skyladder doctor``.

Nothing here changes anything, and every part is asked on its own, so that one that is broken does
not hide the others.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_skyladder import __version__
from megatron_skyladder.errors import TRACEBACK_VARIABLE
from megatron_skyladder.ladder.config import DEFAULT_SCHEDULE
from megatron_skyladder.ladder.flags import STEP_BATCHES, config_from_args, is_requested
from megatron_skyladder.ladder.kernels import VANILLA
from megatron_skyladder.megatron_bridge import releases as bridge_releases
from megatron_skyladder.megatron_lm import from_environment, releases
from megatron_skyladder.megatron_lm.releases import Megatron, MegatronMismatchError
from megatron_skyladder.planning import model_flags, stage_plan, verdict
from megatron_skyladder.planning.launch import Launch
from megatron_skyladder.planning.pasted import Pasted
from megatron_skyladder.runtime.same_settings import disagreements

# Environment that decides how a run behaves, and so has to be the same on all ranks.
_VARIABLE_PREFIXES = ("SKYLADDER_", "NVTE_", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTHONPATH")
_SPEC_MODULE = "megatron_skyladder.layer_specs"  # as --spec names it
_OPTIONAL = {  # import name: distribution name
    "transformer_engine": "transformer-engine",
    "flash_attn": "flash-attn",
    "apex": "apex",
}


@dataclass
class Report:
    """What was found on one rank.

    Args:
        installed: part -> version, or what is wrong with it.
        run: how a training run on this machine would be set up.
        integrations: each one -> whether and how it can be used.
        problems: what does not fit and what to do, one sentence or two each.
        notes: what is accepted, with something to know.
    """

    installed: dict[str, str] = field(default_factory=dict)
    run: dict[str, str] = field(default_factory=dict)
    integrations: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def try_to(self, find: Callable[[], None], what: str) -> None:
        """Do one part; what it raises becomes a problem, and does not hide the other parts.

        Args:
            find: the part.
            what: it looks at, for an error that is not worded for the user.
        """
        try:
            find()
        except (ValueError, MegatronMismatchError) as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
        except Exception as error:  # whatever a damaged installation comes up with
            if os.environ.get(TRACEBACK_VARIABLE):
                raise
            self.problems.append(
                f"{what} could not be examined: {type(error).__name__}: {error}. The installation "
                f"is damaged, or this is a fault of ours: {TRACEBACK_VARIABLE}=1 shows where."
            )


def examine(flags: argparse.Namespace, pasted: Pasted) -> Report:
    """Look at this process's environment.

    Args:
        flags: the ``skyladder_*`` values, and those of Megatron's flags that the schedule needs.
        pasted: the launch, with all its flags.
    """
    launch_flags = pasted.launch.words
    report = Report()
    report.installed["python"] = f"{platform.python_version()} ({sys.executable})"
    report.installed["megatron-skyladder"] = f"{__version__} ({Path(__file__).parents[1]})"
    _torch(report)
    report.try_to(lambda: _megatron(report), "Megatron")
    report.try_to(lambda: _bridge(report), "Megatron Bridge")
    for module, distribution in _OPTIONAL.items():
        _optional(report, module, distribution)
    if has_torch(report):
        report.try_to(lambda: _device(report), "the device")
        report.try_to(lambda: _backend(report, flags, launch_flags), "the attention backend")
        report.try_to(lambda: _kernels(report, flags, launch_flags), "the attention kernels")
    else:
        report.run["device"] = report.run["attention backend"] = "unknown without torch"
    report.run["flags"] = " ".join(launch_flags) or "none given"
    for unknown in pasted.unknown:
        report.problems.append(pasted.launch.at(unknown.flag) + str(unknown))
    report.try_to(lambda: _integration_and_schedule(report, flags, pasted), "the schedule")
    report.try_to(lambda: _script(report, flags, pasted.launch), "the script")
    report.notes += [*verdict.noted(pasted.findings), *verdict.harmless(pasted.findings)]
    report.notes += pasted.notes
    return report


def has_torch(report: Report) -> bool:
    """Whether torch can be used here; only it has a version of CUDA."""
    return "cuda" in report.installed


def _torch(report: Report) -> None:
    if importlib.util.find_spec("torch") is None:
        report.installed["torch"] = "not installed"
        report.problems.append(
            "torch is not installed. Training needs it: pip install torch, or with Megatron "
            "pip install 'megatron-skyladder[training]'."
        )
        return
    try:
        import torch
    except Exception as error:  # a library that is missing or of another CUDA, a half-made upgrade
        report.installed["torch"] = f"does not import: {type(error).__name__}: {error}"
        report.problems.append(
            f"torch is installed but does not import ({type(error).__name__}: {error}). Install it "
            "again: pip install --force-reinstall torch."
        )
        return
    report.installed["torch"] = torch.__version__
    report.installed["cuda"] = torch.version.cuda or "none: torch was built without it"
    try:
        nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
    except (AttributeError, RuntimeError):
        nccl = "none"
    report.installed["nccl"] = nccl


def _megatron(report: Report) -> None:
    folders = [folder for entry in sys.path if (folder := Path(entry or ".").resolve()).is_dir()]
    others = [found for folder in dict.fromkeys(folders) if (found := releases.megatron_in(folder))]
    report.installed["megatron"] = "none"
    found = releases.installed()
    kind = "checkout" if found.is_checkout else "wheel"
    text = f"{found.version}, {kind} in {found.folder}"
    hidden = [f"{each.version} in {each.folder}" for each in others if each.folder != found.folder]
    if hidden:
        text += f"; it hides {', '.join(hidden)}"
    here = releases.megatron_in(Path.cwd())
    if here is not None and here.folder not in (found.folder, *(each.folder for each in others)):
        text += f"; scripts in this folder import its own {here.version}: ask with PYTHONPATH=."
    report.installed["megatron"] = text
    _integrations(report, found)
    release = releases.release_of(found)
    tested = release.checkout if found.is_checkout else release.wheel
    report.run["release"] = f"{release.line}, tested with {tested or release.checkout}"
    _dataset_helpers(report, found)


def _dataset_helpers(report: Report, found: Megatron) -> None:
    """Megatron builds its C++ helpers with make on the first run; a missing tool ends that run."""
    folder = found.folder / "megatron" / "core" / "datasets"
    if any(folder.glob("helpers_cpp*.so")) or not (folder / "Makefile").exists():
        return
    if importlib.util.find_spec("pybind11") is None:
        report.problems.append(
            f"Megatron's dataset helpers are not built in {folder}, and building them on the first "
            "run needs pybind11. Install it: pip install pybind11."
        )


def _bridge(report: Report) -> None:
    """Megatron Bridge is a way of its own; where it is not installed nothing is wrong."""
    version = bridge_releases.installed()
    report.installed[bridge_releases.DISTRIBUTION] = version or "not installed"
    if version is None:
        return
    try:
        bridge_releases.check(version)
    except MegatronMismatchError as error:
        report.integrations["bridge"] = str(error)
        return
    report.integrations["bridge"] = (
        "torchrun ... -m megatron_skyladder.megatron_bridge --recipe NAME skyladder.start_window=32"
        " ...; or skyladder.apply(cfg, ...) in a script (docs/bridge.md)"
    )


def _integrations(report: Report, found: Megatron) -> None:
    report.integrations["entry point"] = "torchrun ... -m megatron_skyladder.pretrain_gpt <flags>"
    if not found.is_checkout:
        report.integrations["spec"] = report.integrations["patch"] = (
            "for checkouts; this Megatron is a wheel"
        )
        return
    script = str(found.folder / found.scripts[0])
    if found.scripts[1:]:
        script += f" (or {' or '.join(found.scripts[1:])})"
    report.integrations["spec"] = (
        f"torchrun ... {script} <flags> --spec megatron_skyladder.layer_specs skyladder; windows "
        "only, from SKYLADDER_* variables"
    )
    try:
        releases.check_for_our_start(found)
    except releases.MegatronMismatchError:  # what is left, the patch, is said below
        report.integrations["entry point"] = report.integrations["spec"] = (
            "not on a Megatron this old: patch it"
        )
    from megatron_skyladder.megatron_lm.patching import checkout, definitions

    apply = f"skyladder patch apply {found.folder}"
    try:
        states, _ = checkout.examine(found.folder, definitions.load())
    except ValueError as error:
        report.integrations["patch"] = f"does not fit: {error}"
        return
    if all(state.current == state.patched for state in states):
        report.integrations["patch"] = f"applied: torchrun ... {script} <flags>"
    elif all(state.current == state.stock for state in states):
        report.integrations["patch"] = f"fits, not applied: {apply}"
    else:
        report.integrations["patch"] = "applied in part or by another version"
        report.problems.append(f"the checkout is patched in part. Complete it: {apply}.")


def _optional(report: Report, module: str, distribution: str) -> None:
    """Note a module that may be missing, but not be broken."""
    report.installed[distribution] = "not installed"
    if importlib.util.find_spec(module) is None:
        return
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown version"
    report.installed[distribution] = version
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a foreign extension raises when it does not load
        report.installed[distribution] = f"{version}, does not import"
        report.problems.append(
            f"{distribution} {version} is installed but does not import ({error}). Install a build "
            "for this torch and CUDA, or uninstall it."
        )


def _device(report: Report) -> None:
    from megatron_skyladder.cpu import engine as cpu_engine

    report.run["device"] = "none"
    if cpu_engine.is_requested():
        report.run["device"] = f"CPU engine ({cpu_engine.DEVICE_VARIABLE}=cpu)"
        return
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            "no CUDA device is visible to torch. Run where there is one, or set "
            f"{cpu_engine.DEVICE_VARIABLE}=cpu for small runs on the CPU."
        )
    major, minor = torch.cuda.get_device_capability()
    report.run["compute capability"] = f"{major}.{minor}"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    counted = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    report.run["device"] = ", ".join(counted)


def _backend(report: Report, flags: argparse.Namespace, launch_flags: list[str]) -> None:
    import torch

    from megatron_skyladder.attention import backends

    in_float32 = launch_flags and not {"--bf16", "--fp16"}.intersection(launch_flags)
    dtype = torch.float32 if in_float32 else torch.bfloat16
    sizes = model_flags.head_sizes(flags)
    choices = backends.choose_backends(
        flags.skyladder_attention_backend or "auto",
        dtype,
        deterministic="--deterministic-mode" in launch_flags,
        heads=sizes and backends.Heads(*sizes),
        softmax_type=flags.softmax_type or VANILLA,
        slides=flags.skyladder_mask == "sliding",
    )
    by_reason: dict[tuple[str, str], list[str]] = {}
    for choice in choices:
        by_reason.setdefault((choice.name, choice.reason), []).append(choice.call.value)
    report.run["attention backend"] = "; ".join(
        f"{name}: {reason}" if len(by_reason) == 1 else f"{name} for {', '.join(calls)}: {reason}"
        for (name, reason), calls in by_reason.items()
    )


def _kernels(report: Report, flags: argparse.Namespace, launch_flags: list[str]) -> None:
    """Versions of what runs on a GPU, and what Transformer Engine would take there."""
    import torch

    from megatron_skyladder.attention.backends import facts

    report.installed["cudnn"] = facts.cudnn_version()
    for distribution in facts.FLASH_ATTENTIONS.values():
        if distribution not in report.installed:
            report.installed[distribution] = facts.version(distribution)
    if "compute capability" not in report.run:
        return
    kind = torch.float16 if "--fp16" in launch_flags else torch.bfloat16
    deterministic = "--deterministic-mode" in launch_flags
    model: dict[str, Any] = {"qkv_dtype": kind, "deterministic": deterministic}
    if flags.softmax_type is not None:
        model["softmax_type"] = flags.softmax_type
    sizes = model_flags.head_sizes(flags)
    if sizes is not None:
        model["head_dim_qk"], model["head_dim_v"] = sizes
    chosen = facts.te_sub_backends(**model)
    for call, name in (chosen or {}).items():
        report.run[f"Transformer Engine, {call}"] = name
        # with a sink SkyLadder takes another kernel
        if name == facts.UNFUSED and flags.softmax_type in (None, VANILLA):
            report.notes.append(
                f"Transformer Engine would attend unfused for {call} calls, which runs out of "
                "memory on long sequences. Install a flash-attn that it takes, or another kernel: "
                "pip install 'megatron-skyladder[gpu]'."
            )


def _integration_and_schedule(report: Report, flags: argparse.Namespace, pasted: Pasted) -> None:
    if _SPEC_MODULE in pasted.launch.words:
        report.run["integration"] = "spec, with the flags from SKYLADDER_* variables"
        environment = {**os.environ, **pasted.launch.environment}
        for name, value in vars(from_environment.flags(environment)).items():
            setattr(flags, name, value)
        flags.skyladder_schedule = flags.skyladder_schedule or DEFAULT_SCHEDULE
    elif report.integrations.get("patch", "").startswith("applied"):
        script = _script_of(pasted.launch) or releases.SCRIPTS[0]
        report.run["integration"] = f"the patched {script}, or the entry point"
    else:
        report.run["integration"] = "the entry point"
    report.run["schedule"] = "off: no --skyladder-* flag was given"
    if not is_requested(flags):
        return
    report.run["schedule"] = "unknown"
    batch_size = flags.global_batch_size or flags.step_batch_size_schedule
    needed = {"--seq-length": flags.seq_length, "--global-batch-size": batch_size}
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} is missing, so the schedule is not known. Give the flags "
            "of your launch."
        )
    config = config_from_args(*_as_parsed(report, flags))
    assert config is not None
    report.run["schedule"] = config.fingerprint
    if flags.global_batch_size is not None and flags.step_batch_size_schedule is not None:
        report.problems.append(
            "--global-batch-size stands beside --step-batch-size-schedule, which Megatron refuses. "
            "Give only the schedule."
        )
    for finding in pasted.findings:
        if finding.rule.effect.stops:
            report.problems.append(pasted.launch.at(finding.rule.flag) + str(finding))


def _as_parsed(report: Report, flags: argparse.Namespace) -> tuple[argparse.Namespace, str]:
    """Return the flags as the Megatron that is found has them, and what to call it in errors."""
    try:
        found = releases.installed()
    except MegatronMismatchError:  # which is said elsewhere
        return flags, "this Megatron"
    known = list(releases.RELEASES)
    name, line = f"Megatron {found.version}", found.line
    if line not in known or known.index(line) >= known.index(stage_plan.FIRST_RELEASE):
        return flags, name
    parsed = argparse.Namespace(**vars(flags))
    if parsed.step_batch_size_schedule is None:
        del parsed.step_batch_size_schedule
    else:
        report.problems.append(
            f"{name} has no {STEP_BATCHES}: releases have it from {stage_plan.FIRST_RELEASE} on. "
            "Take a newer release, or drop it."
        )
    return parsed, name


def _script(report: Report, flags: argparse.Namespace, launch: Launch) -> None:
    stock = report.run["integration"] == "the entry point"
    named = _script_of(launch)
    if stock and named and is_requested(flags):
        raise ValueError(
            f"{named} knows the --skyladder-* flags only in a patched checkout, and this "
            "Megatron is none (see Integrations in skyladder doctor -v). Patch it, or launch -m "
            "megatron_skyladder.pretrain_gpt."
        )


def _script_of(launch: Launch) -> str:
    """Return which of Megatron's own scripts a launch starts, or nothing."""
    name = Path(launch.entry).name
    return name if name in releases.SCRIPTS else ""


def fingerprint_of_rank(report: Report) -> dict[str, str]:
    """Return what has to be the same on all ranks."""
    variables = {
        f"${name}": value
        for name, value in os.environ.items()
        if name.startswith(_VARIABLE_PREFIXES)
    }
    return {**report.installed, **report.run, **variables}


def compare_ranks(report: Report) -> list[str]:
    """Exchange facts with all other ranks over gloo; every rank returns the same complaints."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (socket.gethostname(), fingerprint_of_rank(report)))
    finally:
        dist.destroy_process_group()
    return disagreements(gathered)
