"""Checkpoints in other forms than the trainer here writes them: other names, releases, Bridge."""

from __future__ import annotations

import io
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from random_models import LLAMA, assert_same_model, write_model
from test_architecture import ARGS, BRIDGE
from trained import VOCAB_SIZE

from megatron_skyladder.hugging_face import torch_dist, weights
from megatron_skyladder.hugging_face.architecture import Architecture
from megatron_skyladder.hugging_face.checkpoints import open_checkpoint
from megatron_skyladder.hugging_face.exporting import export
from megatron_skyladder.hugging_face.folder import HuggingFaceWeights
from megatron_skyladder.hugging_face.torch_dist import LazyTensor

PLAIN = {"without_tokenizer": True, "vocab_size": VOCAB_SIZE}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "hf", LLAMA)


def megatron_weights(source: Path, layers: list[int]) -> dict[str, torch.Tensor]:
    """Return a model's weights as Megatron names them, with layers numbered."""
    tensors = HuggingFaceWeights(source)
    found = {name: tensors.read(other) for name, other in weights.OUTSIDE.items()}
    for place, index in enumerate(layers):
        layer = weights.layer_to_megatron(tensors.layer(index), LLAMA)
        found |= {f"decoder.layers.{place}.{name}": tensor for name, tensor in layer.items()}
    return found


def save_rank(folder: Path, name: str, model: dict[str, object], **args: object) -> None:
    rank = folder / "iter_0000005" / name
    rank.mkdir(parents=True)
    sizes = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    state = {
        "args": Namespace(**{**ARGS, **sizes, **args}, seq_length=64),
        "checkpoint_version": 3.0,
        "iteration": 5,
        "model": model,
    }
    torch.save(state, rank / "model_optim_rng.pt")


def test_transformer_engine_in_format_torch(source: Path, tmp_path: Path) -> None:
    """Its norms are part of the layers after them, and its extra states bytes or tensors."""
    model: dict[str, object] = dict(megatron_weights(source, [0, 1, 2, 3]))
    for number, state in enumerate((None, io.BytesIO(b"fp8"), torch.zeros(3), torch.zeros(0))):
        model[f"decoder.layers.{number}.self_attention.linear_qkv._extra_state"] = state
    model["output_layer._extra_state"] = torch.zeros(1)
    save_rank(tmp_path / "run", "mp_rank_00", model)
    done = export(tmp_path / "run", tmp_path / "out", **PLAIN)
    assert done.checkpoint.iteration == 5
    assert_same_model(done.folder, source)


def test_layers_that_are_numbered_in_torch_dist(source: Path, tmp_path: Path) -> None:
    """As Megatron has them where layers differ from each other; chunks of a tensor are joined."""
    tensors = megatron_weights(source, [0, 1, 2, 3])
    lazy = {
        name: LazyTensor(tuple(t.shape), t.dtype, 7, lambda first, last, t=t: t[first:last])
        for name, t in tensors.items()
    }
    folder = tmp_path / "iter_0000009"
    folder.mkdir()
    args = Namespace(**ARGS, seq_length=64)
    torch_dist.write(folder, lazy, {}, {"args": args, "iteration": 9})
    done = export(folder, tmp_path / "out", **PLAIN)
    assert done.checkpoint.iteration == 9
    assert_same_model(done.folder, source)


def test_pipeline_stages_of_unequal_length(source: Path, tmp_path: Path) -> None:
    first = megatron_weights(source, [0])
    last = megatron_weights(source, [1, 2, 3])
    for name in (weights.OUTPUT, weights.FINAL_NORM):
        del first[name]
    del last[weights.EMBEDDING]
    sizes = {"pipeline_model_parallel_size": 2}
    save_rank(tmp_path / "run", "mp_rank_00_000", first, **sizes)
    with pytest.raises(ValueError, match=r"missing \(tensor, pipeline\): \[\(0, 1\)\]"):
        open_checkpoint(tmp_path / "run")
    save_rank(tmp_path / "run", "mp_rank_00_001", last, **sizes)
    assert_same_model(export(tmp_path / "run", tmp_path / "out", **PLAIN).folder, source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint_version": 2.0}, "version 2.0, from before Megatron 2.5"),
        ({"model": {"language_model": {}}}, "before megatron-core"),
        ({"model": {"decoder.layers.1.x": torch.zeros(1)}}, r"layers \[1\] are not in a row"),
    ],
)
def test_old_forms_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    save_rank(tmp_path / "run", "mp_rank_00", {})
    path = next((tmp_path / "run").rglob("*.pt"))
    torch.save({**torch.load(path, weights_only=False), **change}, path)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "run")


def test_experts_are_refused(tmp_path: Path) -> None:
    save_rank(tmp_path / "run", "mp_rank_00_000_001", {})
    with pytest.raises(ValueError, match="expert-parallel run"):
        open_checkpoint(tmp_path / "run")


