"""Exported models compute what Megatron's own model computes, whatever they were trained as."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_architecture import BRIDGE
from trained import KINDS, LEGACY, VOCAB_SIZE, Runs

from megatron_skyladder.hugging_face import checking
from megatron_skyladder.hugging_face.architecture import bridge_arguments
from megatron_skyladder.hugging_face.checkpoints import iteration_folder
from megatron_skyladder.hugging_face.exporting import Exported, export
from megatron_skyladder.testing import requires_megatron

pytestmark = [requires_megatron]
pytest.importorskip("transformers")

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def exported(runs: Runs) -> Callable[[str], tuple[Exported, torch.Tensor]]:
    """Each kind's export, and the logits of Megatron's own model."""

    @cache
    def make(name: str) -> tuple[Exported, torch.Tensor]:
        checkpoint = runs.checkpoint(name)
        done = export(checkpoint, checkpoint.with_suffix(".hf"), without_tokenizer=True)
        iteration = iteration_folder(checkpoint, None)
        return done, runs.megatron_logits(iteration, done.folder)

    return make


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_megatrons(exported, name: str) -> None:
    done, expected = exported(name)
    assert done.model.family == KINDS[name].family
    assert done.dtype == ("bfloat16" if "bf16" in name else "float32")
    assert expected.shape[-1] == (512 if "tp2" in name else 384)  # padded; the export is not
    tokens = checking.sample_tokens(json.loads((done.folder / "config.json").read_text()))
    found = checking.hugging_face_logits(done.folder, tokens)
    assert found.shape[-1] == VOCAB_SIZE
    comparison = checking.difference(expected, found)
    print(f"{name}: {comparison}")
    assert comparison.difference < TOLERANCE


def _rope_base(config: dict, weights: dict) -> None:
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 10_500.0


def _epsilon(config: dict, weights: dict) -> None:
    config["rms_norm_eps"] = 1e-6


def _gate_and_up(config: dict, weights: dict) -> None:
    gate, up = (f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up"))
    weights[gate], weights[up] = weights[up], weights[gate]


def _queries_of_another_group(config: dict, weights: dict) -> None:
    """Take Megatron's interleaved rows as if they were q, k, v."""
    q, k, v = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv")
    heads = torch.cat([weights[q], weights[k], weights[v]]).view(8, 8, -1)
    weights[q] = heads[[0, 1, 4, 2]].reshape(32, -1)
    weights[k], weights[v] = heads[[3, 6]].reshape(16, -1), heads[[5, 7]].reshape(16, -1)


def _norms(config: dict, weights: dict) -> None:
    before, after = (
        f"model.layers.1.{part}_layernorm.weight" for part in ("input", "post_attention")
    )
    weights[before], weights[after] = weights[after], weights[before]


def _layers(config: dict, weights: dict) -> None:
    for name in [name for name in weights if name.startswith("model.layers.1.mlp")]:
        other = name.replace("layers.1", "layers.2")
        weights[name], weights[other] = weights[other], weights[name]


@pytest.mark.parametrize(
    "damage",
    [_rope_base, _epsilon, _gate_and_up, _queries_of_another_group, _norms, _layers],
)
def test_the_comparison_has_teeth(exported, tmp_path: Path, damage) -> None:
    done, expected = exported("llama")
    config = json.loads((done.folder / "config.json").read_text())
    weights = {
        k: v for file in done.folder.glob("*.safetensors") for k, v in load_file(file).items()
    }
    damage(config, weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({k: v.clone() for k, v in weights.items()}, tmp_path / "model.safetensors")
    found = checking.hugging_face_logits(tmp_path, checking.sample_tokens(config))
    assert checking.difference(expected, found).difference > 10 * TOLERANCE


@pytest.mark.parametrize("name", LEGACY)
def test_format_torch_equals_what_megatron_converts_it_to(
    runs: Runs, tmp_path: Path, name: str
) -> None:
    legacy, converted = runs.legacy(name)
    ours = export(legacy, tmp_path / "torch", without_tokenizer=True)
    theirs = export(converted, tmp_path / "torch_dist", without_tokenizer=True)
    assert (ours.checkpoint.kind, theirs.checkpoint.kind) == ("torch", "torch_dist")
    assert ours.model == theirs.model
    shards = sorted(path.name for path in ours.folder.glob("*.safetensors"))
    assert len(shards) == 6
    for shard in shards:
        found, expected = load_file(ours.folder / shard), load_file(theirs.folder / shard)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), key


def test_check_runs_megatron_in_a_process_of_its_own(runs: Runs, tmp_path: Path) -> None:
    checkpoint = runs.checkpoint("llama")
    done = export(checkpoint, tmp_path / "out", without_tokenizer=True, check=True)
    assert done.comparison is not None
    assert done.comparison.agrees
    assert done.comparison.difference < TOLERANCE


def test_check_builds_its_reference_from_settings_that_are_lists() -> None:
    """The reference would be as wrong as the export without them, and both would agree."""
    model = {**BRIDGE["model"], "no_rope_freq": [0, 0, 0, 1], "moe_layer_freq": [0, 1, 1, 1]}
    args = Namespace(no_rope_freq=None, moe_layer_freq=1)
    checking._take_over(args, bridge_arguments({**BRIDGE, "model": model}))
    assert args.no_rope_freq == [0, 0, 0, 1]
    assert args.moe_layer_freq == [0, 1, 1, 1]


def test_what_disagrees_does_not_appear(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = checking.Comparison(difference=0.1, largest=4.0, num_tokens=512)
    monkeypatch.setattr(checking, "compare", lambda checkpoint, folder: wrong)
    with pytest.raises(ValueError, match="NOT the same model"):
        export(runs.checkpoint("llama"), tmp_path / "out", without_tokenizer=True, check=True)
    assert not (tmp_path / "out").exists()


def test_check_says_what_it_cannot_do(runs: Runs, tmp_path: Path) -> None:
    legacy, _ = runs.legacy("torch, tp2 pp2 vpp2 bf16")
    with pytest.raises(ValueError, match="ckpt-convert-format torch_dist"):
        export(legacy, tmp_path / "out", without_tokenizer=True, check=True)
    with pytest.raises(ValueError, match="float32, not rounded to bfloat16"):
        export(
            runs.checkpoint("llama"),
            tmp_path / "out",
            without_tokenizer=True,
            check=True,
            dtype="bfloat16",
        )
