"""The report's opening: one sentence for each run, and one for several seeds of it.

What it saved, whether it is better, what to look at.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_skyladder.report.comparable import other_settings, other_validation
from megatron_skyladder.report.curves import Run
from megatron_skyladder.report.groups import Group
from megatron_skyladder.report.panels import SAME, SIGNIFICANT, Curve
from megatron_skyladder.report.stability import loss_ratios
from megatron_skyladder.report.tables import (
    beyond,
    duration,
    final_loss,
    less,
    saving_at_equal_loss,
    tokens_text,
)

MOST_NAMES = 4  # of arguments in a sentence
STEP_BACK = 1.2  # a smoothed loss this far above its lowest is a spike worth a look


@dataclass(frozen=True)
class Sentence:
    """What is said of a run, and the pictures to look at, by name."""

    group: int
    name: str
    text: str
    look_at: tuple[str, ...]


def sentences(groups: Sequence[Group], pictures: Collection[str]) -> list[Sentence]:
    """Return the opening.

    Args:
        groups: the first is what the others are compared with.
        pictures: names of those that the report has.
    """
    found = []
    for place, group in enumerate(groups):
        if group.is_band:
            found.append(_of_seeds(place, group, groups[0], pictures))
        for run in group.runs:
            found.append(_of_run(place, run, groups[0], pictures))
    return found


def _of_run(place: int, run: Run, first: Group, pictures: Collection[str]) -> Sentence:
    parts, look = [], []
    if run.lines_without_loss:
        parts.append(f"diverged: no finite loss at iteration {run.lines_without_loss[0]:,}")
        look.append("stability")
    elif run.has_diverged:
        parts.append("diverged: its loss ended above where it began")
        look.append("stability")
    total = run.log.total_iterations
    if total and run.last.iteration < total:
        parts.append(f"is at iteration {run.last.iteration:,} of {total:,}")
    if run in first.runs:
        parts.append(_baseline(run, first))
        look.append("validation-loss")
    else:
        verdict, clear = _better(run, first)
        parts.append(f"{_saved(run, first)} and {verdict}")
        look += ["validation-loss", "loss-by-length"] if clear else ["training-loss"]
        if others := other_settings(run.log, first.runs[0].log):
            parts.append(
                f"differs in {_named(others)} too, so the schedule alone does not tell why"
            )
    ratios = loss_ratios(run.losses)
    late = ratios[len(ratios) // 10 :]
    if not run.has_diverged and np.isfinite(late).any() and np.nanmax(late) > STEP_BACK:
        parts.append(f"its loss stepped back to {np.nanmax(late):.2f} times its lowest")
        look.append("stability")
    return Sentence(place, run.name, "; ".join(parts) + ".", _known(look, pictures))


def _baseline(run: Run, first: Group) -> str:
    loss = final_loss(run, "validation")
    ended = "" if loss is None else f" and ended with a validation loss of {loss:.4f}"
    role = "is what the others are compared with"
    if first.is_band:
        role = "is one of the seeds that the others are compared with"
    return f"{role}: it took {duration(run.seconds[-1])}{ended}"


def _saved(run: Run, first: Group) -> str:
    """Return the time of a run beside the mean of the first group, for as many tokens or not.

    Of seeds, those count that have come as far as the furthest one.
    """
    furthest = max(other.tokens[-1] for other in first.runs)
    others = [other for other in first.runs if other.tokens[-1] >= furthest * (1 - SAME)]
    seconds = float(np.mean([other.seconds[-1] for other in others]))
    tokens = float(np.mean([other.tokens[-1] for other in others]))
    longer = beyond(run.tokens[-1], tokens)
    if longer is not None and abs(longer) > SAME:
        rate = beyond(run.seconds[-1] / run.tokens[-1], seconds / tokens) if seconds else None
        slower = "" if rate is None else f", with {less(rate)} time per token so far"
        return f"has seen {less(longer)} tokens than {first.name}{slower}"
    change = beyond(run.seconds[-1], seconds)
    if change is None:
        return f"has no times to compare with {first.name}"
    amount = duration(abs(run.seconds[-1] - seconds))
    gpus, theirs = run.log.num_gpus, first.runs[0].log.num_gpus
    if gpus and theirs and gpus != theirs:
        amount += f", on {gpus} GPUs where it had {theirs}"
    if change <= 0:
        return f"saved {-100 * change:.1f} % of the time of {first.name} ({amount})"
    return f"took {100 * change:.1f} % more time than {first.name} ({amount})"


def _better(run: Run, first: Group) -> tuple[str, bool]:
    """Return how a run's validation loss stands, and whether validation tells it."""
    if others := other_validation(run.log, first.runs[0].log):
        return (
            f"validates otherwise ({_named(others)}), so nothing says whether it is better",
            False,
        )
    difference = _difference(run, first)
    if difference is None:
        return "shares no validation with it, so nothing says whether it is better", False
    loss, at_end = difference
    if abs(loss) < SIGNIFICANT:
        verdict = f"is as good ({loss:+.4f}; the paper counts less than {SIGNIFICANT} as noise)"
    else:
        verdict = f"is {'better' if loss < 0 else 'worse'} by {abs(loss):.4f} in validation loss"
    if not at_end:
        return f"{verdict} where both were validated last", True
    fewer = saving_at_equal_loss(run, first.runs[0], "seconds")
    if fewer is not None and fewer < 0:
        verdict += f"; it had the loss that {first.runs[0].name} ends with in "
        verdict += f"{100 * -fewer:.1f} % less time"
    return verdict, True


