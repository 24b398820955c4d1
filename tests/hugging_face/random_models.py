"""Random models in Hugging Face's form, of every family."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from trained import SEQ_LENGTH, VOCAB_SIZE

from megatron_skyladder.hugging_face import weights
from megatron_skyladder.hugging_face.architecture import Architecture, Rope, hugging_face_config

LLAMA = Architecture(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=80,
    num_heads=4,
    num_groups=2,
    head_dim=8,
    vocab_size=VOCAB_SIZE,
    max_positions=SEQ_LENGTH,
    norm_epsilon=1e-5,
    init_std=0.02,
    rope=Rope(10_000),
    tied=False,
    qkv_bias=False,
    qk_norm=False,
)


def write_model(folder: Path, model: Architecture, dtype: str = "float32") -> Path:
    """Write a model with random weights as transformers would, in one file."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).mul(0.2).to(getattr(torch, dtype))
        for part in weights.hugging_face_shapes(model)
        for name, shape in part.items()
    }
    for name, tensor in tensors.items():
        if name.endswith("o_proj.bias"):
            tensor.zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hugging_face_config(model, dtype)))
    return folder


def all_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_model(folder: Path, other: Path) -> None:
    found, expected = all_weights(folder), all_weights(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, other)]
    assert configs[0] == configs[1]
