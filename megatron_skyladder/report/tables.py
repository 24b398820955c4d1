"""The report's tables: what the runs came to, and with which settings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_skyladder.report.comparable import other_validation
from megatron_skyladder.report.curves import Run
from megatron_skyladder.report.groups import PLACES
from megatron_skyladder.report.panels import SAME
from megatron_skyladder.report.runlog import Validation
from megatron_skyladder.report.stability import VOLATILITY_WIDTH, stability

# What a reader wants to know of a run, in this order, besides what differs.
MAIN_SETTINGS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "seq_length",
    "global_batch_size",
    "micro_batch_size",
    "train_iters",
    "train_samples",
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_warmup_iters",
    "weight_decay",
    "clip_grad",
    "seed",
    "bf16",
    "fp16",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "data_path",
    "tokenizer_type",
)
OURS = "skyladder_"  # how our arguments begin in Megatron's list


@dataclass(frozen=True)
class Row:
    """One line of a table: what it is, a cell for each run, and what has to be explained."""

    label: str
    cells: list[str]
    note: str = ""


def summary(runs: Sequence[Run]) -> list[Row]:
    """Return what each run came to, and how it stands against the first one."""
    rows = [
        Row("Schedule", [run.log.schedule or "SkyLadder off" for run in runs]),
        Row("Iterations", [f"{run.last.iteration:,}" for run in runs]),
        Row("Training tokens", [_amount(run, run.tokens[-1]) for run in runs]),
        Row("Training time", [duration(run.seconds[-1]) for run in runs], _TIME_NOTE),
        Row("Compute", [_flops(run) for run in runs], "by Megatron's count, attention as windowed"),
        Row("GPUs", [_gpus(run) for run in runs]),
        Row("Started", [_times(run.log.num_attempts) for run in runs]),
        Row("Final training loss", [_loss(_final_training(run)) for run in runs]),
        Row("Final validation loss", [_loss(final_loss(run, "validation")) for run in runs]),
        Row("Test loss", [_loss(final_loss(run, "test")) for run in runs]),
        Row("Losses not finite", [_not_finite(run) for run in runs], "left out of everything else"),
    ]
    rows += _against_first(runs)
    return [row for row in rows if set(row.cells) - {"", "?"}]


_TIME_NOTE = "steps only: evaluation, checkpoints and restarts are left out"


def _against_first(runs: Sequence[Run]) -> list[Row]:
    first, others = runs[0], runs[1:]
    if not others:
        return []

    def row(label: str, value: Callable[[Run], float | None], note: str = "") -> Row:
        return Row(label, ["", *(_percent(value(run)) for run in others)], note)

    def flops(run: Run) -> float | None:
        if run.flops is None or first.flops is None:
            return None
        return beyond(run.flops[-1], first.flops[-1])

    against = f"against {first.name}"
    reached = f"when the validation loss is down to the one {first.name} ends with"
    unequal = _not_as_far(runs)
    return [
        row(f"Time {against}", lambda run: beyond(run.seconds[-1], first.seconds[-1]), unequal),
        row(f"Compute {against}", flops, unequal),
        row("Same loss: tokens", lambda run: saving_at_equal_loss(run, first, "tokens"), reached),
        row("Same loss: time", lambda run: saving_at_equal_loss(run, first, "seconds"), reached),
    ]


def _not_as_far(runs: Sequence[Run]) -> str:
    """Return which runs have not seen as much as the first one: their time is of other work."""
    first = runs[0]
    parts = []
    for run in runs[1:]:
        longer = beyond(run.tokens[-1], first.tokens[-1])
        in_one_unit = bool(run.log.seq_length) == bool(first.log.seq_length)
        if longer is not None and abs(longer) > SAME and in_one_unit:
            what = "tokens" if first.log.seq_length else "samples"
            parts.append(f"{run.name} has seen {less(longer)} {what} than {first.name}")
    return "; ".join(parts)


def saving_at_equal_loss(run: Run, first: Run, axis: str) -> float | None:
    """Return how much less a run needs to get to the first one's last validation loss."""
    if other_validation(run.log, first.log):
        return None
    target = final_loss(first, "validation")
    records = run.validations()
    if target is None or not records:
        return None
    losses = run.validation_losses(records)
    records = [record for record, loss in zip(records, losses, strict=True) if np.isfinite(loss)]
    losses = losses[np.isfinite(losses)]
    places = run.at(getattr(run, axis), records)
    below = np.flatnonzero(losses <= target)
    if not below.size or not below[0]:
        return None
    end = int(below[0])
    place = np.interp(-target, -losses[end - 1 : end + 1], places[end - 1 : end + 1])
    whole = first.at(getattr(first, axis), first.validations())[-1]
    return beyond(place, whole)


def beyond(value: float, reference: float) -> float | None:
    """Return by which share a value is above a reference; None where that is 0."""
    return float(value / reference - 1) if reference else None


def stability_rows(runs: Sequence[Run]) -> list[Row]:
    """Return the figures of `stability`, one column for each run."""
    found = [stability(run.losses, run.column("grad norm")) for run in runs]
    intervals = {run.log.iterations[-1].num_iterations for run in runs}
    caution = " Log intervals differ: do not compare." if len(intervals) > 1 else ""
    return [
        Row(
            "Loss volatility",
            [_figure(values.volatility) for values in found],
            f"mean standard deviation of {VOLATILITY_WIDTH} log lines in a row.{caution}",
        ),
        Row(
            "Loss smoothness",
            [_figure(values.smoothness) for values in found],
            "mean change from one log line to the next; lower is smoother",
        ),
        Row(
            "Mean loss ratio",
            [_figure(values.mean_loss_ratio) for values in found],
            "loss / lowest loss before; above 1 are steps back",
        ),
        Row(
            "Mean gradient norm",
            [_figure(values.mean_grad_norm) for values in found],
            "before clipping, values above 1 counted as 1",
        ),
    ]


