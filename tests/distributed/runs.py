"""Start recorded training runs and read what they recorded; see `recorded_training`."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_skyladder.testing import ProcessPool, read_checkpoint

SEQ_LENGTH = 64
GLOBAL_BATCH_SIZE = 8
VOCAB_SIZE = 127
EOD = 126  # the NullTokenizer's: its last token

LLAMA = (
    "--normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --group-query-attention --num-query-groups 2"
)
HEADS = "--mtp-num-layers 2"
LATENT = (
    "--normalization RMSNorm --swiglu --disable-bias-linear --qk-layernorm "
    "--untie-embeddings-and-output-weights --multi-latent-attention --q-lora-rank 16 "
    "--kv-lora-rank 12 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 6 "
    "--rotary-scaling-factor 4 --mscale 1.0 --mscale-all-dim 0.5"
)
ARCHITECTURES = {
    "heads": f"{LLAMA} {HEADS}",
    "tied-heads": f"--normalization LayerNorm --kv-channels 16 {HEADS}",
    "llama": LLAMA,
    "gpt": "--normalization LayerNorm --kv-channels 16",  # heads wider than hidden / heads
    "mla": LATENT,
    "mla-heads": f"{LATENT} {HEADS}",
    "sinks": f"{LLAMA} --softmax-type learnable",
    "moe": f"{LLAMA} --num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall "
    "--moe-router-load-balancing-type none",
}
BASE_FLAGS = (
    f"--num-layers 4 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 "
    f"--seq-length {SEQ_LENGTH} --max-position-embeddings {SEQ_LENGTH} "
    f"--position-embedding-type rope --tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE} "
    "--make-vocab-size-divisible-by 64 "
    "--lr 1e-3 --lr-decay-style cosine --lr-warmup-samples 8 --lr-decay-samples 400 --min-lr 1e-5 "
    "--attention-dropout 0 --hidden-dropout 0 --seed 1 --init-method-std 0.2 --log-interval 1 "
    "--eval-iters 0 --eval-interval 100 --num-workers 0 --ckpt-format torch_dist"
)


@dataclass
class Run:
    """What a run recorded, of all its ranks."""

    folder: Path
    exit_codes: list[int] = field(default_factory=list)

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """All events, with the rank that wrote each."""
        events = []
        for path in sorted(self.folder.glob("events.*.jsonl")):
            rank = int(path.name.split(".")[1])
            for line in path.read_text().splitlines():
                events.append({"rank": rank, **json.loads(line)})
        return events

    def of(self, event: str, **values: Any) -> list[dict[str, Any]]:
        """Return the events of a kind that have these values."""
        wanted = {"event": event, **values}.items()
        return [entry for entry in self.events if wanted <= {*_hashable(entry)}]

    @cached_property
    def losses(self) -> dict[int, float]:
        """Loss summed over the row, by the sample's place in the training order."""
        return self._by_sample("loss", "rows")

    @cached_property
    def tokens(self) -> dict[int, int]:
        """A signature of each sample's tokens."""
        return self._by_sample("batch", "tokens")

    @cached_property
    def labels(self) -> dict[int, int]:
        """A signature of each sample's labels."""
        return self._by_sample("batch", "labels")

    def steps(self, name: str) -> dict[int, Any]:
        """Return a value of each step by the samples consumed before it.

        Every rank that knows it has to say the same.
        """
        values: dict[int, Any] = {}
        for entry in self.of("step"):
            value = entry[name]
            if value is None:
                continue
            known = values.setdefault(entry["samples"], value)
            assert known == value, f"ranks disagree on {name} at {entry['samples']} samples"
        return values

    @cached_property
    def windows(self) -> dict[int, int]:
        """The window of each step, looked up by the ranks in every forward pass."""
        values: dict[int, int] = {}
        for entry in self.of("batch", training=True):
            if entry["window"] is not None:
                known = values.setdefault(entry["samples"], entry["window"])
                assert known == entry["window"], f"windows differ at {entry['samples']} samples"
        return values

    @cached_property
    def gradients(self) -> dict[str, torch.Tensor]:
        """The first step's gradients, whole."""
        return read_checkpoint(self.folder / "gradients")

    def log(self, rank: int = 0) -> str:
        """Return what a rank printed."""
        return (self.folder / f"log.{rank}.txt").read_text(errors="replace")

    def _by_sample(self, event: str, name: str) -> dict[int, Any]:
        """Collect rows by sample; the parts that context-parallel ranks have are added up."""
        parts: dict[int, dict[int, Any]] = {}
        for entry in self.of(event, training=True):
            rows = entry[name]
            if rows is None:
                continue
            num_data_ranks = 1 + max(e["data_rank"] for e in self.events if "data_rank" in e)
            place = entry["micro_batch"] * num_data_ranks + entry["data_rank"]
            for row, value in enumerate(rows):
                sample = entry["samples"] + place * len(rows) + row
                parts.setdefault(sample, {})[entry["context_rank"]] = value
        return {sample: sum(values.values()) for sample, values in sorted(parts.items())}


