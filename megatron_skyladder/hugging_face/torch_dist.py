"""``torch_dist`` checkpoints: one tensor, or one layer of a stacked tensor, at a time.

Megatron-LM and Bridge write them alike, with torch.distributed.checkpoint: whole tensors cut into
chunks, one or more for each tensor- and pipeline-parallel rank, with the layers stacked into one
tensor ``decoder.layers.NAME`` of shape ``[layers, ...]`` (or numbered, where layers differ). Which
ranks wrote does not matter to a reader.

torch.distributed.checkpoint.load would need memory for the whole of each tensor beside the chunk it
comes from, and unpickles what a file says; so chunks are read here, from where the metadata says
that they are. Writing goes through its public planner, with tensors made when they are needed.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_skyladder.files import whole, write_text
from megatron_skyladder.hugging_face import pickles

METADATA = ".metadata"
COMMON_FILE = "common.pt"  # up to 0.18; later an object in the checkpoint
COMMON_OBJECT = "common_state/shard_0_1"
LAYERS = "decoder.layers."
# beside the model; everything else has to be a weight that is known
NOT_WEIGHTS = (
    "optimizer",
    "chained_",
    "rng_state",
    "rerun_state_machine_state",
    "common_state",
    "opt_param_scheduler",
)
_NUMBERED = re.compile(re.escape(LAYERS) + r"(\d+)\.(.*)")


class TorchDistReader:
    """Reads the weights of one iteration's folder.

    Args:
        folder: such as ``checkpoints/iter_0000010``.
        trust: unpickle types that are not on the list of `pickles`.

    Raises:
        ValueError: it is no such checkpoint, or holds types that are not on the list.
    """

    def __init__(self, folder: Path, *, trust: bool = False) -> None:
        self.folder = folder
        self.trust = trust
        metadata: Metadata = pickles.load_pickle(folder / METADATA, trust=trust)
        if not isinstance(metadata, Metadata) or not metadata.storage_data:
            raise ValueError(f"{folder / METADATA} is not the metadata of a checkpoint.")
        self._storage: dict[MetadataIndex, Any] = metadata.storage_data
        entries = metadata.state_dict_metadata
        self.objects = {k for k, v in entries.items() if isinstance(v, BytesStorageMetadata)}
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(NOT_WEIGHTS)
        }

    def common(self) -> dict[str, Any]:
        """Return what all ranks share: arguments, iteration and the like."""
        path = self.folder / COMMON_FILE
        if path.is_file():
            return dict(pickles.load_torch(path, path=path, trust=self.trust))
        if COMMON_OBJECT not in self.objects:
            return {}
        index = MetadataIndex(COMMON_OBJECT)
        # the object is a list of one
        return dict(self._load(self._storage[index])[0])

    def outside_layers(self) -> set[str]:
        """Return the names of the weights that belong to no layer."""
        return {name for name in self.tensors if not name.startswith(LAYERS)}

    def num_layers(self) -> int:
        """Return how many layers there are."""
        numbers = {int(match[1]) + 1 for name in self.tensors if (match := _NUMBERED.match(name))}
        stacked = {
            int(entry.size[0])
            for name, entry in self.tensors.items()
            if name.startswith(LAYERS) and not _NUMBERED.match(name)
        }
        return max(numbers | stacked, default=0)

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a weight outside of layers."""
        return self.tensors[name].properties.dtype

    def read(self, name: str) -> torch.Tensor:
        """Return a weight that belongs to no layer."""
        return self._assemble(name, (0,) * len(self.tensors[name].size), self.tensors[name].size)

    def read_layer(self, index: int) -> dict[str, torch.Tensor]:
        """Return a layer's weights, named without ``decoder.layers.N.``."""
        weights = {}
        for name, entry in self.tensors.items():
            if not name.startswith(LAYERS):
                continue
            numbered = _NUMBERED.match(name)
            if numbered:
                if int(numbered[1]) == index:
                    weights[numbered[2]] = self.read(name)
                continue
            offsets = (index, *(0 for _ in entry.size[1:]))
            sizes = (1, *entry.size[1:])
            weights[name.removeprefix(LAYERS)] = self._assemble(name, offsets, sizes)[0]
        return weights

    def _assemble(self, name: str, offsets: tuple[int, ...], sizes: Iterable[int]) -> torch.Tensor:
        """Return a box of a tensor; where one chunk is the box, without a copy."""
        size = tuple(sizes)
        entry = self.tensors[name]
        box: torch.Tensor | None = None
        filled = 0
        for chunk in entry.chunks:
            overlap = _overlap(offsets, size, chunk.offsets, chunk.sizes)
            if overlap is None:
                continue
            in_box, in_chunk = overlap
            info = self._storage[MetadataIndex(name, chunk.offsets)]
            part = self._load(info)[in_chunk]
            if tuple(part.shape) == size:
                return part
            if box is None:
                box = torch.empty(size, dtype=entry.properties.dtype)
            box[in_box] = part
            filled += part.numel()
        if box is None or filled != box.numel():
            raise ValueError(
                f"{self.folder} holds only {filled:,} of the {torch.Size(size).numel():,} values "
                f"of {name}: the checkpoint is incomplete. Take another iteration."
            )
        return box

    def _load(self, info: Any) -> Any:
        if getattr(info, "transform_descriptors", None):
            raise ValueError(
                f"{self.folder} is stored with {', '.join(info.transform_descriptors)}, which "
                "cannot be read here. Save it without."
            )
        path = self.folder / info.relative_path
        with path.open("rb", buffering=0) as file:
            part = _FilePart(file, info.offset, info.length)
            return pickles.load_torch(part, path=path, trust=self.trust)


