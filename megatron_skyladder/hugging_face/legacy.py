"""Checkpoints of ``--ckpt-format torch``: one file of whole objects for each model-parallel rank.

    iter_0000010/mp_rank_TT[_PPP]/model_optim_rng.pt

Each has its rank's part of each weight, under ``model``, or ``model0``, ``model1``, ... for virtual
pipeline stages. Layers are numbered from 0 in each part. In the model they follow in the order in
which a micro-batch passes them: the first virtual stage of every pipeline rank, then the second.
Counting what is there in that order gives the right numbers for uneven pipelines too.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_skyladder.hugging_face import pickles
from megatron_skyladder.hugging_face.weights import EMBEDDING, GATE_AND_UP, OUTPUT

FILE = "model_optim_rng.pt"
RANKS = "mp_rank_*"
LAYERS = "decoder.layers."
_FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")
_LAYER = re.compile(re.escape(LAYERS) + r"(\d+)\.(.*)")
# the dimension that tensor parallelism cuts; the rest is the same on every rank
_CUT = {
    EMBEDDING: 0,
    OUTPUT: 0,
    "self_attention.linear_qkv.weight": 0,
    "self_attention.linear_qkv.bias": 0,
    "self_attention.linear_proj.weight": 1,
    GATE_AND_UP: 0,
    "mlp.linear_fc2.weight": 1,
}


@dataclass(frozen=True)
class _Stage:
    """One model part: a virtual stage of a pipeline rank, by tensor-parallel rank."""

    parts: tuple[Mapping[str, Any], ...]
    num_layers: int


class LegacyReader:
    """Reads the weights of one iteration's folder; they stay in the files until they are used.

    Args:
        folder: such as ``checkpoints/iter_0000010``.
        trust: unpickle types that are not on the list of `pickles`.

    Raises:
        ValueError: files are missing, or are no megatron-core model's.
    """

    def __init__(self, folder: Path, *, trust: bool = False) -> None:
        self.folder = folder
        self._ranks = {
            key: pickles.load_torch(path / FILE, path=path / FILE, trust=trust, mmap=True)
            for key, path in _rank_folders(folder).items()
        }
        self._first = self._ranks[min(self._ranks)]
        self._check()
        self._stages = list(self._order())

    def common(self) -> dict[str, Any]:
        """Return what all ranks share: arguments, iteration and the like."""
        names = ("args", "iteration", "checkpoint_version")
        return {name: self._first[name] for name in names if name in self._first}

    def outside_layers(self) -> set[str]:
        """Return the names of the weights that belong to no layer."""
        return {
            name
            for stage in self._stages
            for name, value in stage.parts[0].items()
            if _is_weight(name, value) and not name.startswith(LAYERS)
        }

    def num_layers(self) -> int:
        """Return how many layers there are."""
        return sum(stage.num_layers for stage in self._stages)

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a weight outside of layers."""
        return next(s.parts[0][name].dtype for s in self._stages if name in s.parts[0])

    def read(self, name: str) -> torch.Tensor:
        """Return a weight that belongs to no layer."""
        parts = next(s.parts for s in self._stages if name in s.parts[0])
        return _join(name, [part[name] for part in parts])

    def read_layer(self, index: int) -> dict[str, torch.Tensor]:
        """Return a layer's weights, named without ``decoder.layers.N.``."""
        for stage in self._stages:
            if index < stage.num_layers:
                break
            index -= stage.num_layers
        weights = {}
        for full_name, value in stage.parts[0].items():
            match = _LAYER.match(full_name)
            if match and int(match[1]) == index and _is_weight(full_name, value):
                parts = [part[full_name] for part in stage.parts]
                weights[match[2]] = _join(match[2], parts)
        return weights

    @property
    def _args(self) -> Namespace:
        args: Namespace = self._first["args"]
        return args

    def _check(self) -> None:
        version = self._first.get("checkpoint_version", 0)
        if "args" not in self._first or version < 3:
            raise ValueError(
                f"{self.folder} has a checkpoint of version {version}, from before Megatron 2.5. "
                "Load and save it with a current Megatron first."
            )
        sizes = (self._args.tensor_model_parallel_size, self._args.pipeline_model_parallel_size)
        expected = {(t, p) for t in range(sizes[0]) for p in range(sizes[1])}
        if self._ranks.keys() != expected:
            missing = sorted(expected - self._ranks.keys())
            raise ValueError(
                f"{self.folder} has {len(self._ranks)} files of model-parallel ranks, but was "
                f"trained with TP{sizes[0]} x PP{sizes[1]}; missing (tensor, pipeline): "
                f"{missing or 'none'}. Copy all of them."
            )

    def _order(self) -> Iterator[_Stage]:
        """Yield the model parts in the order in which a micro-batch passes them."""
        tensor_size = self._args.tensor_model_parallel_size
        for chunk in range(self._num_chunks()):
            for rank in range(self._args.pipeline_model_parallel_size):
                name = "model" if "model" in self._first else f"model{chunk}"
                parts = tuple(self._ranks[t, rank][name] for t in range(tensor_size))
                numbers = {int(m[1]) for key in parts[0] if (m := _LAYER.match(key))}
                if numbers != set(range(len(numbers))):
                    raise ValueError(f"{self.folder}: layers {sorted(numbers)} are not in a row.")
                yield _Stage(parts, len(numbers))

    def _num_chunks(self) -> int:
        if "model" in self._first:
            if "language_model" in self._first["model"]:
                raise ValueError(
                    f"{self.folder} holds a model of Megatron before megatron-core "
                    "(--use-legacy-models). Convert it with that Megatron's tools first."
                )
            return 1
        return sum(bool(re.fullmatch(r"model\d+", name)) for name in self._first)


def _is_weight(name: str, value: Any) -> bool:
    """Tell weights from what is saved beside them; Transformer Engine's can be tensors too."""
    return torch.is_tensor(value) and not name.endswith("_extra_state")


def _rank_folders(folder: Path) -> dict[tuple[int, int], Path]:
    folders = {}
    for path in sorted(folder.glob(RANKS)):
        match = _FOLDER.fullmatch(path.name)
        if match is None or not (path / FILE).is_file():
            continue
        if match[3] is not None:
            raise ValueError(f"{path} is of an expert-parallel run; experts cannot be exported.")
        folders[int(match[1]), int(match[2] or 0)] = path
    if not folders:
        raise ValueError(f"{folder} has no {RANKS}/{FILE}.")
    return folders


def _join(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """Return the whole of a weight; each rank's gate-and-up is its gate, then its up."""
    if len(parts) == 1 or name not in _CUT:
        return parts[0]
    if name == GATE_AND_UP:
        gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([*gates, *ups])
    return torch.cat(parts, dim=_CUT[name])