def _hashable(entry: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in entry.items() if not isinstance(value, list)]


class Trainer:
    """Starts runs of one small model from the same weights.

    Args:
        pool: where they run.
        folder: gets a folder per run.
    """

    def __init__(self, pool: ProcessPool, folder: Path) -> None:
        self.pool = pool
        self.folder = folder
        self._count = 0
        self._checkpoints: dict[str, Path] = {}

    @cached_property
    def documents(self) -> Path:
        """A dataset of short random documents, two to ten in a row."""
        generator = torch.Generator().manual_seed(1)
        return self.build("documents", torch.randint(2, 40, (400,), generator=generator).tolist())

    @cached_property
    def sparse_documents(self) -> Path:
        """A dataset of which most tokens are end-of-document tokens, up to 90 in a run."""
        generator = torch.Generator().manual_seed(2)
        lengths: list[int] = []
        for length, num_empty in torch.randint(2, 90, (60, 2), generator=generator).tolist():
            lengths += [length // 2, *[1] * num_empty]
        return self.build("sparse", lengths)

    def build(self, name: str, lengths: list[int]) -> Path:
        """Write a dataset of random documents of these lengths, and return its prefix."""
        prefix = self.folder / name
        self.pool.run(
            "recorded_training:build_documents",
            num_processes=1,
            folder=self.folder,
            arguments={
                "prefix": str(prefix),
                "lengths": lengths,
                "vocab_size": EOD,
                "eod": EOD,
            },
        )
        return prefix

    def initial_weights(self, architecture: str) -> Path:
        """A checkpoint of stock Megatron's after one step, of a single process."""
        if architecture not in self._checkpoints:
            folder = self.folder / f"initial-{architecture}"
            self.train(
                f"--train-samples 8 --micro-batch-size 8 --save {folder} --save-interval 1",
                architecture=architecture,
                load=False,
            )
            self._checkpoints[architecture] = folder
        return self._checkpoints[architecture]

    def on(self, pool: ProcessPool) -> Trainer:
        """Return a trainer whose runs go to another pool, on the same data."""
        other = copy.copy(self)
        other.pool = pool
        other.folder = self.new_folder("other")
        return other

    def new_folder(self, name: str) -> Path:
        """Return a folder that nothing has used."""
        self._count += 1
        return self.folder / f"{name}{self._count}"

    def train(
        self,
        flags: str,
        *,
        num_processes: int = 1,
        architecture: str = "llama",
        load: bool = True,
        global_batch_size: int | None = GLOBAL_BATCH_SIZE,
        exit_codes: tuple[int, ...] = (0,),
        environment: dict[str, str] | None = None,
        data: str | None = None,
        body: str = "recorded_training:train",
        **options: Any,
    ) -> Run:
        """Train and return the record.

        Args:
            flags: added to those of the small model.
            num_processes: ranks.
            architecture: a key of ``ARCHITECTURES``.
            load: whether to begin from `initial_weights`.
            global_batch_size: None where the flags say it.
            exit_codes: what the ranks may end with.
            environment: set in every rank.
            data: the flags that name it; None: `documents`, all for training unless the flags say
                otherwise.
            body: what each rank calls with the folder, the flags and the options.
            options: of `recorded_training.train`, or of another body.
        """
        start = ""
        if load:
            start = f"--load {self.initial_weights(architecture)} --finetune"
        if global_batch_size is not None:
            start += f" --global-batch-size {global_batch_size}"
        data = data or f"--data-path {self.documents} --split 100,0,0"
        data += f" --data-cache-path {self.folder / 'cache'}"
        words = f"{BASE_FLAGS} {ARCHITECTURES[architecture]} {data} {start} {flags}".split()
        run = Run(self.new_folder("run"))
        run.exit_codes = self.pool.run(
            body,
            num_processes=num_processes,
            folder=run.folder,
            arguments={"folder": str(run.folder), "flags": words, **options},
            environment={"SKYLADDER_TRACEBACK": "1", **(environment or {})},
            exit_codes=exit_codes,
        )
        return run