def test_weights_that_are_not_known_are_named(source: Path, tmp_path: Path) -> None:
    model = {**megatron_weights(source, [0, 1, 2, 3]), "mtp.layers.0.eh_proj.weight": torch.ones(2)}
    save_rank(tmp_path / "run", "mp_rank_00", model)
    with pytest.raises(ValueError, match=r"mtp.layers.0.eh_proj.weight"):
        export(tmp_path / "run", tmp_path / "out", **PLAIN)
    del model["mtp.layers.0.eh_proj.weight"]
    model["decoder.layers.3.mlp.router.weight"] = torch.ones(2)
    save_rank(tmp_path / "other", "mp_rank_00", model)
    with pytest.raises(ValueError, match=r"a layer has mlp.router.weight"):
        export(tmp_path / "other", tmp_path / "out", **PLAIN)


def write_bridge(source: Path, folder: Path, **environment: str) -> Path:
    """Write what Bridge does: no arguments, but run_config.yaml and train_state.pt."""
    yaml = pytest.importorskip("yaml")
    tensors = megatron_weights(source, [0, 1, 2, 3])
    lazy = {
        name: LazyTensor(tuple(t.shape), t.dtype, 999, lambda first, last, t=t: t[first:last])
        for name, t in tensors.items()
    }
    iteration = folder / "iter_0000020"
    iteration.mkdir(parents=True)
    torch_dist.write(iteration, lazy, {}, {})
    (iteration / "common.pt").unlink()
    config = {**BRIDGE, "env_vars": environment or None}
    (iteration / "run_config.yaml").write_text(yaml.safe_dump(config))
    state = {"step": torch.tensor(20), "consumed_train_samples": torch.tensor(160)}
    torch.save(state, iteration / "train_state.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("20")
    return folder


def test_bridge(source: Path, tmp_path: Path) -> None:
    schedule = "linear 8 -> 64, alpha 1/8; step of 8 samples"
    folder = write_bridge(source, tmp_path / "run", SKYLADDER_FINGERPRINT=schedule)
    done = export(folder, tmp_path / "out", without_tokenizer=True)  # it says its vocabulary
    assert (done.checkpoint.kind, done.checkpoint.iteration) == ("bridge", 20)
    assert_same_model(done.folder, source)
    card = (done.folder / "README.md").read_text()
    assert f"| schedule | {schedule} |" in card
    assert "| training tokens | 10,240 |" in card
    assert "| window at this checkpoint | unknown |" in card
    assert "how far the window had grown is not known" in done.notes[0]


def test_bridge_in_mid_ladder(source: Path, tmp_path: Path) -> None:
    """Its settings lie beside the fingerprint: 40 steps from 8 to 64 tokens, 20 of them done."""
    settings = {
        "skyladder_schedule": "linear",
        "skyladder_start_window": 8,
        "skyladder_expand_fraction": "0.5",
        "seq_length": 64,
        "global_batch_size": 8,
        "train_iters": 80,
        "log_interval": 100,
    }
    variables = {"SKYLADDER_FINGERPRINT": "linear", "SKYLADDER_SETTINGS": json.dumps(settings)}
    done = export(write_bridge(source, tmp_path / "run", **variables), tmp_path / "out", **PLAIN)
    assert "stands at a window of 36 of 64 tokens" in done.notes[0]
    card = (done.folder / "README.md").read_text()
    assert "| window at this checkpoint | 36 of 64 tokens |" in card


def test_bridge_without_a_ladder(source: Path, tmp_path: Path) -> None:
    done = export(write_bridge(source, tmp_path / "run"), tmp_path / "out", **PLAIN)
    assert done.notes == []
    card = (done.folder / "README.md").read_text()
    assert "attention over whole sequences throughout" in card


def test_a_checkpoint_of_nobody(source: Path, tmp_path: Path) -> None:
    folder = write_bridge(source, tmp_path / "run")
    (folder / "iter_0000020" / "run_config.yaml").unlink()
    with pytest.raises(ValueError, match="neither Megatron-LM nor Bridge wrote it whole"):
        open_checkpoint(folder)


def test_eight_bit_weights_are_refused(source: Path, tmp_path: Path) -> None:
    model = megatron_weights(source, [0, 1, 2, 3])
    model[weights.EMBEDDING] = model[weights.EMBEDDING].to(torch.uint8)
    save_rank(tmp_path / "run", "mp_rank_00", model)
    with pytest.raises(ValueError, match=r"the weights are uint8; float32, bfloat16"):
        export(tmp_path / "run", tmp_path / "out", **PLAIN)


def test_the_copy_of_a_tied_embedding_is_left_out(tmp_path: Path) -> None:
    model = Architecture(**{**vars(LLAMA), "tied": True})
    source = write_model(tmp_path / "hf", model)
    tensors = HuggingFaceWeights(source)
    stored = {weights.EMBEDDING: tensors.read("model.embed_tokens.weight")}
    stored[weights.FINAL_NORM] = tensors.read("model.norm.weight")
    stored[weights.OUTPUT] = stored[weights.EMBEDDING].clone()
    for index in range(4):
        layer = weights.layer_to_megatron(tensors.layer(index), model)
        stored |= {f"decoder.layers.{index}.{name}": t for name, t in layer.items()}
    untied = {"untie_embeddings_and_output_weights": False}
    save_rank(tmp_path / "run", "mp_rank_00", stored, **untied)
    assert_same_model(export(tmp_path / "run", tmp_path / "out", **PLAIN).folder, source)
