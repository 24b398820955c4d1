"""Hugging Face -> Megatron -> Hugging Face is the identity; Megatron trains on from the middle."""

from __future__ import annotations

import json
from argparse import Namespace
from math import log
from pathlib import Path

import pytest
import torch
from random_models import LLAMA, all_weights, assert_same_model, write_model
from safetensors.torch import save_file
from trained import PP2, SEQ_LENGTH, TP2, VOCAB_SIZE, Runs

from megatron_skyladder.hugging_face import checking, weights
from megatron_skyladder.hugging_face.architecture import (
    Architecture,
    Rope,
    Yarn,
)
from megatron_skyladder.hugging_face.checkpoints import open_checkpoint
from megatron_skyladder.hugging_face.exporting import export
from megatron_skyladder.hugging_face.importing import import_model
from megatron_skyladder.ladder.flags import config_from_args
from megatron_skyladder.testing import requires_megatron

CHANGES = {
    "llama": {},
    "tied": {"tied": True, "rope": Rope(500_000, "linear", 2.0)},
    "qwen2": {"qkv_bias": True, "rope": Rope(10_000, "llama3", 8.0)},
    "yarn": {"rope": Rope(10_000, "yarn", 4.0, Yarn(512, 32.0, 1.0, True, 0.1 * log(4) + 1))},
    "yarn of all": {"rope": Rope(50_000, "yarn", 2.5, Yarn(300, 8.0, 2.0, False, 1.3))},
    "qwen3": {"qk_norm": True, "head_dim": 12, "norm_epsilon": 1e-6},
    "qwen3 with bias": {
        "qk_norm": True,
        "qkv_bias": True,
        "output_bias": True,
        "num_groups": 4,
    },
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CHANGES)
def test_there_and_back_is_the_identity(tmp_path: Path, name: str, dtype: str) -> None:
    model = Architecture(**{**vars(LLAMA), **CHANGES[name]})
    source = write_model(tmp_path / "hf", model, dtype)
    done = import_model(source, tmp_path / "megatron", tensor_parallel=2)
    assert done.model == model
    back = export(done.folder, tmp_path / "back", without_tokenizer=True, vocab_size=VOCAB_SIZE)
    assert back.model == model
    assert_same_model(back.folder, source)


@pytest.mark.parametrize("name", ["llama", "qwen3 with bias, wide heads, tp2 dp2"])
def test_back_and_there_is_the_identity_but_for_padding(
    runs: Runs, tmp_path: Path, name: str
) -> None:
    exported = export(runs.checkpoint(name), tmp_path / "hf", without_tokenizer=True).folder
    imported = import_model(exported, tmp_path / "megatron").folder
    ours, theirs = open_checkpoint(imported).reader, open_checkpoint(runs.checkpoint(name)).reader
    for index in range(4):
        found, expected = ours.read_layer(index), theirs.read_layer(index)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    for table in (weights.EMBEDDING, weights.OUTPUT):
        rows = ours.read(table)
        assert rows.shape[0] == 384
        assert torch.equal(rows[:VOCAB_SIZE], theirs.read(table)[:VOCAB_SIZE])
        mean = rows[:VOCAB_SIZE].mean(dim=0).expand(384 - VOCAB_SIZE, -1)
        torch.testing.assert_close(rows[VOCAB_SIZE:], mean)


