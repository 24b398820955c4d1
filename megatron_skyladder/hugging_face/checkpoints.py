"""Finds a checkpoint on disk and says what is in it, whatever wrote it."""

from __future__ import annotations

import re
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_skyladder.hugging_face import legacy, pickles, torch_dist
from megatron_skyladder.hugging_face.architecture import bridge_arguments
from megatron_skyladder.hugging_face.output import identity_of
from megatron_skyladder.ladder.continuation import rotary_reached

TRACKER = "latest_checkpointed_iteration.txt"
RUN_CONFIG = "run_config.yaml"  # Bridge's
TRAIN_STATE = "train_state.pt"  # Bridge's, in each iteration; `latest_` before it beside them
_ITERATION = re.compile(r"iter_(\d+)")


class Reader(Protocol):
    """What `torch_dist` and `legacy` have in common."""

    def common(self) -> dict[str, Any]: ...

    def outside_layers(self) -> set[str]: ...

    def num_layers(self) -> int: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> torch.Tensor: ...

    def read_layer(self, index: int) -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True)
class Checkpoint:
    """One iteration of a run.

    Args:
        folder: of the iteration.
        kind: ``torch_dist``, ``torch`` or ``bridge``.
        reader: of its weights.
        args: Megatron's arguments, or Bridge's settings by their names.
        iteration: 0 for a checkpoint of no run, such as an imported one.
        consumed_samples: None where it does not say.
        trusted: whether types that are not on the list of `pickles` were unpickled.
    """

    folder: Path
    kind: str
    reader: Reader
    args: Namespace
    iteration: int
    consumed_samples: int | None
    trusted: bool = False

    @property
    def identity(self) -> str:
        """Changes with names, sizes and times of its files; a moved checkpoint keeps it."""
        return identity_of(self.folder, (it for it in self.folder.rglob("*") if it.is_file()))


def open_checkpoint(path: Path, *, iteration: int | None = None, trust: bool = False) -> Checkpoint:
    """Open a checkpoint.

    Args:
        path: a run's folder of checkpoints, or one iteration's.
        iteration: which one; the latest where it is None.
        trust: unpickle types that are not on the list of `pickles`.

    Raises:
        ValueError: there is none, or it cannot be read; the message says why.
    """
    found = _open(iteration_folder(path, iteration), trust)
    return replace(found, trusted=trust)


def _open(folder: Path, trust: bool) -> Checkpoint:
    if (folder / torch_dist.METADATA).is_file():
        return _open_torch_dist(folder, trust)
    if any(folder.glob(legacy.RANKS)):
        reader = legacy.LegacyReader(folder, trust=trust)
        common = reader.common()
        return _of_megatron(folder, "torch", reader, common)
    raise ValueError(
        f"{folder} is no checkpoint that can be read: it has neither {torch_dist.METADATA} "
        f"(--ckpt-format torch_dist) nor {legacy.RANKS} (torch). Others, such as fsdp_dtensor, "
        "Megatron converts with --ckpt-convert-format torch_dist."
    )


def _open_torch_dist(folder: Path, trust: bool) -> Checkpoint:
    reader = torch_dist.TorchDistReader(folder, trust=trust)
    if (folder / RUN_CONFIG).is_file():
        state = _train_state(folder, trust)
        return Checkpoint(
            folder=folder,
            kind="bridge",
            reader=reader,
            args=bridge_arguments(_read_yaml(folder / RUN_CONFIG)),
            iteration=int(state.get("step", _iteration_of(folder))),
            consumed_samples=state.get("consumed_train_samples"),
        )
    common = reader.common()
    if "args" not in common:
        raise ValueError(
            f"{folder} holds no arguments: neither Megatron-LM nor Bridge wrote it whole."
        )
    if not (folder / torch_dist.COMMON_FILE).is_file():  # written by 0.19 or later
        common["args"].passes_rotary_interpolation = True
    return _of_megatron(folder, "torch_dist", reader, common)


def _of_megatron(folder: Path, kind: str, reader: Reader, common: dict[str, Any]) -> Checkpoint:
    args = common["args"]
    base, factor = rotary_reached(args)  # of the stage that it was written in, not of the model
    if base is not None:
        args.rotary_base = base
    if factor is not None:
        args.rotary_scaling_factor = factor
    return Checkpoint(
        folder=folder,
        kind=kind,
        reader=reader,
        args=args,
        iteration=int(common.get("iteration") or 0),
        consumed_samples=getattr(args, "consumed_train_samples", None),
    )


def _train_state(folder: Path, trust: bool) -> dict[str, Any]:
    path = folder / TRAIN_STATE
    if not path.is_file():
        return {}
    state = pickles.load_torch(path, path=path, trust=trust)
    return {name: int(state[name]) for name in ("step", "consumed_train_samples") if name in state}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError:
        raise ValueError(f"{path} needs the package pyyaml: pip install pyyaml.") from None
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def iteration_folder(path: Path, iteration: int | None) -> Path:
    """Return the folder of an iteration, of the latest where it is None.

    Raises:
        ValueError: it is not there.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder. Give a run's --save folder.")
    if (path / torch_dist.METADATA).is_file() or any(path.glob(legacy.RANKS)):
        if iteration is not None and iteration != _iteration_of(path):
            raise ValueError(
                f"{path} is one iteration already, not --iteration={iteration}. Give the folder "
                "above it."
            )
        return path
    there = sorted(entry.name for entry in path.iterdir() if _ITERATION.fullmatch(entry.name))
    if iteration is not None:
        name = f"iter_{iteration:07d}"
    elif (path / TRACKER).is_file():
        latest = (path / TRACKER).read_text().strip()
        name = latest if latest == "release" else f"iter_{int(latest):07d}"
    elif there:
        name = there[-1]
    else:
        raise ValueError(f"{path} has no checkpoints (iter_*). Give a run's --save folder.")
    if not (path / name).is_dir():
        raise ValueError(f"{path} has no {name}. It has: {', '.join(there) or 'none'}.")
    return path / name


def _iteration_of(folder: Path) -> int:
    match = _ITERATION.fullmatch(folder.resolve().name)
    return int(match[1]) if match else 0
