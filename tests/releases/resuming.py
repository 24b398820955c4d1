"""Runs that stop and go on, with a Megatron of choice and in every integration.

A process pool per Megatron: the dozens of short runs of one release import it once.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from launches import SMALL_MODEL, Data

from megatron_skyladder.report import runlog
from megatron_skyladder.testing import ProcessPool

SPEC = ["--spec", "megatron_skyladder.layer_specs", "skyladder"]
ITERATIONS = 6
STOP_AT = 3
SETTINGS = {  # flags, and the window of each iteration, worked out by hand
    # 8 + 15 per step, over 56 / 15 = 3.7 steps
    "rate": ("--skyladder-start-window 8 --skyladder-alpha 15", [8, 23, 38, 53, 64, 64]),
    # 56 tokens in 5/6 of 6 steps
    "fraction": (
        "--skyladder-start-window 8 --skyladder-expand-fraction 5/6",
        [8, 19, 30, 41, 52, 64],
    ),
    "stages": (
        "--skyladder-schedule staged --skyladder-stages 8:1/3 16:1/3 final:1/3",
        [8, 8, 16, 16, 64, 64],
    ),
    # 56 tokens in 0.64 of 6 steps: 14.58 per step
    "preset": ("--skyladder-preset recommended", [8, 22, 37, 51, 64, 64]),
}
FORMATS = {
    "torch": "--ckpt-format torch",
    "torch_dist": "--ckpt-format torch_dist",
    "async": "--ckpt-format torch_dist --async-save",
}
# every setting where all of the arguments are loaded strictly; every format
COMBINATIONS = [
    *(("torch", setting) for setting in SETTINGS),
    ("torch_dist", "stages"),
    ("async", "rate"),
]


@dataclass
class Resuming:
    """One Megatron and one integration.

    Args:
        pool: processes that have this Megatron imported.
        data: what to train on.
        megatron: its folder; None: the one that is installed.
        script: its own script instead of our entry point.
        through_spec: whether settings go into variables, and ``--spec`` is given.
        folder: gets the checkpoints and logs.
    """

    pool: ProcessPool
    data: Data
    megatron: Path | None
    script: Path | None
    through_spec: bool
    folder: Path

    def fresh(self, name: str) -> Resuming:
        """Return the same with another folder, for another run."""
        return replace(self, folder=self.folder / name)

    def train(
        self,
        settings: str,
        flags: str = "",
        exit_codes: tuple[int, ...] = (0,),
        *,
        model: str = SMALL_MODEL,
        saves: bool = True,
        num_processes: int = 1,
    ) -> tuple[runlog.RunLog, str]:
        """Train, from the newest checkpoint on; return the log, parsed and whole.

        Args:
            settings: ``--skyladder-*`` flags, or nothing.
            flags: Megatron's.
            exit_codes: what may happen.
            model: Megatron's flags for the model and the run.
            saves: whether to leave a checkpoint; without, to begin anew.
            num_processes: ranks.
        """
        own = settings.split()
        checkpoints = []
        if saves:
            checkpoints = ["--save", str(self.folder / "checkpoints"), "--save-interval", "100"]
            checkpoints += ["--load", str(self.folder / "checkpoints")]
        words = [*model.split(), *self.data.flags(self.megatron), *checkpoints]
        logs = self.folder / f"logs{len(list(self.folder.glob('logs*')))}"
        self.pool.run(
            "resume_bodies:train",
            num_processes=num_processes,
            folder=logs,
            arguments={
                "flags": [*words, *(SPEC if self.through_spec else own), *flags.split()],
                "script": str(self.script) if self.script else None,
            },
            environment=_variables(own) if self.through_spec else {},
            exit_codes=exit_codes,
        )
        files = [logs / f"log.{rank}.txt" for rank in range(num_processes)]
        text = "".join(path.read_text(errors="replace") for path in files)
        return runlog.parse(text), text

    @property
    def state(self) -> Path:
        """The file of a checkpoint in the torch format."""
        (path,) = (self.folder / "checkpoints").glob("iter_*/mp_rank_00/model_optim_rng.pt")
        return path

    def leave_in_arguments(self, values: dict[str, object]) -> None:
        """Put values into the arguments of a checkpoint, whatever its format."""
        (folder,) = (self.folder / "checkpoints").glob("iter_*")
        if (folder / ".metadata").exists() and not (folder / "common.pt").exists():
            _leave_in_common_state(folder, values)
            return
        path = folder / "common.pt"
        path = path if path.exists() else self.state
        content = torch.load(path, weights_only=False)
        vars(content["args"]).update(values)
        torch.save(content, path)


def _leave_in_common_state(folder: Path, values: dict[str, object]) -> None:
    """Do so where Megatron >= 0.19 keeps the arguments: among the shards, as one object."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    ((index, place),) = (
        item for item in metadata.storage_data.items() if item[0].fqn.startswith("common_state/")
    )
    with (folder / place.relative_path).open("rb") as shard:
        shard.seek(place.offset)
        content = torch.load(io.BytesIO(shard.read(place.length)), weights_only=False)
    (state,) = content if isinstance(content, list) else (content,)
    vars(state["args"]).update(values)
    torch.save(content, folder / "__9_0.distcp")
    length = (folder / "__9_0.distcp").stat().st_size
    metadata.storage_data[index] = replace(
        place, relative_path="__9_0.distcp", offset=0, length=length
    )
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _variables(flags: list[str]) -> dict[str, str]:
    """Return flags as --spec takes them."""
    values: dict[str, list[str]] = {}
    for word in flags:
        if word.startswith("--"):
            name = word[2:].upper().replace("-", "_")
            values[name] = []
        else:
            values[name].append(word)
    return {name: " ".join(words) or "1" for name, words in values.items()}


def pool_for(megatron: Path | None) -> ProcessPool:
    """Return a pool whose processes have this Megatron imported."""
    return ProcessPool([folder for folder in (megatron, Path(__file__).parent) if folder])
