"""Small models that Megatron's own trainer trained, of every kind and layout that is exported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch

from megatron_skyladder.data.indexed import IndexedWriter
from megatron_skyladder.hugging_face import checking
from megatron_skyladder.testing import ProcessPool

SEQ_LENGTH = 64
VOCAB_SIZE = 330  # of which 384 rows are stored
STEPS = 3
BASE = (
    f"--num-layers 4 --hidden-size 32 --ffn-hidden-size 80 --num-attention-heads 4 "
    f"--seq-length {SEQ_LENGTH} --max-position-embeddings {SEQ_LENGTH} "
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--micro-batch-size 2 --global-batch-size 4 --lr 1e-2 --min-lr 1e-2 --init-method-std 0.2 "
    "--attention-dropout 0 --hidden-dropout 0 --seed 1 --log-interval 1 --eval-iters 0 "
    "--eval-interval 100 --num-workers 0 --split 100,0,0"
)
GROUPS = "--group-query-attention --num-query-groups 2"
UNTIED = "--untie-embeddings-and-output-weights"
TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
VPP2 = "--num-layers-per-virtual-pipeline-stage 1"
DISTRIBUTED = "--use-distributed-optimizer"
NULL_TOKENIZER = f"--tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE}"
LADDER = "--skyladder-start-window 8 --skyladder-expand-fraction 0.5"


@dataclass(frozen=True)
class Kind:
    """A model and how it was trained.

    Args:
        flags: beside `BASE`.
        processes: ranks.
        family: what it is in Hugging Face's words.
    """

    flags: str
    processes: int
    family: str


# Each setting is in at least one: tied or not, groups or not, biases, norms, rotary scalings,
# layouts, precisions, formats.
KINDS = {
    "llama": Kind(f"{GROUPS} {UNTIED} {LADDER}", 1, "Llama"),
    "tied, linear rope, tp2 pp2 sp": Kind(
        f"{GROUPS} {TP2} {PP2} --sequence-parallel {DISTRIBUTED} "
        "--rotary-seq-len-interpolation-factor 4",
        4,
        "Llama",
    ),
    "qwen2, llama3 rope, vpp": Kind(
        f"{GROUPS} {UNTIED} {PP2} {VPP2} --add-qkv-bias --use-rope-scaling", 2, "Qwen2"
    ),
    "qwen3 with bias, wide heads, tp2 dp2": Kind(
        f"{UNTIED} {TP2} {DISTRIBUTED} --qk-layernorm --add-qkv-bias --kv-channels 12 "
        "--norm-epsilon 1e-6 --rotary-base 500000",
        4,
        "Qwen3",
    ),
    "yarn, stages": Kind(
        f"{GROUPS} {UNTIED} --position-embedding-type yarn --rotary-scaling-factor 2 "
        "--yarn-original-max-position-embeddings 512 --yarn-beta-fast 16 --yarn-beta-slow 2 "
        "--no-yarn-correction-range-round-to-int --mscale 2 --mscale-all-dim 0.5 "
        "--skyladder-schedule staged --skyladder-stages "
        "16:1/3 32:1/3,yarn=12.5,rope=20000 final:rest,yarn=40",
        1,
        "Llama",
    ),
    "bf16, dp2": Kind(f"{GROUPS} {UNTIED} {DISTRIBUTED} --bf16", 2, "Llama"),
}
LEGACY = {
    "torch, tp2 pp2 vpp2 bf16": Kind(
        f"{GROUPS} {UNTIED} {TP2} {PP2} {VPP2} --add-qkv-bias --bf16 {DISTRIBUTED}", 4, "Qwen2"
    ),
    "torch, uneven pp2 tied": Kind(f"{PP2} --decoder-first-pipeline-num-layers 1", 2, "Llama"),
}


class Runs:
    """Trains each kind once.

    Args:
        pool: where ranks run.
        folder: gets a folder per kind.
    """

    def __init__(self, pool: ProcessPool, folder: Path) -> None:
        self.pool = pool
        self.folder = folder
        self.checkpoint = cache(self._checkpoint)
        self.legacy = cache(self._legacy)
        self.count = 0

    @cached_property
    def data(self) -> Path:
        """Random documents, for a vocabulary of `VOCAB_SIZE`."""
        prefix = self.folder / "documents"
        generator = np.random.default_rng(0)
        with IndexedWriter(prefix, np.uint16) as writer:
            for _ in range(100):
                tokens = generator.integers(0, VOCAB_SIZE, generator.integers(10, 90))
                writer.add_document(tokens.astype(np.uint16))
        return prefix

    def train(
        self, flags: str, processes: int = 1, *, steps: int = STEPS, losses: Path | None = None
    ) -> None:
        """Train with these flags beside those of the data."""
        self.count += 1
        data = f"--data-path {self.data} --data-cache-path {self.folder / 'cache'}"
        words = f"{data} --train-iters {steps} {flags}".split()
        self.pool.run(
            "trained_bodies:train",
            num_processes=processes,
            folder=self.folder / f"run{self.count}",
            arguments={"flags": words, "losses": None if losses is None else str(losses)},
            environment={"SKYLADDER_TRACEBACK": "1"},
        )

    def _checkpoint(self, name: str, tokenizer: str = NULL_TOKENIZER) -> Path:
        """Return the folder of a run's checkpoints, in format torch_dist."""
        folder = self.folder / f"checkpoint-{self.count}"
        kind = KINDS[name]
        save = f"--save {folder} --save-interval {STEPS} --ckpt-format torch_dist"
        self.train(f"{BASE} {kind.flags} {tokenizer} {save}", kind.processes)
        return folder

    def _legacy(self, name: str) -> tuple[Path, Path]:
        """Return a run's checkpoints in format torch, and what Megatron converts them to."""
        folder, converted = (self.folder / f"{c}-{self.count}" for c in ("torch", "converted"))
        kind = LEGACY[name]
        flags = f"{BASE} {kind.flags} {NULL_TOKENIZER}"
        save = f"--save {folder} --save-interval {STEPS} --ckpt-format torch"
        self.train(f"{flags} {save}", kind.processes)
        load = f"--load {folder} --ckpt-format torch --no-load-optim --no-load-rng --no-save-optim"
        convert = f"--ckpt-convert-format torch_dist --ckpt-convert-save {converted}"
        self.train(f"{flags} {load} --no-save-rng {convert}", kind.processes)
        return folder, converted / "torch_dist"

    def megatron_logits(self, iteration: Path, folder: Path) -> torch.Tensor:
        """Return the logits of Megatron's own model, at `checking.sample_tokens`."""
        self.count += 1
        scratch = self.folder / f"logits{self.count}"
        scratch.mkdir()
        config = json.loads((folder / "config.json").read_text())
        torch.save(checking.sample_tokens(config), scratch / "tokens.pt")
        paths = {"iteration": iteration, "folder": folder, "tokens": scratch / "tokens.pt"}
        self.pool.run(
            "trained_bodies:logits",
            num_processes=1,
            folder=scratch,
            arguments={k: str(v) for k, v in {**paths, "out": scratch / "logits.pt"}.items()},
        )
        return torch.load(scratch / "logits.pt", weights_only=True)
