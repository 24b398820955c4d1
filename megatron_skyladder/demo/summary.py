"""What came out of the demo: a table for the terminal and a plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_skyladder import terminal
from megatron_skyladder.ladder import costs
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.schedules import WindowSchedule
from megatron_skyladder.report import images
from megatron_skyladder.report.runlog import RunLog

LABELS = {"constant": "constant window", "skyladder": "SkyLadder"}
_SMOOTHING_STEPS = 10
_SPAN = 0.2  # nats that the panel of losses by length has at least


@dataclass(frozen=True)
class Outcome:
    """One finished run, with time counted in training seconds (no start-up, no validation)."""

    name: str
    log: RunLog
    seq_length: int
    batch_tokens: int

    @property
    def tokens(self) -> int:
        """Training tokens."""
        return self.log.iterations[-1].iteration * self.batch_tokens

    @property
    def seconds(self) -> float:
        """Training time; the first two steps, which warm up caches, count as median ones."""
        return self.times()[-1]

    def times(self) -> list[float]:
        """Return the training seconds at the end of each step."""
        steps = [record.elapsed_ms / 1e3 for record in self.log.iterations]
        median = sorted(steps)[len(steps) // 2]
        steps[:2] = [min(step, median) for step in steps[:2]]
        total, times = 0.0, []
        for step in steps:
            total += step
            times.append(total)
        return times

    def validations(self) -> list[tuple[int, float]]:
        """Return (iteration, validation loss at the full window)."""
        return [
            (record.iteration, record.loss)
            for record in self.log.validations
            if record.loss is not None and "test" not in record.dataset
        ]

    def loss_by_length(self) -> dict[int, float]:
        """Return the last validation's loss by context length."""
        return self.log.validations[-1].by_length

    def loss_after(self, seconds: float) -> float:
        """Return the validation loss after this much training, between two validations linear."""
        times = self.times()
        points = [(times[iteration - 1], loss) for iteration, loss in self.validations()]
        before = points[0]
        for after in points:
            if after[0] >= seconds:
                if after[0] == before[0]:
                    return after[1]
                share = (seconds - before[0]) / (after[0] - before[0])
                return before[1] + share * (after[1] - before[1])
            before = after
        return points[-1][1]


def predicted_saving(
    shape: costs.DecoderShape, schedule: WindowSchedule, outcome: Outcome
) -> tuple[float, float]:
    """Return the shares of all work and of attention work that the ladder saves, by FLOPs."""
    config = SkyLadderConfig(schedule, seq_length=outcome.seq_length, step_samples=1)
    pairs = costs.grid_pairs(config)
    steps = outcome.log.iterations[-1].iteration
    mean = costs.mean_pairs(costs.window_runs(config, steps), pairs)
    sizes = {"seq_length": outcome.seq_length, "tokens": outcome.tokens}
    matrices, full = costs.megatron_flops(shape, pairs=pairs(outcome.seq_length), **sizes)
    _, ladder = costs.megatron_flops(shape, pairs=mean, **sizes)
    return (full - ladder) / (matrices + full), (full - ladder) / full


def table(constant: Outcome, ladder: Outcome, saving: tuple[float, float]) -> str:
    """Return the table the demo ends with."""
    rows: list[tuple[str, ...]] = [("", LABELS["constant"], LABELS["skyladder"], "difference")]

    def add(name: str, values: tuple[float, float], digits: int, relative: bool = True) -> None:
        difference = values[1] / values[0] - 1 if relative else values[1] - values[0]
        shown = f"{100 * difference:+.1f} %" if relative else f"{difference:+.3f}"
        rows.append((name, f"{values[0]:,.{digits}f}", f"{values[1]:,.{digits}f}", shown))

    rows.append(("training tokens", f"{constant.tokens:,}", f"{ladder.tokens:,}", ""))
    add("training time (s)", (constant.seconds, ladder.seconds), 1)
    rates = (constant.tokens / constant.seconds, ladder.tokens / ladder.seconds)
    add("tokens per second", rates, 0)
    lengths = constant.loss_by_length()
    for length in lengths:
        losses = (lengths[length], ladder.loss_by_length()[length])
        add(f"validation loss, context {length:,}", losses, 3, relative=False)
    equal = min(constant.seconds, ladder.seconds)
    losses = (constant.loss_after(equal), ladder.loss_after(equal))
    add(f"validation loss after {equal:.0f} s", losses, 3, relative=False)
    lines = [terminal.table(rows, left=1)]
    work, attention = saving
    faster = 1 - ladder.seconds / constant.seconds
    lines.append("")
    lines.append(
        f"SkyLadder took {_less(faster)} time for the same tokens. By FLOPs it does {_less(work)} "
        f"work ({_less(attention)} attention)."
    )
    return "\n".join(lines)


def plot(constant: Outcome, ladder: Outcome, path: Path) -> None:
    """Draw window, losses against tokens and time, and loss by context length."""
    figure, panels = images.make_panels(2, 2, (10.5, 7))
    window, by_tokens, by_time, by_length = panels.flat
    for outcome in (constant, ladder):
        _draw(outcome, window, by_tokens, by_time, by_length)
    tokens = "training tokens (thousands)"
    images.label(window, "Attention window", tokens, "tokens a query may see")
    images.label(by_tokens, "Training loss, within its window", tokens, "loss (nats)")
    images.label(
        by_time, "Validation loss, whole sequences visible", "training time (s)", "loss (nats)"
    )
    images.label(by_length, "After the last step", "validation context (tokens)", "loss (nats)")
    by_length.set_xscale("log", base=2)
    lengths = list(constant.loss_by_length())
    by_length.set_xticks(lengths, [f"{length:,}" for length in lengths])
    low, high = by_length.get_ylim()
    if high - low < _SPAN:  # or what is nothing would look like much
        by_length.set_ylim((low + high - _SPAN) / 2, (low + high + _SPAN) / 2)
    window.legend(frameon=False)
    faster = 1 - ladder.seconds / constant.seconds
    figure.suptitle(
        f"SkyLadder against a constant window of {constant.seq_length:,}: the same model, weights, "
        f"data and kernel, {_less(faster)} time",
        fontsize=12,
    )
    images.save(figure, path)


def _less(share: float) -> str:
    return f"{100 * abs(share):.1f} % {'less' if share >= 0 else 'more'}"


def _draw(outcome: Outcome, window: Any, by_tokens: Any, by_time: Any, by_length: Any) -> None:
    style = {
        "color": images.colour_of(list(LABELS).index(outcome.name)),
        "label": LABELS[outcome.name],
    }
    records = outcome.log.iterations
    tokens = [record.iteration * outcome.batch_tokens / 1e3 for record in records]
    window.plot(tokens, [record.window for record in records], linewidth=2, **style)
    losses = [record.loss or 0.0 for record in records]
    by_tokens.plot(tokens, losses, linewidth=0.8, alpha=0.3, color=style["color"])
    smooth = [
        sum(losses[max(0, i + 1 - _SMOOTHING_STEPS) : i + 1]) / min(i + 1, _SMOOTHING_STEPS)
        for i in range(len(losses))
    ]
    by_tokens.plot(tokens, smooth, linewidth=2, **style)
    times = outcome.times()
    points = [(times[iteration - 1], loss) for iteration, loss in outcome.validations()]
    by_time.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=2, **style)
    lengths = outcome.loss_by_length()
    by_length.plot(list(lengths), list(lengths.values()), marker="o", linewidth=2, **style)
