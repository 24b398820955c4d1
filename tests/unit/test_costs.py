"""Parameters, FLOPs and time, by hand, against the paper's table, and against Megatron itself."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_skyladder.ladder import costs
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.costs import DecoderShape, StepTime, flops, megatron_flops, step_time
from megatron_skyladder.ladder.fragments import dense_mask, window_pairs
from megatron_skyladder.ladder.presets import MODELS, PAPER_RUNS, PaperRun
from megatron_skyladder.ladder.schedules import WindowSchedule
from megatron_skyladder.planning import model_flags, run_flags

# --- parameters ---------------------------------------------------------------------------------

# hidden 8, 2 heads of 4 in 1 group, FFN 20, 3 layers, vocabulary 50
SMALL = DecoderShape(3, 8, 20, 2, 1, 4, 50)
QKV = 8 * (8 + 4 + 4)
LAYER = QKV + 8 * 8 + 8 * 40 + 20 * 8 + 2 * 8  # qkv, projection, both inputs, output, norms


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({}, 3 * LAYER + 8 + 2 * 50 * 8),
        ({"tied_embeddings": True}, 3 * LAYER + 8 + 50 * 8),
        ({"gated_mlp": False}, 3 * (LAYER - 160) + 8 + 800),
        ({"qkv_bias": True}, 3 * (LAYER + 16) + 8 + 800),
        ({"linear_bias": True}, 3 * (LAYER + 16 + 8 + 40 + 8) + 8 + 800),
        ({"linear_bias": True, "qkv_bias": True}, 3 * (LAYER + 16 + 8 + 40 + 8) + 8 + 800),
        ({"norm_bias": True}, 3 * (LAYER + 16) + 16 + 800),
        ({"qk_norm": True}, 3 * (LAYER + 8) + 8 + 800),
        ({"qk_norm": True, "norm_bias": True}, 3 * (LAYER + 16 + 16) + 16 + 800),
        ({"learned_positions": 30}, 3 * LAYER + 8 + 800 + 240),
        ({"num_query_groups": 2}, 3 * (LAYER + 64) + 8 + 800),
        ({"kv_channels": 6}, 3 * (LAYER + 8 * 8 + 8 * 4) + 8 + 800),  # 12 + 6 + 6, and 12 back
    ],
)
def test_parameters_by_hand(changes: dict[str, object], parameters: int) -> None:
    assert replace(SMALL, **changes).num_parameters == parameters  # type: ignore[arg-type]


PAPER_PARAMETERS = {
    "120m": 121_129_728,
    "360m": 367_563_776,
    "1b": 1_100_048_384,  # the N that gives Table 8
    "3b": 3_015_355_392,
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_the_papers_models(name: str) -> None:
    assert DecoderShape.of_paper(MODELS[name]).num_parameters == PAPER_PARAMETERS[name]


@pytest.mark.parametrize(
    ("vocab_size", "tensor_parallel", "padded"),
    [
        (32_000, 1, 32_000),
        (32_000, 2, 32_000),
        (32_000, 4, 32_256),
        (50_257, 1, 50_304),
        (1, 1, 128),
        (128, 1, 128),
        (129, 1, 256),
        (49_152, 8, 49_152),
    ],
)
def test_vocabulary_is_padded(vocab_size: int, tensor_parallel: int, padded: int) -> None:
    found = costs.padded_vocab_size(vocab_size, divisible_by=128, tensor_parallel=tensor_parallel)
    assert found == padded


def paper_flags(name: str) -> str:
    model = MODELS[name]
    return (
        f"--num-layers {model.num_layers} --hidden-size {model.hidden_size} "
        f"--ffn-hidden-size {model.ffn_hidden_size} "
        f"--num-attention-heads {model.num_attention_heads} --group-query-attention "
        f"--num-query-groups {model.num_query_groups} --vocab-size 32000 --swiglu "
        "--normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
        "--untie-embeddings-and-output-weights"
    )


TINY = "--num-layers 2 --hidden-size 96 --num-attention-heads 6 --vocab-size 1000"
MOE = f"{TINY} --disable-bias-linear"
ROPE = "--position-embedding-type rope"
FLAGS = [
    *(paper_flags(name) for name in MODELS),
    paper_flags("1b") + " --tensor-model-parallel-size 4",  # 32,256 rows
    TINY,  # Megatron's defaults: LayerNorm, biases, tied, learned positions
    f"{TINY} --untie-embeddings-and-output-weights --normalization RMSNorm",
    f"{TINY} --swiglu",  # the FFN becomes 8/3 of the hidden size, in multiples of 64
    f"{TINY} --swiglu --ffn-hidden-size 100 --disable-bias-linear --add-qkv-bias",
    f"{TINY} --quick-geglu --disable-bias-linear",
    f"{TINY} --group-query-attention --num-query-groups 2 --kv-channels 32 --qk-layernorm",
    f"{TINY} --group-query-attention --normalization RMSNorm --qk-layernorm",
    f"{TINY} --num-query-groups 2",  # has no effect without --group-query-attention
    f"{TINY} --use-rotary-position-embeddings",
    f"{TINY} --position-embedding-type none --make-vocab-size-divisible-by 7",
    f"{TINY} --padded-vocab-size 1111",
    f"{TINY} --attention-output-gate",
    f"{MOE} --num-experts 4",  # two experts for each token
    f"{MOE} --num-experts 4 --swiglu --moe-router-topk 3 --moe-ffn-hidden-size 40",
    f"{MOE} --num-experts 4 --moe-layer-freq [0]+[1] --ffn-hidden-size 200",
    f"{MOE} --num-experts 4 --num-layers 6 --moe-layer-freq 4",
    f"{MOE} --num-experts 4 --swiglu --moe-shared-expert-intermediate-size 72 "
    "--moe-shared-expert-gate",
    f"{TINY} --num-experts 4",  # experts with biases
    f"{TINY} --multi-latent-attention {ROPE}",
    f"{TINY} --multi-latent-attention {ROPE} --q-lora-rank 24 --kv-lora-rank 20 --qk-head-dim 16 "
    "--qk-pos-emb-head-dim 8 --v-head-dim 12 --qk-layernorm",
    f"{TINY} --multi-latent-attention {ROPE} --q-lora-rank 24 --qk-layernorm "
    "--normalization RMSNorm",
    f"{MOE} --mtp-num-layers 2 {ROPE}",
    f"{MOE} --num-experts 4 --moe-layer-freq [0]+[1] --mtp-num-layers 1 {ROPE}",
]
# one symbol for each layer; --num-layers follows from them
HYBRIDS = [
    "--hybrid-layer-pattern *-*-",
    "--hybrid-layer-pattern M-M*-M- --mamba-num-groups 2",
    "--hybrid-layer-pattern M*-MM --mamba-state-dim 32 --mamba-num-groups 4",
    "--hybrid-layer-pattern M-*E --num-experts 4 --mamba-num-heads 3 --mamba-num-groups 1",
]
HYBRID = "--hidden-size 96 --num-attention-heads 6 --vocab-size 1000 --disable-bias-linear"
RUN = "--seq-length 128 --max-position-embeddings 192 --global-batch-size 4 --train-iters 10"


def planned_shape(flags: str) -> DecoderShape:
    parser = argparse.ArgumentParser()
    run_flags.add_run_flags(parser)
    args = parser.parse_args(f"{flags} {RUN}".split())
    return model_flags.decoder_shape(run_flags.complete(args), [])


@pytest.fixture(scope="module")
def megatrons() -> dict[str, tuple[int | None, float]]:
    """Parameters and FLOPs of a batch, as Megatron builds and counts them, by command line."""
    if find_spec("megatron") is None or find_spec("megatron.training") is None:
        pytest.skip("needs Megatron with megatron.training")
    script = Path(__file__).with_name("count_parameters.py")
    lines = [*FLAGS, *(f"{HYBRID} {pattern}" for pattern in HYBRIDS)]
    result = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps([f"{flags} {RUN}".split() for flags in lines]),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    built = json.loads(result.stdout.strip().splitlines()[-1])
    return dict(zip(lines, map(tuple, built), strict=True))


def test_parameters_are_those_of_the_model_that_megatron_builds(
    megatrons: dict[str, tuple[int | None, float]],
) -> None:
    """Every command line goes through Megatron's own parser and GPTModel, and through ours."""
    built = {flags: megatrons[flags][0] for flags in FLAGS}
    assert built == {flags: planned_shape(flags).num_parameters for flags in FLAGS}