def to_json(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the figures of each run for other programs; None where a log does not tell.

    None also where a figure is not finite: JSON has no word for that.
    """
    return [
        _plain(
            {
                "name": run.name,
                "schedule": run.log.schedule,
                "iterations": run.last.iteration,
                "samples": run.last.consumed_samples,
                "tokens": int(run.tokens[-1]) if run.log.seq_length else None,
                "seconds": float(run.seconds[-1]),
                "flops": None if run.flops is None else float(run.flops[-1]),
                "gpus": run.log.num_gpus,
                "training_loss": _final_training(run),
                "losses_not_finite": len(run.lines_without_loss),
                "first_loss_not_finite": next(iter(run.lines_without_loss), None),
                "validations": [_validation_json(record) for record in run.log.validations],
                "stability": {
                    name: None if np.isnan(value) else value
                    for name, value in asdict(
                        stability(run.losses, run.column("grad norm"))
                    ).items()
                },
            }
        )
        for run in runs
    ]


def _plain(value: Any) -> Any:
    """Return a value with None for each number in it that is not finite."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _validation_json(record: Validation) -> dict[str, Any]:
    bands = record.by_positions
    return {
        "iteration": record.iteration,
        "dataset": record.dataset,
        "loss": record.loss,
        "by_length": {str(length): loss for length, loss in record.by_length.items()},
        "by_positions": {f"{first}-{last}": loss for (first, last), loss in bands.items()},
    }


def differing_settings(runs: Sequence[Run]) -> list[Row]:
    """Return Megatron's arguments in which the runs differ, places on the disk left out."""
    names = sorted({name for run in runs for name in run.log.settings} - set(PLACES))
    rows = [Row(name, [run.log.settings.get(name, "") for run in runs]) for name in names]
    return [row for row in rows if len(set(row.cells)) > 1]


def main_settings(runs: Sequence[Run]) -> list[Row]:
    """Return the arguments a reader wants to know first."""
    rows = [Row(name, [run.log.settings.get(name, "") for run in runs]) for name in MAIN_SETTINGS]
    return [row for row in rows if set(row.cells) - {"", "None"}]


def schedule_settings(runs: Sequence[Run]) -> list[Row]:
    """Return the resolved schedule of each run and SkyLadder's flags, those not given left out."""
    rows = [Row("Schedule", [run.log.schedule or "SkyLadder off" for run in runs])]
    names = sorted({name for run in runs for name in run.log.settings if name.startswith(OURS)})
    for name in names:
        cells = [run.log.settings.get(name, "") for run in runs]
        if set(cells) - {"", "None", "False"}:
            rows.append(Row("--" + name.replace("_", "-"), cells))
    return rows


def all_settings(runs: Sequence[Run]) -> list[Row]:
    """Return every argument of every run."""
    names = sorted({name for run in runs for name in run.log.settings})
    return [Row(name, [run.log.settings.get(name, "") for run in runs]) for name in names]


def final_loss(run: Run, dataset: str) -> float | None:
    """Return the loss of the last validation, as it was logged."""
    records = run.validations(dataset)
    return records[-1].loss if records else None


def _not_finite(run: Run) -> str:
    where = run.lines_without_loss
    return f"{len(where):,} log lines, from iteration {where[0]:,}" if where else ""


def _final_training(run: Run) -> float | None:
    """Return the mean of the last 2 %; NaN where the run ended without a finite loss."""
    tail = run.losses[-max(1, len(run.losses) // 50) :]
    if np.isfinite(tail).any():
        return float(np.nanmean(tail))
    return float("nan") if run.lines_without_loss else None


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _figure(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.4g}"


def _percent(share: float | None) -> str:
    return "" if share is None or not math.isfinite(share) else f"{100 * share:+.1f} %"


def less(share: float) -> str:
    """Return a difference in words, such as ``9.9 % less``."""
    return f"{100 * abs(share):.1f} % {'less' if share < 0 else 'more'}"


def _gpus(run: Run) -> str:
    """Return the numbers of GPUs of a run, one after the other."""
    found = (record.num_gpus for record in run.log.iterations)
    return ", then ".join(str(count or "?") for count, _ in itertools.groupby(found))


def _times(count: int) -> str:
    return {0: "?", 1: "once"}.get(count, f"{count} times")


def tokens_text(run: Run, tokens: float) -> str:
    """Return tokens of a run with their unit; samples where the log does not tell tokens."""
    return f"{_amount(run, tokens)}{' tokens' if run.log.seq_length else ''}"


def _amount(run: Run, tokens: float) -> str:
    if not run.log.seq_length:
        return f"{tokens:,.0f} samples"
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if tokens >= size:
            return f"{tokens / size:.4g} {name}"
    return f"{tokens:,.0f}"


def duration(seconds: float) -> str:
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.1f} days ({seconds / 3600:,.0f} h)"
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} s"


def _flops(run: Run) -> str:
    return "" if run.flops is None else f"{run.flops[-1]:.3e} FLOPs"