@requires_megatron
@pytest.mark.parametrize("name", CHANGES)
def test_megatron_computes_what_transformers_computes(
    runs: Runs, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("transformers")
    model = Architecture(**{**vars(LLAMA), **CHANGES[name]})
    source = write_model(tmp_path / "hf", model)
    done = import_model(source, tmp_path / "megatron")
    expected = runs.megatron_logits(done.folder / "release", source)
    tokens = checking.sample_tokens(json.loads((source / "config.json").read_text()))
    found = checking.hugging_face_logits(source, tokens)
    assert checking.difference(expected, found).difference < 1e-5


@requires_megatron
def test_training_goes_on_alike_at_every_layout(runs: Runs, tmp_path: Path) -> None:
    """The flags that are printed are all that it takes, but for the padding at another TP."""
    model = Architecture(**{**vars(LLAMA), "vocab_size": 385})
    source = write_model(tmp_path / "hf", model)
    done = import_model(source, tmp_path / "megatron", divisible_by=64)
    assert "from 385 to 448 rows" in done.notes[0]  # TP2 would have 512
    assert "--make-vocab-size-divisible-by 448/N" in done.notes[0]
    flags = " ".join(done.flags).replace(
        f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {source}",
        "--tokenizer-type NullTokenizer --vocab-size 385",
    )
    batch = (
        "--micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --seed 1 --log-interval 1 "
        "--eval-iters 0 --eval-interval 100 --num-workers 0 --split 100,0,0 "
        "--skyladder-start-window 8 --skyladder-expand-fraction 0.5"
    )
    losses = []
    wide = f"{TP2} {PP2} --sequence-parallel"
    for layout, processes in (("", 1), (f"{wide} --make-vocab-size-divisible-by 224", 4)):
        out = tmp_path / f"losses{processes}.json"
        runs.train(f"{flags} {batch} {layout}", processes, losses=out)
        losses.append(json.loads(out.read_text()))
    assert len(losses[0]) == len(losses[1]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=2e-6)
    assert losses[0][-1] < losses[0][0]


@requires_megatron
def test_printed_flags_set_what_the_model_is(runs: Runs, tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", LLAMA, "bfloat16")
    done = import_model(source, tmp_path / "megatron", seq_length=4 * SEQ_LENGTH)
    assert done.flags[-2:] == [
        "--skyladder-preset extend-context",
        f"--skyladder-start-window {SEQ_LENGTH}",
    ]
    words = [word for flag in done.flags for word in flag.split()]
    out = tmp_path / "args.json"
    runs.pool.run(
        "trained_bodies:parse",
        num_processes=1,
        folder=tmp_path / "parse",
        arguments={
            "flags": [*words, *["--micro-batch-size", "1", "--global-batch-size", "2"]],
            "out": str(out),
        },
    )
    args = json.loads(out.read_text())
    recorded = vars(open_checkpoint(done.folder).args)
    exceptions = {"seq_length", "max_position_embeddings", "rotary_base", "tokenizer_model"}
    for name in recorded.keys() & args.keys() - exceptions:
        if name.startswith(("consumed", "padded")) or args[name] is None:
            continue
        assert args[name] == recorded[name], name
    assert args["seq_length"] == args["max_position_embeddings"] == 4 * SEQ_LENGTH
    assert args["rotary_base"] == round(10_000 * 4 ** (8 / 6))
    assert (args["bf16"], args["finetune"]) == (True, True)
    ladder = config_from_args(Namespace(**args, train_iters=100))
    assert ladder.fingerprint.startswith("linear 64 -> 256, fraction 0.4 of 100 steps")
    assert "rotary base 10,000 for 64 positions becomes 63,496 for 256" in " ".join(done.notes)


def test_a_base_can_be_chosen(tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", LLAMA)
    done = import_model(
        source, tmp_path / "megatron", seq_length=2 * SEQ_LENGTH, rotary_base=1_000_000
    )
    assert "--rotary-base 1000000" in done.flags
    assert done.model.rope.base == 10_000  # of the weights


def test_more_rows_than_tokens_are_kept(tmp_path: Path) -> None:
    """Qwen's embeddings have rows for no token; Megatron pads from the tokenizer's size."""
    import prepare_inputs

    source = write_model(tmp_path / "hf", Architecture(**{**vars(LLAMA), "vocab_size": 700}))
    prepare_inputs.make_hf_folder(source)  # 300 tokens
    done = import_model(source, tmp_path / "megatron")
    assert "--make-vocab-size-divisible-by 768" in done.flags
    assert open_checkpoint(done.folder).reader.read(weights.EMBEDDING).shape[0] == 768
    back = export(done.folder, tmp_path / "back", vocab_size=700)
    assert_same_weights = all_weights(back.folder)
    assert torch.equal(assert_same_weights["lm_head.weight"], all_weights(source)["lm_head.weight"])


def damaged(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "'gemma2'. Megatron checkpoints can be made of llama, qwen2"),
        ({"attention_bias": True}, "lacks 16, such as model.layers.0.self_attn.k_proj.bias"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_theta": 5000.0}, "contradicts itself"),
        ({"rope_theta": 0.5, "rope_parameters": None}, "whole numbers"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "rope_parameters": None},
            "'dynamic'.*cannot be given",
        ),
        (
            {
                "rope_scaling": {"rope_type": "yarn", "factor": 1.0, "attention_factor": 2.0},
                "rope_parameters": None,
            },
            "'yarn'.*cannot be given",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 32.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
                "rope_parameters": None,
            },
            "32.0.*cannot be given",
        ),
        ({"num_hidden_layers": 5}, "lacks 9, such as model.layers.4"),
        ({"num_hidden_layers": 3}, "has 9 unknown weights, such as model.layers.3"),
        ({"intermediate_size": 81}, r"down_proj.weight is \[32, 80\], but config.json"),
    ],
)
def test_what_megatron_cannot_be_given_is_refused(
    tmp_path: Path, changes: dict, message: str
) -> None:
    source = damaged(write_model(tmp_path / "hf", LLAMA), **changes)
    with pytest.raises(ValueError, match=message):
        import_model(source, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_a_bias_that_megatron_lacks_is_refused(tmp_path: Path) -> None:
    model = Architecture(**{**vars(LLAMA), **CHANGES["qwen3 with bias"]})
    source = write_model(tmp_path / "hf", model)
    tensors = all_weights(source)
    tensors["model.layers.2.self_attn.o_proj.bias"][3] = 0.5
    save_file({k: v.clone() for k, v in tensors.items()}, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"o_proj.bias is not zero"):
        import_model(source, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_other_wrong_input(tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", LLAMA)
    with pytest.raises(ValueError, match="is no extension: the model has 64 positions"):
        import_model(source, tmp_path / "megatron", seq_length=64)
    with pytest.raises(ValueError, match="give --seq-length as well"):
        import_model(source, tmp_path / "megatron", rotary_base=5)
    with pytest.raises(ValueError, match="has no config"):
        import_model(tmp_path, tmp_path / "megatron")
    (tmp_path / "megatron").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        import_model(source, tmp_path / "megatron")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(ValueError, match="Only safetensors files are read"):
        import_model(source, tmp_path / "megatron")
