"""Reads a Hugging Face model's folder: settings and tensors, one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_skyladder.hugging_face import weights
from megatron_skyladder.hugging_face.architecture import PRECISIONS, Architecture
from megatron_skyladder.hugging_face.output import identity_of

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class HuggingFaceWeights:
    """The tensors of a folder of safetensors files, read when they are needed.

    Raises:
        ValueError: there are none, or no config.json.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json. Give a Hugging Face model's folder.")
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        if (folder / INDEX).is_file():
            places = json.loads((folder / INDEX).read_text())["weight_map"]
            names = sorted(set(places.values()))
        else:
            names = [SINGLE_FILE]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{folder} has no {missing[0]}. Only safetensors files are read; save others with "
                "save_pretrained of a current transformers."
            )
        described = [name for name in ("config.json", INDEX) if (folder / name).is_file()]
        # changes with names, sizes and times of what is read, as a checkpoint's does
        self.identity = identity_of(folder, [folder / name for name in (*described, *names)])
        self._files = {name: safe_open(folder / name, framework="pt") for name in names}
        self._places = {
            key: name
            for name, file in self._files.items()
            for key in file.keys()  # noqa: SIM118 (no mapping)
        }

    def compare(self, model: Architecture) -> None:
        """Check that these are the model's weights.

        Raises:
            ValueError: names or shapes differ.
        """
        expected = {k: v for part in weights.hugging_face_shapes(model) for k, v in part.items()}
        ignored = {"lm_head.weight"} if model.tied else set()  # a copy of the embedding
        unknown = sorted(self._places.keys() - expected.keys() - ignored)
        missing = sorted(expected.keys() - self._places.keys())
        if unknown or missing:
            words = [f"has {len(unknown)} unknown weights, such as {unknown[0]}"] if unknown else []
            words += [f"lacks {len(missing)}, such as {missing[0]}"] if missing else []
            raise ValueError(f"{self.folder} {' and '.join(words)}: no {model.family} as it says.")
        for name, shape in expected.items():
            found = self._slice(name).get_shape()
            if tuple(found) != shape:
                raise ValueError(f"{name} is {found}, but config.json makes it {list(shape)}.")

    def dtype(self) -> str:
        """Return the precision of the embedding.

        Raises:
            ValueError: Megatron cannot be given it.
        """
        names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
        found = self._slice(weights.OUTSIDE[weights.EMBEDDING]).get_dtype()
        if found not in names:
            raise ValueError(f"the weights are {found}; {', '.join(PRECISIONS)} can be imported.")
        return names[found]

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor."""
        tensor: torch.Tensor = self._files[self._places[name]].get_tensor(name)
        return tensor

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Return a part of a matrix."""
        rows: torch.Tensor = self._slice(name)[first:last]
        return rows

    def layer(self, index: int) -> weights.Tensors:
        """Return a layer's weights, without the beginning of their names."""
        start = weights.hugging_face_layer(index)
        names = [name for name in self._places if name.startswith(start)]
        return {name.removeprefix(start): self.read(name) for name in names}

    def _slice(self, name: str) -> Any:
        return self._files[self._places[name]].get_slice(name)