def test_flops_are_those_that_megatron_counts(
    megatrons: dict[str, tuple[int | None, float]],
) -> None:
    """Under the full window, of which Megatron counts the causal half; batches of 4 x 128."""
    wrong = {}
    for flags, (_, counted) in megatrons.items():
        if "--quick-geglu" in flags:  # Megatron's count knows no other gate than SwiGLU's
            continue
        shape = planned_shape(flags)
        pairs = window_pairs(128, 128)
        ours = sum(megatron_flops(shape, seq_length=128, pairs=pairs, tokens=4 * 128))
        if ours != pytest.approx(counted, rel=1e-9):
            wrong[flags] = ours / counted
    assert wrong == {}


def test_parameters_of_a_mamba_layer_by_hand() -> None:
    """Hidden 96, inner 192 in 3 heads of 64, one group, state 16: as Megatron's MambaMixer."""
    pattern = "--hybrid-layer-pattern M --mamba-num-groups 1 --mamba-state-dim 16"
    rest = f"{HYBRID} --normalization RMSNorm --position-embedding-type none"
    shape = planned_shape(f"{rest} {pattern}")
    in_proj = 96 * (192 + 192 + 16 + 16 + 3)  # z, x, B, C, dt
    conv = (192 + 16 + 16) * 4 + (192 + 16 + 16)
    per_head = 3 + 3 + 3  # dt_bias, A_log, D
    layer = 96 + in_proj + conv + per_head + 192 + 192 * 96  # input norm, gated norm, out_proj
    assert shape.num_parameters == 1024 * 96 + 96 + layer  # tied embedding, final norm
    assert shape.active_parameters == shape.num_parameters


