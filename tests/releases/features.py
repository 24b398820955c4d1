"""Models and stages beside a plain GPT: what each is, and which release trains it how.

One table for what trains and one for what is refused; a feature that no row refuses has to train to
the figures of the installed release.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from launches import SMALL_MODEL

from megatron_skyladder.megatron_lm.releases import RELEASES

LADDER = "--skyladder-start-window 8 --skyladder-alpha 15"  # 8 + 15 per step, over 56 / 15 steps
WINDOWS = [8, 23, 38, 53, 64, 64]
STAGED = "--skyladder-schedule staged --skyladder-stages"
WITHOUT_GROUPS = SMALL_MODEL.replace("--group-query-attention", "").replace(
    "--num-query-groups 2", ""
)
IN_SAMPLES = SMALL_MODEL.replace("--train-iters 6", "--train-samples 48")
# Up to 0.13 Megatron's YaRN has the table's length for its original one, and one mscale for both
# factors: with these values it is the same model in all releases.
LATENT = (
    "--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 12 --qk-head-dim 8 "
    "--qk-pos-emb-head-dim 4 --v-head-dim 6 --qk-layernorm --rotary-scaling-factor 4 --mscale 1 "
    "--mscale-all-dim 1 --max-position-embeddings 4096"
)
EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-z-loss-coeff 1e-3 "
    "--moe-expert-capacity-factor 0.75 --moe-pad-expert-input-to-capacity "
    "--moe-input-jitter-eps 0.1"
)
LOCAL = "--window-size 11,0 --window-attn-skip-freq 2"
SECOND = "--skyladder-local-start-window 3 --skyladder-local-expand-fraction 0.9"
BATCHES = f"{STAGED} 8..32:0.5,batch=4 final:0.5,batch=8"
STEP_BATCHES = "0:4 1536:8"  # 24 samples of 64 tokens
RATES = f"{STAGED} 8..32:0.5,lr=1,rope=10000 final:0.5,lr=0.5,rope=500000"


@dataclass(frozen=True)
class Feature:
    """What a run asks for.

    Args:
        flags: Megatron's, beside those of the small model.
        model: those of the small model.
        settings: SkyLadder's.
        windows: of each iteration, worked out by hand.
        num_processes: ranks.
        logs: what its log lines have to have, beside what all have.
    """

    flags: str = ""
    model: str = SMALL_MODEL
    settings: str = LADDER
    windows: tuple[int, ...] = tuple(WINDOWS)
    num_processes: int = 1
    logs: tuple[str, ...] = ()


FEATURES = {
    "latent attention": Feature(LATENT, WITHOUT_GROUPS),
    "prediction heads": Feature("--mtp-num-layers 2", logs=("mtp_1 loss", "mtp_2 loss")),
    "local layers": Feature(LOCAL),
    "two ladders": Feature(LOCAL, settings=f"{LADDER} {SECOND}", logs=("skyladder/local_window",)),
    "learnable sinks": Feature("--softmax-type learnable"),
    "sinks of 0": Feature("--softmax-type off-by-one"),
    "experts": Feature(EXPERTS),
    "rates and RoPE": Feature(
        settings=RATES,
        windows=(8, 16, 24, 64, 64, 64),  # 24 tokens in 3 steps
        logs=("skyladder/rate_factor", "skyladder/rotary_base"),
    ),
    "batches": Feature(
        f"--step-batch-size-schedule {STEP_BATCHES.replace(' ', ',')}",
        IN_SAMPLES.replace("--global-batch-size 8", ""),
        BATCHES,
        (8, 8, 16, 16, 24, 24, 64, 64, 64),
        logs=("skyladder/batch", "global batch size"),
    ),
    # each layer makes its rotary embedding, which has to follow the tokens that a rank holds
    "latent attention, CP2": Feature(
        f"{LATENT} --context-parallel-size 2", WITHOUT_GROUPS, num_processes=2
    ),
    # refused everywhere
    "batches of our own": Feature(model=IN_SAMPLES, settings=BATCHES),
}


@dataclass(frozen=True)
class Refusal:
    """Releases and integrations that do not train some features.

    Args:
        features: which.
        lines: of which releases.
        message: that names the flag and the release; ``{version}`` stands for the latter.
        integrations: which.
    """

    features: tuple[str, ...]
    lines: Iterable[str]
    message: str
    integrations: tuple[str, ...] = ("entry point", "patch", "--spec")


def lines(first: str = "0.11", last: str = "0.20") -> list[str]:
    """Return the release lines from one to another, both included."""
    known = list(RELEASES)
    return known[known.index(first) : known.index(last) + 1]


REFUSALS = (
    # Megatron's own parser
    Refusal(
        ("local layers", "two ladders"),
        lines(last="0.14"),
        "unrecognized arguments: --window-size",
    ),
    Refusal(
        ("learnable sinks", "sinks of 0"),
        lines(last="0.14"),
        "unrecognized arguments: --softmax-type",
    ),
    Refusal(("batches",), lines(last="0.17"), "unrecognized arguments: --step-batch-size-schedule"),
    Refusal(("prediction heads",), ["0.11"], "unrecognized arguments: --mtp-num-layers"),
    # ours
    Refusal(
        ("batches of our own",),
        lines(last="0.17"),
        "sets batches, which takes --step-batch-size-schedule, and Megatron {version} has no such "
        "flag: releases have it from 0.18 on.",
    ),
    Refusal(
        ("batches of our own",),
        lines("0.18"),
        f"Give --step-batch-size-schedule '{STEP_BATCHES}', without --global-batch-size",
    ),
    Refusal(
        ("prediction heads",),
        lines("0.12", "0.16"),
        "--mtp-num-layers needs Megatron 0.17 or later with SkyLadder, and this is {version}",
    ),
    Refusal(
        ("prediction heads",),
        lines("0.17", "0.18"),
        "--mtp-num-layers is not built by SkyLadder's entry point on Megatron {version}",
        ("entry point",),
    ),
    Refusal(
        ("prediction heads",),
        lines("0.17"),
        "--mtp-num-layers is not built by --spec megatron_skyladder.layer_specs on Megatron "
        "{version}",
        ("--spec",),
    ),
    Refusal(
        ("experts",),
        lines(),
        "builds dense models, not --num-experts=4 (Megatron {version})",
        ("--spec",),
    ),
)


def refusal(feature: str, line: str, integration: str) -> str:
    """Return the message with which a run is refused, or nothing where it trains."""
    found = [
        row.message
        for row in REFUSALS
        if feature in row.features and line in row.lines and integration in row.integrations
    ]
    assert len(found) < 2, found
    return found[0] if found else ""
