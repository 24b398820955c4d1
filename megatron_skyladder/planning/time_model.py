"""How long a run takes: from a device's achieved rate, or from the log of a run."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import NamedTuple

from megatron_skyladder.ladder import costs
from megatron_skyladder.ladder.batch_sizes import batch_sizes
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.costs import DecoderShape, StepTime
from megatron_skyladder.ladder.fragments import window_pairs
from megatron_skyladder.ladder.numbers import argument, real, whole
from megatron_skyladder.planning.calibration import Calibration, OverMean, calibrate
from megatron_skyladder.planning.devices import DEVICES, device
from megatron_skyladder.planning.files_read import FilesRead
from megatron_skyladder.planning.log_check import check_log, has_the_same_ranks

_FP8_SPEEDUP = 2.0  # of every device in the table that has FP8
DEFAULT_MFU = 0.4  # a common share for Megatron; the paper's 1B run at 8K comes to 0.49


@dataclass(frozen=True)
class TimeModel:
    """Seconds of a step as a function of attention work, and how far they may be off.

    Args:
        step: of one global batch on all GPUs (of a device on one, where their number is not given).
        variants: the same under the least and the most favourable cost of attention.
        calibration: the fit, where it came from a log.
        gpus: GPUs that work at once; None where only GPU-hours are asked for, or where a log is all
            there is and does not say.
        price: per GPU-hour.
        basis: where the figures come from, for people.
    """

    step: StepTime
    variants: tuple[StepTime, ...]
    calibration: Calibration | None
    gpus: int | None
    price: float | None
    basis: str

    @property
    def has_gpu_hours(self) -> bool:
        """Whether GPU-hours are known: the times of a log are of its GPUs, however many."""
        return self.gpus is not None or self.calibration is None

    @property
    def unit(self) -> str:
        """What `gpu_hours` are in."""
        return "GPU-hours" if self.has_gpu_hours else "hours"

    def gpu_hours(self, steps: int, fraction: float) -> float:
        """Return the GPU-hours of so many steps at this mean attention work.

        Hours on the log's GPUs where `has_gpu_hours` is false.
        """
        return steps * self.step.seconds(fraction) * (self.gpus or 1) / 3600

    def saved_range(self, fraction: float, baseline: float) -> tuple[float, float]:
        """Return the lowest and highest plausible share of time saved."""
        if self.calibration:
            middle = self.step.saved(fraction, baseline)
            error = 2 * self.calibration.saved_error(fraction, baseline)
            return middle - error, middle + error
        saved = [step.saved(fraction, baseline) for step in self.variants]
        return min(saved), max(saved)


def add_time_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags about time and money."""
    group = parser.add_argument_group(
        "Time and money", "From a device and its achieved rate, or from the log of a run."
    )
    group.add_argument(
        "--device", metavar="NAME", help=f"the GPU, for its peak rate: {', '.join(DEVICES)}"
    )
    group.add_argument(
        "--list-devices", action="store_true", help="print the peak rates, with their sources"
    )
    group.add_argument(
        "--mfu",
        type=argument(real),
        metavar="SHARE",
        help="achieved share of the peak at the full window, by Megatron's count",
    )
    group.add_argument(
        "--tflops",
        type=argument(real),
        metavar="RATE",
        help="or the achieved TFLOP/s per GPU itself, as Megatron's log prints it",
    )
    group.add_argument(
        "--calibrate",
        metavar="LOG",
        help="or a console log of this model, sequence length and GPUs under a growing window",
    )
    group.add_argument(
        "--gpus", type=argument(whole), metavar="N", help="GPUs in all; without it, GPU-hours"
    )
    group.add_argument("--price-per-gpu-hour", type=argument(real), metavar="PRICE")