# --- attention work -----------------------------------------------------------------------------


def config_of(run: PaperRun) -> SkyLadderConfig:
    schedule = WindowSchedule("linear", run.start_window, run.seq_length, run.alpha)
    return SkyLadderConfig(schedule, run.seq_length, run.global_batch_size)


@given(
    st.integers(1, 24), st.integers(1, 24), st.integers(0, 30), st.integers(1, 40), st.booleans()
)
def test_mean_pairs_are_those_of_the_masks(
    seq_length: int, start: int, begin_samples: int, steps: int, sliding: bool
) -> None:
    """Step by step, with the dense mask of each window, also where the schedule begins later."""
    config = SkyLadderConfig(
        WindowSchedule("linear", min(start, seq_length), seq_length, alpha="3/4"),
        seq_length,
        step_samples=4,
        begin_samples=begin_samples,
        mask="sliding" if sliding else "local",
    )
    masks = [
        dense_mask(seq_length, window_len=config.window_at_samples(4 * step), sliding=sliding)
        for step in range(steps)
    ]
    found = costs.mean_pairs(costs.window_runs(config, steps), costs.grid_pairs(config))
    assert found == Fraction(int(sum(mask.sum() for mask in masks)), steps)


@pytest.mark.parametrize(
    ("begin_samples", "runs"),
    [
        (0, [(0, 1, 1), (1, 2, 2), (2, 3, 3), (3, 6, 4)]),
        (8, [(0, 3, 1), (3, 4, 2), (4, 5, 3), (5, 6, 4)]),  # 2 steps of 4 samples
        (9, [(0, 4, 1), (4, 5, 2), (5, 6, 3)]),  # part of a step: the next one is the first
        (400, [(0, 6, 1)]),
    ],
)
def test_windows_of_a_schedule_that_begins_later(
    begin_samples: int, runs: list[tuple[int, int, int]]
) -> None:
    config = SkyLadderConfig(
        WindowSchedule("linear", 1, 4, alpha=1), 4, step_samples=4, begin_samples=begin_samples
    )
    assert costs.window_runs(config, 6) == runs


