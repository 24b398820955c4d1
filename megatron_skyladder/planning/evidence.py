"""What the paper measured (arXiv:2503.15450v2), and which of it is nearest to a plan.

Every figure of the paper that this package quotes as an outcome stands here, with its source. What
it did not measure is not filled in: the nearest setting is named, and how it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_skyladder.ladder.costs import DecoderShape
from megatron_skyladder.ladder.presets import MODELS
from megatron_skyladder.planning.estimate import Plan

PAPER = "arXiv:2503.15450"
TIME, BENCHMARKS, LOSS = "time", "benchmarks", "validation loss"
PAPER_SAVINGS = {"1b-8k": 13.1, "1b-32k": 22.2}  # percent of wall time (Table 8), by preset
_STEPS = 100_000  # of every run of the paper


@dataclass(frozen=True)
class Measured:
    """One thing that the paper measured.

    Args:
        kind: TIME, BENCHMARKS or LOSS.
        model: a key of `MODELS`, or None where our source does not name it.
        seq_length: tokens in a sequence, or None in the same way.
        found: the figures, constant window -> ladder where two are given.
        source: where the paper has them.
        setting: what else the run was: data, rate, hardware.
        schedule: its kind.
        share: of the run over which the window grew, where that is what was varied.
        start_window: tokens.
        mask: local or sliding.
        documents: whether documents were masked.
    """

    kind: str
    model: str | None
    seq_length: int | None
    found: str
    source: str = PAPER
    setting: str = ""
    schedule: str = "linear"
    share: Fraction | None = None
    start_window: int = 32
    mask: str = "local"
    documents: bool = False

    @property
    def run(self) -> str:
        """What it was measured on, and the source."""
        model = ""
        if self.model and self.seq_length:
            model = f"{self.model.upper()} at {self.seq_length // 1024}K"
        about = ", ".join(filter(None, [model, self.schedule, self.setting]))
        return f"{about}; {self.source}"


def _table_8(length: int, found: str, alpha: str) -> Measured:
    return Measured(TIME, "1b", length, found, f"{PAPER}, Table 8", f"alpha {alpha}, A100-40G")


def _scores(model: str, length: int, found: str, setting: str = "") -> Measured:
    masked = setting.endswith("documents masked")
    found = f"standard/long, %: {found}"
    return Measured(BENCHMARKS, model, length, found, setting=setting, documents=masked)


def _table_7(schedule: str, standard: float, long: float, what: str = "") -> Measured:
    return Measured(
        BENCHMARKS,
        "1b",
        32_768,
        f"standard/long, %: constant 50.7/9.7, {what or schedule} {standard}/{long}, linear "
        "54.3/13.5",
        f"{PAPER}, Table 7",
        schedule=schedule,
    )


def _loss(inverse_alpha: int, found: str, start_window: int = 32) -> Measured:
    return Measured(
        LOSS,
        "120m",
        8192,
        f"at 512/4K/8K tokens: {found}; constant 2.780/2.590/2.549; less than 0.01 is noise",
        setting=f"{start_window} -> 8,192, alpha 1/{inverse_alpha}",
        share=Fraction((8192 - start_window) * inverse_alpha, _STEPS),
        start_window=start_window,
    )


MEASURED = (
    _table_8(8192, f"{PAPER_SAVINGS['1b-8k']} % less, FLOPs 11.6e20 -> 9.9e20", "1/8"),
    _table_8(32_768, f"{PAPER_SAVINGS['1b-32k']} % less, FLOPs 25.5e20 -> 18.8e20", "1/2"),
    _scores("1b", 8192, "46.3/15.3 -> 50.0/14.3", "CommonCrawl"),
    _scores("1b", 8192, "47.4/13.0 -> 49.3/13.2", "CommonCrawl, documents masked"),
    _scores("1b", 8192, "52.5/11.1 -> 55.2/12.3", "FineWeb-Pro"),
    _scores("1b", 8192, "54.3/12.7 -> 54.8/13.9", "FineWeb-Pro, documents masked"),
    _scores("1b", 32_768, "50.7/9.7 -> 54.3/13.5"),
    _scores("1b", 32_768, "54.0/13.0 -> 54.9/14.4", "documents masked"),
    _scores("3b", 8192, "57.0/15.8 -> 60.5/19.3"),
    _scores("360m", 8192, "47.2/8.9 -> 49.6/8.9"),
    _scores("120m", 8192, "40.1/5.8 -> 41.2/5.1"),
    _table_7("stepwise", 55.3, 13.3),
    _table_7("sinusoidal", 54.2, 14.2),
    _table_7("exponential", 54.7, 11.5),
    _table_7("staged", 52.9, 10.0, "4K for 97 % of the tokens, then 32K,"),
    Measured(
        BENCHMARKS,
        "1b",
        8192,
        "standard/long, %: 52.6/10.7, linear 55.2/12.3",
        setting="over 64B tokens, then 8K",
        schedule="reversed",
    ),
    *(
        Measured(
            BENCHMARKS,
            None,
            None,
            "no gain; loss spikes at jumps",
            f"{PAPER}, Table 22",
            schedule=schedule,
        )
        for schedule in ("cyclic", "cyclic-jump")
    ),
    Measured(
        BENCHMARKS,
        "1b",
        8192,
        "standard/long, %: sliding 54.4/12.8, local 55.2/12.3",
        f"{PAPER}, Table 25",
        mask="sliding",
    ),
    _loss(1, "2.751/2.563/2.522"),
    _loss(2, "2.741/2.551/2.514"),
    _loss(4, "2.740/2.551/2.515"),
    _loss(8, "2.732/2.553/2.519"),
    _loss(12, "2.729/2.557/2.526"),
    _loss(8, "2.725/2.545/2.510", start_window=8),
)


def nearest(plan: Plan) -> list[Measured]:
    """Return what was measured nearest to a plan, of each kind; nothing for a constant window.

    Near is, in this order: the same mask, the same kind of schedule, the length and the size of
    the model as ratios, documents masked or not. Losses were measured over rates and start
    windows of one schedule: there it is the share of the run, then the start window.
    """
    if plan.config.schedule.is_baseline:
        return []
    found: list[Measured] = []
    for kind in (TIME, BENCHMARKS):
        candidates = [each for each in MEASURED if each.kind == kind]
        distances = [_distance(each, plan) for each in candidates]
        found += _smallest(candidates, distances)
    schedule = plan.config.schedule
    losses = [each for each in MEASURED if each.kind == LOSS and each.schedule == schedule.schedule]
    if losses and plan.full_step is not None:
        share = plan.full_step / plan.total_steps
        distances = [
            (
                round(abs(float(each.share or 0) - share), 2),
                abs(math.log2(each.start_window / schedule.start_window)),
            )
            for each in losses
        ]
        found += _smallest(losses, distances)[:1]
    return found


def _distance(measured: Measured, plan: Plan) -> tuple[float, ...]:
    config = plan.config
    length = larger = 0.0
    if measured.seq_length:
        length = abs(math.log2(measured.seq_length / config.seq_length))
    if measured.model and plan.shape:
        size = DecoderShape.of_paper(MODELS[measured.model]).num_parameters
        larger = abs(math.log10(size / plan.shape.num_parameters))
    return (
        measured.mask != config.mask,
        measured.schedule != config.schedule.schedule,
        length,
        larger,
        measured.documents != config.intra_document,
    )


def _smallest(
    candidates: Sequence[Measured], distances: Sequence[tuple[float, ...]]
) -> list[Measured]:
    least = min(distances)
    return [each for each, far in zip(candidates, distances, strict=True) if far == least]