Box = tuple[slice, ...]


def _overlap(
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    chunk_offsets: tuple[int, ...],
    chunk_sizes: tuple[int, ...],
) -> tuple[Box, Box] | None:
    """Return where a chunk and a box of a tensor meet: in the box, and in the chunk."""
    in_box, in_chunk = [], []
    for start, size, chunk_start, chunk_size in zip(
        offsets, sizes, chunk_offsets, chunk_sizes, strict=True
    ):
        first = max(start, chunk_start)
        last = min(start + size, chunk_start + chunk_size)
        if first >= last:
            return None
        in_box.append(slice(first - start, last - start))
        in_chunk.append(slice(first - chunk_start, last - chunk_start))
    return tuple(in_box), tuple(in_chunk)


class _FilePart(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: io.FileIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        self._place = min(max(0, base + place), self._length)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: self._length - self._place]
        self._file.seek(self._offset + self._place)
        count = self._file.readinto(view) or 0
        self._place += count
        return count


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made in parts, when they are written.

    Args:
        shape: of the whole.
        dtype: of the whole.
        step: how much of the first dimension a part has at most.
        make: returns the part ``[first:last]``.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    step: int
    make: Callable[[int, int], torch.Tensor]


def write(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    objects: Mapping[str, Any],
    common: Mapping[str, Any],
) -> None:
    """Write one iteration's folder, as one rank of Megatron would.

    Args:
        folder: empty.
        tensors: by Megatron's names, layers stacked.
        objects: what is saved beside tensors, such as ``_extra_state``.
        common: arguments and the like. Written as a file: all releases read it, and those before
            0.19 nothing else.
    """
    failure: BaseException | None = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            checkpoint.save(
                dict(objects),
                storage_writer=checkpoint.FileSystemWriter(folder),
                planner=_LazyPlanner(tensors),
                no_dist=True,
            )
        except checkpoint.CheckpointException as error:  # of one rank: what went wrong here
            failure = next(iter(error.failures.values()))[0]
    if failure is not None:
        raise failure  # out here: it keeps its own context, where torch leaves an OSError
    # a file that is open already: by its name torch would not say why it could not be written
    with whole(folder / COMMON_FILE) as partial, partial.open("wb") as file:
        torch.save(dict(common), file)
    backends = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    write_text(folder / "metadata.json", json.dumps(backends))


class _LazyPlanner(checkpoint.DefaultSavePlanner):
    """Plans `LazyTensor`s beside the objects of the state that is saved.

    In many small parts of few names, as FileSystemWriter holds on to the last part of each name;
    and in the order of parts, so that all that belongs to a layer is asked for together.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        parts = [item for name in self.tensors for item in self._items(name)]
        parts.sort(key=lambda item: item.index.index or 0)
        self.plan = replace(plan, items=[*plan.items, *parts])
        return self.plan

    def _items(self, name: str) -> Iterator[WriteItem]:
        tensor = self.tensors[name]
        rest = tensor.shape[1:]
        for index, first in enumerate(range(0, tensor.shape[0], tensor.step)):
            last = min(first + tensor.step, tensor.shape[0])
            chunk = ChunkStorageMetadata(
                offsets=torch.Size((first, *(0 for _ in rest))),
                sizes=torch.Size((last - first, *rest)),
            )
            properties = TensorProperties(dtype=tensor.dtype)
            yield WriteItem(
                index=MetadataIndex(name, chunk.offsets, index),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, torch.Size(tensor.shape)),
            )

    def lookup_object(self, index: MetadataIndex) -> Any:
        tensor = self.tensors.get(index.fqn)
        if tensor is None:
            return super().lookup_object(index)
        assert index.offset is not None
        first = index.offset[0]
        return tensor.make(first, min(first + tensor.step, tensor.shape[0]))