def _difference(run: Run, first: Group) -> tuple[float, bool] | None:
    """Return the difference in validation loss at the last tokens both reached; whether the end."""
    x, y = _validation(run)
    references = [_validation(other) for other in first.runs]
    if not x.size or any(not at.size for at, _ in references):
        return None
    reach = min(at[-1] for at, _ in references)
    within = x[x <= reach * (1 + SAME)]
    if not within.size or within[-1] < max(at[0] for at, _ in references):
        return None
    last = within[-1]
    known = np.mean([np.interp(last, at, losses) for at, losses in references])
    at_end = bool(last == x[-1] and last >= reach * (1 - SAME))
    return float(y[x == last][0] - known), at_end


def _validation(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and losses of a run's validations that are finite."""
    records = run.validations()
    x, y = run.at(run.tokens, records), run.validation_losses(records)
    return x[np.isfinite(y)], y[np.isfinite(y)]


def _of_seeds(place: int, group: Group, first: Group, pictures: Collection[str]) -> Sentence:
    """Return what several seeds came to: the mean, its spread, and whether that is a difference.

    Seeds may still be going on: losses are taken where all of them were validated.
    """
    curves = _validations_of(group)
    found = _at_equal_tokens(curves) if len(curves) > 1 else None
    if found is None:
        return Sentence(place, group.name, "no validation to tell their spread.", ())
    tokens, losses = found
    what, where = "final validation loss", ""
    if not _at_the_end(curves, tokens):
        what, where = (
            "validation loss",
            f" at {tokens_text(group.runs[0], tokens)}, as far as all have come",
        )
    text = f"{what} {losses.mean():.4f} ± {losses.std(ddof=1):.4f}"
    parts = [f"{text} (standard deviation of the seeds){where}"]
    if group is not first:
        parts += _against(first, group, curves)
    left_out = len(group.runs) - len(curves)
    if left_out:
        parts.append(
            f"{left_out} of {len(group.runs)} seeds left out: no finite validation loss to end with"
        )
    return Sentence(
        place, group.name, "; ".join(parts) + ".", _known(["validation-loss"], pictures)
    )


def _against(first: Group, group: Group, curves: list[Curve]) -> list[str]:
    """Return how seeds stand against the first group, at tokens that all of both have seen."""
    if other_validation(group.runs[0].log, first.runs[0].log):
        return []
    others = _validations_of(first)
    found = _at_equal_tokens([*curves, *others]) if others else None
    if found is None:
        return []
    tokens, losses = found
    own, theirs = losses[: len(curves)], losses[len(curves) :]
    difference = own.mean() - theirs.mean()
    spreads = [values.std(ddof=1) for values in (own, theirs) if values.size > 1]
    word = "better" if difference < 0 else "worse"
    verdict = (
        word if abs(difference) > max(*spreads, SIGNIFICANT) else "no more than seeds or noise make"
    )
    ended = _at_the_end([*curves, *others], tokens)
    where = "" if ended else f" at {tokens_text(group.runs[0], tokens)}"
    return [f"{difference:+.4f} against {first.name}{where}: {verdict}"]


def _validations_of(group: Group) -> list[Curve]:
    """Return `_validation` of the runs whose last validation is finite."""
    found = [(run, final_loss(run, "validation")) for run in group.runs]
    return [_validation(run) for run, loss in found if loss is not None and np.isfinite(loss)]


def _at_equal_tokens(curves: Sequence[Curve]) -> tuple[float, np.ndarray] | None:
    """Return the last tokens that all curves reach and each one's loss there, interpolated."""
    tokens = min(x[-1] for x, _ in curves)
    if tokens < max(x[0] for x, _ in curves):
        return None
    return float(tokens), np.array([np.interp(tokens, x, y) for x, y in curves])


def _at_the_end(curves: Sequence[Curve], tokens: float) -> bool:
    return all(tokens >= x[-1] * (1 - SAME) for x, _ in curves)


def _named(names: Sequence[str]) -> str:
    """Return the names, few of many."""
    shown = [*names[:MOST_NAMES]]
    if len(names) > MOST_NAMES:
        shown.append(f"{len(names) - MOST_NAMES} more")
    return " and ".join([*([", ".join(shown[:-1])] if shown[1:] else []), shown[-1]])


def _known(look_at: Sequence[str], pictures: Collection[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in look_at if name in pictures))
