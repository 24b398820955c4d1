"""How long a run takes: from a device's achieved rate, or from the log of a run."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from megatron_skyladder.ladder import costs
from megatron_skyladder.ladder.costs import DecoderShape, StepTime
from megatron_skyladder.planning.calibration import Calibration, calibrate

DEFAULT_MFU = 0.4  # a common share for Megatron; the paper's 1B run at 8K comes to 0.49


@dataclass(frozen=True)
class TimeModel:
    """Seconds of a step as a function of attention work, and how far they may be off.

    Args:
        step: of one global batch on all GPUs (on one GPU where their number is not given).
        variants: the same under the least and the most favourable cost of attention.
        calibration: the fit, where it came from a log.
        gpus: GPUs that work at once; None where only GPU-hours are asked for.
        price: per GPU-hour.
        basis: where the figures come from, for people.
    """

    step: StepTime
    variants: tuple[StepTime, ...]
    calibration: Calibration | None
    gpus: int | None
    price: float | None
    basis: str

    def gpu_hours(self, steps: int, fraction: float) -> float:
        """Return the GPU-hours of so many steps at this mean attention work."""
        return steps * self.step.seconds(fraction) * (self.gpus or 1) / 3600

    def saved_range(self, fraction: float, baseline: float) -> tuple[float, float]:
        """Return the lowest and highest plausible share of time saved."""
        if self.calibration:
            middle = self.step.saved(fraction, baseline)
            error = 2 * self.calibration.saved_error(fraction)
            return middle - error, middle + error
        saved = [step.saved(fraction, baseline) for step in self.variants]
        return min(saved), max(saved)


def add_time_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags about time and money."""
    group = parser.add_argument_group(
        "Time and money", "From a device and its achieved rate, or from the log of a run."
    )
    group.add_argument("--device", choices=tuple(costs.DEVICES), help="the GPU, for its peak rate")
    group.add_argument(
        "--mfu",
        type=float,
        metavar="SHARE",
        help="achieved share of the peak at the full window, by Megatron's count",
    )
    group.add_argument(
        "--tflops",
        type=float,
        metavar="RATE",
        help="or the achieved TFLOP/s per GPU itself, as Megatron's log prints it",
    )
    group.add_argument(
        "--calibrate",
        metavar="LOG",
        help="or a console log of this model, row length and GPUs under a growing window",
    )
    group.add_argument("--gpus", type=int, metavar="N", help="GPUs in all; without it, GPU-hours")
    group.add_argument("--price-per-gpu-hour", type=float, metavar="PRICE")


def time_model(
    flags: argparse.Namespace, shape: DecoderShape, notes: list[str]
) -> TimeModel | None:
    """Return the time model the flags ask for; None where they name no device, rate or log.

    Raises:
        ValueError: the flags do not fit each other, or the log is of no use.
    """
    _check_time_flags(flags)
    if flags.calibrate:
        return _calibrated(flags, notes)
    if not flags.device and not flags.tflops:
        return None
    if flags.tflops:
        rate, basis = flags.tflops, f"{flags.tflops:g} TFLOP/s per GPU"
    else:
        mfu = flags.mfu or DEFAULT_MFU
        rate = costs.DEVICES[flags.device] * mfu
        assumed = "" if flags.mfu else "assumed "
        basis = f"{flags.device} at {assumed}{mfu:.0%} of {costs.DEVICES[flags.device]:g} TFLOP/s"

    def with_cost(attention_cost: float) -> StepTime:
        return costs.step_time(
            shape,
            seq_length=flags.seq_length,
            batch_tokens=flags.global_batch_size * flags.seq_length,
            flops_per_second=rate * 1e12 * (flags.gpus or 1),
            attention_cost=attention_cost,
        )

    return TimeModel(
        step=with_cost(costs.ATTENTION_COST),
        variants=tuple(with_cost(cost) for cost in costs.ATTENTION_COST_RANGE),
        calibration=None,
        gpus=flags.gpus,
        price=flags.price_per_gpu_hour,
        basis=basis,
    )


def _calibrated(flags: argparse.Namespace, notes: list[str]) -> TimeModel:
    fit = calibrate(flags.calibrate)
    if fit.num_gpus and flags.gpus and fit.num_gpus != flags.gpus:
        raise ValueError(
            f"--gpus={flags.gpus}, but {flags.calibrate} is of a run on {fit.num_gpus}. Leave "
            "--gpus out, or give a log of a run on as many."
        )
    scale = flags.global_batch_size / fit.batch
    if scale != 1:
        notes.append(
            f"The log's batch has {fit.batch} rows, the plan's {flags.global_batch_size}: step "
            "times are scaled by their ratio."
        )
    step = StepTime(fit.step_time.fixed * scale, fit.step_time.attention * scale)
    return TimeModel(
        step=step,
        variants=(step,),
        calibration=fit,
        gpus=flags.gpus or fit.num_gpus,
        price=flags.price_per_gpu_hour,
        basis=(
            f"{os.path.basename(flags.calibrate)}: {fit.num_lines} lines, {fit.num_windows} "
            f"windows, {fit.spread * 1e3:.1f} ms of spread"
        ),
    )


def _check_time_flags(flags: argparse.Namespace) -> None:
    if flags.mfu is not None and not flags.device:
        raise ValueError("--mfu is a share of a device's peak rate. Give --device, or --tflops.")
    if flags.mfu is not None and not 0 < flags.mfu <= 1:
        raise ValueError(f"--mfu={flags.mfu:g} is not a share. Give a number such as 0.4.")
    if flags.tflops is not None and (flags.device or flags.tflops <= 0):
        raise ValueError(
            f"--tflops={flags.tflops:g}: give a rate above 0, and no --device beside it."
        )
    if flags.calibrate and (flags.device or flags.tflops):
        raise ValueError(
            "--calibrate and --device or --tflops both set the speed. Give only one of them."
        )
    if flags.price_per_gpu_hour is not None and flags.price_per_gpu_hour <= 0:
        raise ValueError(
            f"--price-per-gpu-hour={flags.price_per_gpu_hour:g}: give a price above 0."
        )
    timed = flags.device or flags.tflops or flags.calibrate
    if flags.price_per_gpu_hour is not None and not timed:
        raise ValueError(
            "--price-per-gpu-hour needs a time to multiply. Give --device, --tflops or --calibrate."
        )
