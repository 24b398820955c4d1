"""Unpickling for checkpoints: only types on a list are imported, everything else is refused.

A pickle is a program; a checkpoint from elsewhere can run anything when it is loaded. What is on
the list holds data. Classes of Megatron's own (enumerations and the like, which arguments hold) are
not imported either: an empty class takes their place, so that neither Megatron nor its release
matters.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from megatron_skyladder.ladder.schedules import Stage

# packages whose classes are replaced by `Foreign`: none of their code runs
FOREIGN = (
    "megatron",
    "megatron_skyladder",
    "transformer_engine",
    "apex",
    "nvidia_resiliency_ext",
    "signal",
)

ALLOWED = {
    ("argparse", "Namespace"),
    ("types", "SimpleNamespace"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("builtins", "set"),
    ("builtins", "frozenset"),
    ("builtins", "slice"),
    ("builtins", "complex"),
    ("builtins", "bytearray"),
    ("__builtin__", "set"),
    ("_codecs", "encode"),
    ("io", "BytesIO"),
    ("_io", "BytesIO"),
    ("fractions", "Fraction"),
    ("datetime", "timedelta"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.dtypes", "UInt32DType"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.serialization", "_get_layout"),
    ("torch.storage", "UntypedStorage"),
    ("torch.storage", "TypedStorage"),
}
# our first release left its stages in Megatron's arguments
STAGES = {
    ("megatron_skyladder.schedules", "Stage"),
    ("megatron_skyladder.ladder.schedules", "Stage"),
}
# what the metadata of torch.distributed.checkpoint is made of: dataclasses and enumerations
METADATA_MODULES = {
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
    "torch.distributed.checkpoint.filesystem",
}
METADATA_NAMES = {
    "BytesStorageMetadata",
    "BytesWriteData",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "SavePlan",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "TensorWriteData",
    "WriteItem",
    "WriteItemType",
    "_MEM_FORMAT_ENCODING",
    "_StorageInfo",
    "_StoragePrefix",
}


class Foreign:
    """In place of an object of a class that is not imported; keeps nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.arguments = args

    def __setstate__(self, state: Any) -> None:
        """Take any state."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.arguments}"


class AllowlistUnpickler(pickle.Unpickler):
    """Imports what is on the list, replaces what is Megatron's, refuses the rest."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        if (module, name) in STAGES:
            return Stage
        if module in METADATA_MODULES and name in METADATA_NAMES:
            return super().find_class(module, name)
        if module == "torch":
            value = getattr(torch, name, None)
            if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
                return value
        if module.partition(".")[0] in FOREIGN:
            return type(name.rpartition(".")[2], (Foreign,), {})
        if module in ("builtins", "__builtin__") and name == "getattr":
            return _member
        raise ForbiddenTypeError(module, name)


def _member(owner: Any, name: str) -> Foreign:
    """Return a member of a replaced enumeration; Python 3.11 pickles them by ``getattr``."""
    if isinstance(owner, type) and issubclass(owner, Foreign):
        return owner(name)
    raise ForbiddenTypeError(getattr(owner, "__qualname__", type(owner).__qualname__), name)


class ForbiddenTypeError(ValueError):
    """A pickle names a type that is not on the list."""

    def __init__(self, module: str, name: str) -> None:
        super().__init__(f"{module}.{name}")


class AllowlistPickle:
    """What ``torch.load`` takes for ``pickle_module``."""

    __name__ = __name__
    Unpickler = AllowlistUnpickler

    @staticmethod
    def load(file: IO[bytes], **options: Any) -> Any:
        return AllowlistUnpickler(file, **options).load()


def load_pickle(path: Path, *, trust: bool) -> Any:
    """Load a plain pickle.

    Args:
        path: the file.
        trust: import whatever it names.

    Raises:
        ValueError: it needs a type that is not on the list.
    """
    with path.open("rb") as file:
        try:
            return pickle.load(file) if trust else AllowlistUnpickler(file).load()
        except ForbiddenTypeError as error:
            raise ValueError(_refusal(path, error)) from None


def load_torch(source: Path | io.RawIOBase, *, path: Path, trust: bool, mmap: bool = False) -> Any:
    """Load what ``torch.save`` wrote, on the CPU.

    Args:
        source: a path or an open file.
        path: what to name in errors.
        trust: import whatever it names.
        mmap: leave tensors in the file until they are used; needs a path.

    Raises:
        ValueError: it needs a type that is not on the list, or is no such file.
    """
    if not zipfile.is_zipfile(source):
        raise ValueError(
            f"{path} was not written by torch.save of PyTorch 1.6 or later. Load and save it with "
            "a current PyTorch first."
        )
    if not isinstance(source, Path):
        source.seek(0)
    _refuse_code(source, path)
    module: Any = pickle if trust else AllowlistPickle
    try:
        file: Any = source
        return torch.load(
            file, map_location="cpu", weights_only=False, pickle_module=module, mmap=mmap
        )
    except ForbiddenTypeError as error:
        raise ValueError(_refusal(path, error)) from None


def _refuse_code(source: Path | io.RawIOBase, path: Path) -> None:
    """Refuse TorchScript, which ``torch.load`` would hand to another loader."""
    with zipfile.ZipFile(source) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist()}
    if not isinstance(source, Path):
        source.seek(0)
    if "constants.pkl" in names:
        raise ValueError(f"{path} is a TorchScript archive, not a checkpoint.")


def _refusal(path: Path, error: ForbiddenTypeError) -> str:
    return (
        f"{path} holds an object of type {error}, which is not among the types that a checkpoint "
        "needs. Loading it runs code that the file chooses. Where you know who wrote it, give "
        "--trust-checkpoint."
    )