def time_model(
    flags: argparse.Namespace,
    shape: DecoderShape | None,
    config: SkyLadderConfig,
    notes: list[str],
    over_mean: OverMean,
    files: FilesRead,
) -> TimeModel | None:
    """Return the time model the flags ask for; None where they name no device, rate or log.

    Args:
        flags: completed.
        shape: the model, or None where it cannot be counted; a log does without.
        config: of the plan.
        notes: gets what the reader has to know about the time.
        over_mean: how unequal the work of context-parallel ranks is.
        files: what other plans have read.

    Raises:
        ValueError: the flags do not fit each other, or the log is of no use.
    """
    _check_time_flags(flags)
    if flags.calibrate:
        run = files.log(flags.calibrate)
        check_log(run, flags, shape, config, notes)
        fit = calibrate(run, over_mean if has_the_same_ranks(run, flags) else None)
        return _calibrated(flags, fit, notes)
    if not (flags.device or flags.tflops) or shape is None:
        return None
    speed = _speed(flags, shape, notes)

    def with_cost(attention_cost: float) -> StepTime:
        return costs.step_time(
            shape,
            seq_length=flags.seq_length,
            batch_tokens=batch_sizes(flags).final * flags.seq_length,
            flops_per_second=speed.tflops * 1e12 * (flags.gpus or 1),
            attention_cost=attention_cost,
            product_speedup=speed.product_speedup,
        )

    return TimeModel(
        step=with_cost(costs.ATTENTION_COST),
        variants=tuple(with_cost(cost) for cost in costs.ATTENTION_COST_RANGE),
        calibration=None,
        gpus=flags.gpus,
        price=flags.price_per_gpu_hour,
        basis=speed.basis,
    )


class _Speed(NamedTuple):
    """How fast a GPU runs.

    tflops: achieved, over products and attention together, at the full window.
    product_speedup: rate of the matrix products relative to attention's, by peak.
    basis: the same for people.
    """

    tflops: float
    product_speedup: float
    basis: str


def _speed(flags: argparse.Namespace, shape: DecoderShape, notes: list[str]) -> _Speed:
    low_precision = flags.fp8_format or flags.fp4_format
    if flags.tflops:
        speedup = _FP8_SPEEDUP if low_precision else 1.0
        return _Speed(flags.tflops, speedup, f"{flags.tflops:g} TFLOP/s per GPU")
    found = device(flags.device)
    mfu = flags.mfu or DEFAULT_MFU
    share = f"{'' if flags.mfu else 'assumed '}{mfu:.0%}"
    name = flags.device.lower()
    if low_precision and found.fp8 is None:
        notes.append(f"{name} has no FP8: counted in bf16.")
    if not low_precision or found.fp8 is None:
        return _Speed(found.bf16 * mfu, 1.0, f"{name} at {share} of {found.bf16:g} TFLOP/s")
    speedup = found.fp8 / found.bf16
    products, attention = costs.megatron_flops(
        shape,
        seq_length=flags.seq_length,
        pairs=window_pairs(flags.seq_length, flags.seq_length),
        tokens=1,
    )
    peak = (products + attention) / (products / found.fp8 + attention / found.bf16)
    basis = f"{name} at {share} of {found.fp8:g} TFLOP/s in FP8, {found.bf16:g} for attention"
    if flags.fp4_format:
        notes.append("--fp4-format: counted at the rate of FP8, as FP4's is not in the table.")
    return _Speed(peak * mfu, speedup, basis)


def _calibrated(flags: argparse.Namespace, fit: Calibration, notes: list[str]) -> TimeModel:
    if fit.num_gpus and flags.gpus and fit.num_gpus != flags.gpus:
        raise ValueError(
            f"--gpus={flags.gpus}, but {flags.calibrate} is of a run on {fit.num_gpus}. Leave "
            "--gpus out, or give a log of a run on as many."
        )
    gpus = flags.gpus or fit.num_gpus
    if gpus is None:
        _note_unknown_gpus(flags, notes)
    batch = batch_sizes(flags).final
    scale = batch / fit.batch
    if scale != 1:
        notes.append(
            f"The log's batch has {fit.batch} sequences, the plan's {batch}: step "
            "times are scaled by their ratio."
        )
    step = StepTime(fit.step_time.fixed * scale, fit.step_time.attention * scale)
    return TimeModel(
        step=step,
        variants=(step,),
        calibration=fit,
        gpus=gpus,
        price=flags.price_per_gpu_hour,
        basis=(
            f"{os.path.basename(flags.calibrate)}: {fit.num_lines} lines, {fit.num_windows} "
            f"windows, {fit.spread * 1e3:.1f} ms of spread"
        ),
    )


def _note_unknown_gpus(flags: argparse.Namespace, notes: list[str]) -> None:
    """Say that hours are of an unknown number of GPUs, which have no price."""
    if flags.price_per_gpu_hour is not None:
        raise ValueError(
            f"--price-per-gpu-hour needs to know how many GPUs work, which {flags.calibrate} does "
            "not say. Give --gpus."
        )
    notes.append(
        "The log does not say on how many GPUs it ran: hours are on as many. For GPU-hours give "
        "--gpus."
    )


def _check_time_flags(flags: argparse.Namespace) -> None:
    if flags.device:
        device(flags.device)
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
