"""--skyladder-init reference: the weights that Megatron really builds, under TP too."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.flags import add_arguments, config_from_args
from megatron_skyladder.planning.examples import example
from megatron_skyladder.runtime.weights import draw_as_reference, reference_stds
from megatron_skyladder.testing import ProcessPool, read_checkpoint, requires_megatron

OUTPUT_PROJECTIONS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
HIDDEN, LAYERS = 256, 3
SIZES = f"--hidden-size {HIDDEN} --num-layers {LAYERS} --ffn-hidden-size 512 --vocab-size 2047"
ONE_STEP = (
    "--train-iters 1 --skyladder-allow-unfinished --lr 0 --min-lr 0 --lr-warmup-iters 0 "
    "--eval-iters 0"
)
STD = 0.03952847  # sqrt(2 / (5 * 256))
OUTPUT_STD = 0.02083333  # 1 / 16 / 3


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool() as processes:
        yield processes


def parse(flags: str) -> SkyLadderConfig | None:
    args = add_arguments(argparse.ArgumentParser()).parse_args(flags.split())
    args.seq_length, args.global_batch_size = 64, 8
    args.train_iters, args.train_samples = 100, None
    return config_from_args(args)


def test_the_flag() -> None:
    given = parse("--skyladder-init reference")
    left_out = parse("--skyladder-start-window 8")
    assert given and left_out
    assert (given.init, left_out.init) == ("reference", "megatron")
    assert given.fingerprint == parse("--skyladder-schedule linear").fingerprint  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"init=xavier is unknown\. .*: megatron, reference\."):
        parse("--skyladder-init xavier")


def test_stds_by_hand() -> None:
    assert reference_stds(256, 3) == pytest.approx((STD, OUTPUT_STD), rel=1e-6)
    # the 1B model: sqrt(2 / 10240), 1 / 45.2548 / 22
    assert reference_stds(2048, 22) == pytest.approx((0.01397542, 0.00100441), rel=1e-5)


@requires_megatron
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_weights_that_training_begins_with(
    pool: ProcessPool, tmp_path: Path, tensor_parallel: int
) -> None:
    """The entry point's own, saved after a step with a learning rate of 0."""
    words = [
        *example("1b-8k", "skyladder", shrink=True).words,
        *(*SIZES.split(), "--tensor-model-parallel-size", str(tensor_parallel)),
        *(*ONE_STEP.split(), "--save", str(tmp_path / "saved"), "--ckpt-format", "torch_dist"),
    ]
    pool.run(
        "example_bodies:train",
        num_processes=tensor_parallel,
        folder=tmp_path,
        arguments={"words": words},
    )
    saved = read_checkpoint(tmp_path / "saved" / "iter_0000001")
    matrices = {
        name: weight.float()
        for name, weight in saved.items()
        if weight.dim() > 1 and "norm" not in name and not name.startswith("optimizer")
    }
    # qkv, proj, fc1, fc2 of all layers in one; embedding and output
    assert len(matrices) == 4 + 2, list(matrices)
    for name, weight in matrices.items():
        expected = OUTPUT_STD if name.endswith(OUTPUT_PROJECTIONS) else STD
        # bf16 rounds values, not their spread; five standard errors
        spread = pytest.approx(expected, rel=5 / math.sqrt(2 * weight.numel()))
        assert weight.std().item() == spread, name
        assert abs(weight.mean().item()) < 5 * expected / math.sqrt(weight.numel()), name


@requires_megatron
def test_another_way_to_draw_weights_ends_the_launch(pool: ProcessPool, tmp_path: Path) -> None:
    words = [*example("1b-8k", "skyladder", shrink=True).words, "--init-method-std", "0.01"]
    arguments = {"words": words}
    pool.run(
        "example_bodies:train",
        num_processes=1,
        folder=tmp_path,
        arguments=arguments,
        exit_codes=(2,),
    )
    message = "error: --init-method-std=0.01 cannot be combined with SkyLadder: --skyladder-init"
    assert message in (tmp_path / "log.0.txt").read_text()


def configuration(**values: object) -> Any:
    """Megatron's own, complete."""
    from megatron.core.transformer import TransformerConfig

    given = {"hidden_size": HIDDEN, "num_layers": LAYERS, "num_attention_heads": 4, **values}
    return TransformerConfig(**given)


@requires_megatron
@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"init_method_std": 0.01}, "--init-method-std"),
        ({"embedding_init_method_std": 1.0}, "--embedding-init-method-std"),
        ({"init_method": print}, "--init-method-xavier-uniform"),
        ({"use_mup": True}, "--use-mup"),
        ({"perform_initialization": False}, "perform_initialization=False"),
    ],
)
def test_another_way_to_draw_weights_is_refused(values: dict[str, object], flag: str) -> None:
    with pytest.raises(ValueError, match=f"reference and {flag} both say how weights are drawn"):
        draw_as_reference(configuration(**values), LAYERS)


@requires_megatron
def test_a_hidden_size_at_which_one_std_is_megatrons_own() -> None:
    """sqrt(2 / 5000) is 0.02, and 1 / sqrt(1000) / 3 is not 0.02 / sqrt(6)."""
    config = configuration(hidden_size=1000)
    draw_as_reference(config, LAYERS)
    assert config.init_method.keywords["std"] == 0.02
    assert config.output_layer_init_method.keywords["std"] == pytest.approx(0.0105409, rel=1e-5)


@requires_megatron
def test_all_chunks_and_copies_of_a_configuration_draw_alike() -> None:
    config = configuration()
    for again in (config, config, dataclasses.replace(config)):
        draw_as_reference(again, LAYERS)
        for method, std in (
            (again.init_method, STD),
            (again.embedding_init_method, STD),
            (again.output_layer_init_method, OUTPUT_STD),
        ):
            assert method.keywords == {"mean": 0.0, "std": pytest.approx(std, rel=1e-6)}
