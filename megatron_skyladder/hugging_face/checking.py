"""Logits of Megatron's own model beside those of the exported one; the proof of a conversion.

Megatron builds its model from the checkpoint's arguments and loads it with its own code, on the CPU
engine, in a process of its own: the engine has to be there before Megatron is imported. Both models
compute in fp32 with full causal attention.

    python -m megatron_skyladder.hugging_face.checking ITERATION_FOLDER FOLDER TOKENS OUT [trust]
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_skyladder.hugging_face import pickles
from megatron_skyladder.hugging_face.architecture import from_hugging_face, megatron_settings
from megatron_skyladder.hugging_face.checkpoints import (
    TRACKER,
    Checkpoint,
    iteration_folder,
    open_checkpoint,
)
from megatron_skyladder.hugging_face.folder import HuggingFaceWeights
from megatron_skyladder.hugging_face.weights import EMBEDDING

NUM_SEQUENCES, MAX_TOKENS = 2, 256
RELATIVE_TOLERANCE = 1e-4  # of the largest logit; layers of fp32 sums in two orders
LOG_TAIL_LINES = 20
# what decides the model beside the fields of Megatron's TransformerConfig
MODEL_ARGUMENTS = {
    "apply_layernorm_1p",
    "group_query_attention",
    "max_position_embeddings",
    "mscale",
    "mscale_all_dim",
    "norm_epsilon",
    "openai_gelu",
    "padded_vocab_size",
    "position_embedding_type",
    "quick_geglu",
    "rotary_base",
    "rotary_percent",
    "rotary_scaling_factor",
    "rotary_seq_len_interpolation_factor",
    "squared_relu",
    "swiglu",
    "untie_embeddings_and_output_weights",
    "use_rope_scaling",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
    "yarn_original_max_position_embeddings",
}
# fields that decide how it runs
_RUNTIME_WORDS = ("fusion", "recompute", "fp8", "fp4", "cuda_graph", "offload", "init_method")
_RUNTIME_FIELDS = {"attention_backend", "transformer_impl", "fp16", "bf16", "params_dtype"}


@dataclass(frozen=True)
class Comparison:
    """How far two models are apart.

    Args:
        difference: the largest, of all logits.
        largest: logit, by magnitude.
        num_tokens: compared.
    """

    difference: float
    largest: float
    num_tokens: int

    @property
    def agrees(self) -> bool:
        """Whether rounding explains the difference."""
        return self.difference <= RELATIVE_TOLERANCE * max(1.0, self.largest)

    def __str__(self) -> str:
        verdict = "the same model" if self.agrees else "NOT the same model: do not use it"
        return (
            f"check: logits of {self.num_tokens} tokens differ from Megatron's by at most "
            f"{self.difference:.1e} (largest logit {self.largest:.3g}): {verdict}"
        )


def refuse(checkpoint: Checkpoint, dtype: str | None) -> None:
    """Say early why a comparison is not possible.

    Args:
        checkpoint: to compare with.
        dtype: of the export, None for the checkpoint's.

    Raises:
        ValueError: Megatron cannot load it in one process, or the export is rounded.
    """
    args = checkpoint.args
    ranks = getattr(args, "tensor_model_parallel_size", 1) * getattr(
        args, "pipeline_model_parallel_size", 1
    )
    if checkpoint.kind == "torch" and ranks > 1:
        raise ValueError(
            f"--check needs a checkpoint that Megatron loads in one process; this one, of format "
            f"torch, needs {ranks}. Let Megatron convert it (--ckpt-convert-format torch_dist "
            "--ckpt-convert-save DIR) and check the export of that."
        )
    stored = str(checkpoint.reader.dtype(EMBEDDING)).removeprefix("torch.")
    if dtype not in (None, stored):
        raise ValueError(
            f"--check compares weights as they are stored, {stored}, not rounded to {dtype}. Leave "
            "--dtype or --check out."
        )


def compare(checkpoint: Checkpoint, folder: Path) -> Comparison:
    """Compare an exported folder with the checkpoint that it was made from.

    Raises:
        ValueError: Megatron is not there, or fails; the message has the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="skyladder-check-") as name:
        scratch = Path(name)
        tokens = sample_tokens(HuggingFaceWeights(folder).config)
        torch.save(tokens, scratch / "tokens.pt")
        _run_megatron(checkpoint, folder, scratch)
        expected = torch.load(scratch / "logits.pt", weights_only=True)
    return difference(expected, hugging_face_logits(folder, tokens))


def sample_tokens(config: dict[str, Any]) -> torch.Tensor:
    """Return the tokens to compare at, int64 ``[NUM_SEQUENCES, up to MAX_TOKENS]``."""
    length = min(MAX_TOKENS, config["max_position_embeddings"])
    generator = torch.Generator().manual_seed(7)
    return torch.randint(config["vocab_size"], (NUM_SEQUENCES, length), generator=generator)


