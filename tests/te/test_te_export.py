"""Checkpoints of Transformer Engine's layers: they have other names and extra states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reference_kernels import FLOAT32_VARIABLE
from runs import VOCAB_SIZE, Trainer
from safetensors.torch import load_file
from test_parity import CONSTANT, loss_errors
from test_te_training import FULL_TE, LOCAL, UNFUSED

from megatron_skyladder.hugging_face.exporting import export
from megatron_skyladder.hugging_face.importing import import_model

pytestmark = pytest.mark.te

EXACT = {FLOAT32_VARIABLE: "1"}
ATTENTION = f"{CONSTANT} --skyladder-attention-backend te {UNFUSED} --micro-batch-size 2"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"


@pytest.fixture(scope="module")
def trainer(pool, tmp_path_factory) -> Trainer:
    """Starts runs on the stubs."""
    return Trainer(pool, tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module")
def exported(trainer: Trainer, tmp_path_factory) -> dict[str, Path]:
    """The same run, saved in both formats by Transformer Engine's layers, and exported."""
    folders = {}
    for form in ("torch_dist", "torch"):
        folder = tmp_path_factory.mktemp("te") / form
        save = f"--save {folder} --save-interval 2 --train-samples 16 --ckpt-format {form}"
        trainer.train(
            f"{ATTENTION} {FULL_TE} {TP2} {save}", num_processes=2, load=False, environment=EXACT
        )
        folders[form] = export(folder, folder.with_suffix(".hf"), without_tokenizer=True).folder
    return folders


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def test_both_formats_are_exported_alike(exported: dict[str, Path]) -> None:
    dist, legacy = (weights(exported[form]) for form in ("torch_dist", "torch"))
    assert len(dist) == 3 + 4 * 9
    assert dist.keys() == legacy.keys()
    assert all(torch.equal(dist[name], legacy[name]) for name in dist)


def test_an_import_loads_into_both_kinds_of_layers(
    trainer: Trainer, exported: dict[str, Path], tmp_path: Path
) -> None:
    done = import_model(exported["torch_dist"], tmp_path / "megatron", divisible_by=64)
    assert done.model.vocab_size == VOCAB_SIZE
    load = f"--load {done.folder} --finetune --no-load-optim --no-load-rng --train-samples 40"
    runs = [
        trainer.train(f"{ATTENTION} {spec} {load}", load=False, environment=EXACT)
        for spec in (FULL_TE, LOCAL)
    ]
    assert max(loss_errors(*runs)) < 1e-6
