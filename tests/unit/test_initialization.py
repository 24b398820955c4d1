"""--skyladder-init reference: the weights that Megatron really builds, under TP too."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.config import SkyLadderConfig, add_arguments, config_from_args
from megatron_skyladder.ladder.schedules import WindowSchedule
from megatron_skyladder.planning.examples import example
from megatron_skyladder.runtime.weights import reference_stds, with_reference_weights
from megatron_skyladder.testing import ProcessPool, requires_megatron

OUTPUT_PROJECTIONS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
HIDDEN, LAYERS = 256, 3
SIZES = f"--hidden-size {HIDDEN} --num-layers {LAYERS} --ffn-hidden-size 512 --vocab-size 2047"
STD = 0.03952847  # sqrt(2 / (5 * 256))
OUTPUT_STD = 0.02083333  # 1 / 16 / 3


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool() as processes:
        yield processes


@pytest.fixture
def _reference() -> Iterator[None]:
    config = SkyLadderConfig(WindowSchedule("constant", 8, 8), 8, 1, init="reference")
    clock.install(config, lambda: 0)
    yield
    clock.uninstall()


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
def test_built_weights(pool: ProcessPool, tmp_path: Path, tensor_parallel: int) -> None:
    words = [
        *example("1b-8k", "skyladder", shrink=True).words,
        *SIZES.split(),
        *("--tensor-model-parallel-size", str(tensor_parallel)),
    ]
    results = tmp_path / "weights"
    pool.run(
        "example_bodies:measure_weights",
        num_processes=tensor_parallel,
        folder=tmp_path,
        arguments={"words": words, "results": str(results)},
    )
    ranks = [json.loads(Path(f"{results}.{rank}").read_text()) for rank in range(tensor_parallel)]
    assert (
        len(ranks[0]) == LAYERS * 4 + 2
    )  # qkv, proj, fc1, fc2 of each layer; embedding and output
    for weights in ranks:
        for name, (mean, std, count) in weights.items():
            expected = OUTPUT_STD if name.endswith(OUTPUT_PROJECTIONS) else STD
            # bf16 rounds values, not their spread; five standard errors
            assert std == pytest.approx(expected, rel=5 / math.sqrt(2 * count)), name
            assert abs(mean) < 5 * expected / math.sqrt(count), name
    if tensor_parallel > 1:  # not the same numbers twice
        assert ranks[0] != ranks[1]


def configured(**values: object) -> SimpleNamespace:
    """A TransformerConfig after the hook; the class says what is default."""

    class TransformerConfig(SimpleNamespace):
        init_method_std = 0.02
        init_method = None
        use_mup = False
        __post_init__ = with_reference_weights(lambda self: None)

    config = TransformerConfig(hidden_size=HIDDEN, num_layers=LAYERS, **values)
    config.__post_init__()
    return config


@pytest.mark.usefixtures("_reference")
@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"init_method_std": 0.01}, "--init-method-std"),
        ({"init_method": print}, "--init-method-xavier-uniform"),
        ({"use_mup": True}, "--use-mup"),
    ],
)
def test_another_way_to_draw_weights_is_refused(values: dict[str, object], flag: str) -> None:
    with pytest.raises(ValueError, match=f"reference and {flag} both say how weights are drawn"):
        configured(**values)


@pytest.mark.usefixtures("_reference")
def test_a_copied_configuration_is_not_refused() -> None:
    pytest.importorskip("torch")
    first = configured()
    again = configured(init_method=first.init_method)
    assert again.init_method.keywords == {"mean": 0.0, "std": pytest.approx(STD)}
    assert again.output_layer_init_method.keywords["std"] == pytest.approx(OUTPUT_STD)


def test_without_the_flag_nothing_changes() -> None:
    clock.install(SkyLadderConfig(WindowSchedule("constant", 8, 8), 8, 1), lambda: 0)
    try:
        assert configured(init_method_std=0.01).init_method is None
    finally:
        clock.uninstall()