def difference(expected: torch.Tensor, found: torch.Tensor) -> Comparison:
    """Compare logits ``[sequences, tokens, vocabulary]``; Megatron's may have padding."""
    expected = expected[..., : found.shape[-1]]
    return Comparison(
        difference=float((expected - found).abs().max()),
        largest=float(expected.abs().max()),
        num_tokens=expected.shape[0] * expected.shape[1],
    )


def hugging_face_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of the folder in transformers, in fp32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(tokens).logits
    return logits


def _run_megatron(checkpoint: Checkpoint, folder: Path, scratch: Path) -> None:
    """Compute Megatron's logits in another process, without a GPU."""
    module = "megatron_skyladder.hugging_face.checking"
    paths = (checkpoint.folder, folder, scratch / "tokens.pt", scratch / "logits.pt")
    words = [*map(str, paths), *(["trust"] if checkpoint.trusted else [])]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "SKYLADDER_DEVICE": "cpu",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # one process: the store picks a free one
    }
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-LOG_TAIL_LINES:])
        raise ValueError(f"--check: Megatron could not compute its logits:\n{tail}")


def megatron_logits(
    iteration: Path | str,
    folder: Path | str,
    tokens: Path | str,
    out: Path | str,
    trust: str = "",
) -> None:
    """Load a checkpoint into Megatron's model and save its logits; needs the CPU engine installed.

    Args:
        iteration: a checkpoint's folder.
        folder: exported from it; its settings make the command line.
        tokens: a file with int64 ``[sequences, tokens]``.
        out: gets fp32 ``[sequences, tokens, padded vocabulary]``.
        trust: ``trust`` to unpickle types that are not on the list of `pickles`.
    """
    source = open_checkpoint(Path(iteration), trust=trust == "trust")
    ids = torch.load(tokens, weights_only=True)
    with tempfile.TemporaryDirectory(prefix="skyladder-check-") as load:
        (Path(load) / TRACKER).write_text("release")
        (Path(load) / "release").symlink_to(iteration_folder(Path(iteration), None).resolve())
        model = _megatron_model(source, Path(folder), Path(load))
        length = ids.shape[1]
        positions = torch.arange(length).expand_as(ids)
        hidden = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
        with torch.no_grad():
            logits = model(ids, positions, hidden)
    torch.save(logits.float(), out)


def _megatron_model(source: Checkpoint, folder: Path, load: Path) -> Any:
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron

    from megatron_skyladder.megatron_lm import compat

    sys.argv = ["check", *_command_line(source, folder, load)]
    args = parse_and_validate_args()
    initialize_megatron(args)
    # what the checkpoint says goes before what our table of flags makes of it
    _take_over(compat.args(), source.args)
    model = _build()
    load_checkpoint([model], None, None)
    return model.eval()


def _build() -> Any:
    """Build the model as this release's trainer does: what it ignores differs."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_skyladder.megatron_lm import compat, launch, releases

    trainer = releases.release_of(releases.installed()).trainer
    if trainer is not releases.Trainer.TAKES_MODEL_CONFIG:
        return launch.gpt_model()
    from megatron.training.argument_utils import gpt_config_from_args

    config = gpt_config_from_args(compat.args())
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return config.get_builder_cls()(config).build_model(groups)


def _command_line(source: Checkpoint, folder: Path, load: Path) -> list[str]:
    model = from_hugging_face(HuggingFaceWeights(folder).config)
    flags = [word for flag, _ in megatron_settings(model) for word in flag.split()]
    rows = source.reader.read(EMBEDDING).shape[0]
    rest = (
        f"--seq-length {model.max_positions} --max-position-embeddings {model.max_positions} "
        f"--tokenizer-type NullTokenizer --vocab-size {rows} --make-vocab-size-divisible-by {rows} "
        "--micro-batch-size 1 --lr 1e-4 --train-iters 1 --no-load-optim --no-load-rng --finetune "
        f"--exit-on-missing-checkpoint --load {load} "
        f"--ckpt-format {'torch' if source.kind == 'torch' else 'torch_dist'}"
    )
    return [*flags, *rest.split()]


def _take_over(args: Namespace, recorded: Namespace) -> None:
    """Set the arguments that decide the model to what the checkpoint recorded."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer import TransformerConfig

    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    runtime = {field.name for field in dataclasses.fields(ModelParallelConfig)} | _RUNTIME_FIELDS
    for name in (names - runtime) | MODEL_ARGUMENTS:
        value = getattr(recorded, name, None)
        is_runtime = any(word in name for word in _RUNTIME_WORDS)
        if value is None or is_runtime or isinstance(value, pickles.Foreign):
            continue
        setattr(args, name, value)


def main() -> None:
    """Compute logits as `_run_megatron` asks for."""
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # kernels without a GPU
    from megatron_skyladder.cpu import engine

    engine.install()
    megatron_logits(*sys.argv[1:])


if __name__ == "__main__":
    main()