# --- floating-point operations ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "constant", "ladder"), [("1b-8k", 11.57, 9.91), ("1b-32k", 25.50, 18.83)]
)
def test_table_8_of_the_paper(name: str, constant: float, ladder: float) -> None:
    run = PAPER_RUNS[name]
    config = config_of(run)
    shape = DecoderShape.of_paper(run.model)
    tokens = run.train_steps * run.batch_tokens
    length = run.seq_length
    full = window_pairs(length, length)
    mean = costs.mean_pairs(costs.window_runs(config, run.train_steps), costs.grid_pairs(config))
    for pairs, expected in ((full, constant), (mean, ladder)):
        found = flops(shape, seq_length=length, pairs=pairs, tokens=tokens)
        assert round(found / 1e20, 2) == expected


def test_flops_by_hand() -> None:
    """A row of 4 in windows of 3: (9 + 1) / 4 tokens of context; 2 heads of 4, 3 layers."""
    per_token = 6 * SMALL.num_parameters + 12 * 3 * 8 * Fraction(10, 4)
    found = flops(SMALL, seq_length=4, pairs=window_pairs(3, 4), tokens=100)
    assert found == per_token * 100


def test_megatron_counts_the_causal_half_and_no_embedding() -> None:
    weights = 3 * (8 * 16 + 8 * 8 + 8 * 60) + 50 * 8
    products, attention = megatron_flops(SMALL, seq_length=4, pairs=10, tokens=100)
    assert products == 6 * weights * 100
    assert attention == 6 * 3 * 8 * 4 * 100


# --- time ---------------------------------------------------------------------------------------


def test_a_step_at_the_full_window_takes_flops_over_rate() -> None:
    products, attention = megatron_flops(SMALL, seq_length=4, pairs=10, tokens=400)
    step = step_time(SMALL, seq_length=4, batch_tokens=400, flops_per_second=1e6)
    assert step.seconds(1.0) == pytest.approx((products + attention) / 1e6)
    assert step.attention / step.fixed == pytest.approx(costs.ATTENTION_COST * attention / products)


def test_savings_by_hand() -> None:
    step = StepTime(fixed=6.0, attention=4.0)
    assert step.seconds(0.5) == 8.0
    assert step.saved(0.5) == pytest.approx(0.2)
    assert step.saved(0.25, baseline=0.5) == pytest.approx(1 / 8)


def saved_percent(name: str, attention_cost: float) -> float:
    run = PAPER_RUNS[name]
    config = config_of(run)
    mean = costs.mean_pairs(costs.window_runs(config, run.train_steps), costs.grid_pairs(config))
    step = step_time(
        DecoderShape.of_paper(run.model),
        seq_length=run.seq_length,
        batch_tokens=run.batch_tokens,
        flops_per_second=1e15,
        attention_cost=attention_cost,
    )
    return 100 * step.saved(float(mean / window_pairs(run.seq_length, run.seq_length)))


MEASURED = {"1b-8k": 13.1, "1b-32k": 22.2}  # Table 8, wall time


def test_the_range_of_attention_costs_gives_each_measurement() -> None:
    low, high = costs.ATTENTION_COST_RANGE
    assert saved_percent("1b-32k", low) == pytest.approx(MEASURED["1b-32k"], abs=0.01)
    assert saved_percent("1b-8k", high) == pytest.approx(MEASURED["1b-8k"], abs=0.01)


def test_the_attention_cost_gives_both_measurements_best() -> None:
    def error(attention_cost: float) -> float:
        return sum((saved_percent(n, attention_cost) - MEASURED[n]) ** 2 for n in MEASURED)

    best = error(costs.ATTENTION_COST)
    assert best <= min(error(costs.ATTENTION_COST + d) for d in (-0.002, 0.002))
    for name, measured in MEASURED.items():
        assert saved_percent(name, costs.ATTENTION_COST) == pytest.approx(measured, abs=1.5)
