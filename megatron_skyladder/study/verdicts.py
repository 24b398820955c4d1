"""What the differences of arms say, in sentences, and how large they have to be to say anything."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from megatron_skyladder.study import results
from megatron_skyladder.study.markdown import listed, wrapped
from megatron_skyladder.study.results import Arm, Figure, Scatter
from megatron_skyladder.study.tables import (
    Given,
    at_equal_time,
    best_rate,
    is_extrapolated,
    machine_of,
)

# nats: what ladders gain at 8,192 tokens in the paper's models of 120M parameters (PAPER.md)
PAPER_GAINS = (0.02, 0.04)

A_FEW_PERCENT = 0.03  # of the time: timing runs tell no smaller saving

UNKNOWN = "No arm has several seeds yet, so nothing says which differences are noise."

SCATTERED = """\
From seed to seed the difference of two runs scatters by {deviation:.2f} nats ({freedom} of
freedom): below {bars} it cannot be told from zero (95 % interval), and is inconclusive."""

TOO_SMALL = """\
One comparison in twenty is conclusive by chance. What ladders gain in the paper's 120M models,
{low} to {high} nats, is too small to be seen here."""

CONTEXT = """\
What long context is worth to these models: `{arm}` loses {whole:.3f} nats where it sees
{shortest:,} tokens in place of {longest:,}, and {half:.3f} where it sees {longer:,}."""


def text(given: Given, arms: Collection[str]) -> str:
    """Return how many runs have finished, and how arms compare with the reference.

    Args:
        given: what is known.
        arms: those that are compared; the others are left out.

    Returns:
        Paragraph and list as Markdown, in lines of 100 characters.
    """
    planned = [run for run in given.study.runs if run.is_compared]
    done = [it for it in given.found if it.is_compared and it.is_whole]
    lines = [f"{len(done)} of {len(planned)} runs have finished.", _handicap(given)]
    reference, found = given.reference, []
    if reference is not None:
        pairs = [(arm, reference) for arm in given.arms if arm is not reference]
        scatter = _against_reference(given, reference)
        lines.append(_noise(scatter, [arm for arm, _ in pairs], TOO_SMALL))
        shown = [(arm, other) for arm, other in pairs if arm.name in arms]
        found = [_verdict(given, arm, other, scatter) for arm, other in shown]
    if not any(found):
        lines.append("Nothing can be compared yet.")
    return _list(" ".join(filter(None, lines)), found)


def of_families(given: Given) -> str:
    """Return how arms compare with the one that each varies; nothing where none can be."""
    by_name = {arm.name: arm for arm in given.arms}
    pairs = [
        (by_name[name], by_name[other])
        for name, other in given.study.against.items()
        if name in by_name and other in by_name
    ]
    if not pairs:
        return ""
    scatter = _scatter(pairs)
    found = [_verdict(given, arm, other, scatter) for arm, other in pairs]
    about = "Against the arm that each one varies, with the same seed."
    return "\n" + _list(f"{about} {_noise(scatter, [arm for arm, _ in pairs])}", found)


def context(given: Given) -> str:
    """Return what long context is worth to the reference, as a sentence; nothing before it ran."""
    if given.reference is None or len(given.reference.records[0].losses) < 3:
        return ""
    *shorter, longest = sorted(given.reference.records[0].losses)
    records = given.reference.records

    def cost(length: int) -> float:
        return sum(it.losses[length] - it.losses[longest] for it in records) / len(records)

    return CONTEXT.format(
        arm=given.reference.name,
        whole=cost(shorter[0]),
        half=cost(shorter[-1]),
        shortest=shorter[0],
        longer=shorter[-1],
        longest=longest,
    )


def missing(given: Given) -> str:
    """Return a line with the arms that have no finished run; nothing where all have."""
    done = {arm.name for arm in given.arms}
    lacking = [name for name in given.study.arms if name not in done]
    return "\n" + wrapped(f"Not finished yet: {listed(lacking)}.") if lacking else ""


def bar_of_one_seed(given: Given) -> float | None:
    """Return what the difference of one seed to the reference has to exceed; None: not known."""
    found = None if given.reference is None else _against_reference(given, given.reference)
    return None if found is None else found.bar(1)


def _against_reference(given: Given, reference: Arm) -> Scatter | None:
    arms = [arm for arm in given.arms if not given.is_reference(arm)]
    return _scatter([(arm, reference) for arm in arms])


def _list(paragraph: str, items: Sequence[str]) -> str:
    found = [wrapped(f"- {item}", indent="  ") for item in items if item]
    return wrapped(paragraph) + ("\n" + "".join(found) if found else "")


def _scatter(pairs: Sequence[tuple[Arm, Arm]]) -> Scatter | None:
    return results.scatter(
        results.difference(arm, other, results.final_difference) for arm, other in pairs
    )


def _noise(scatter: Scatter | None, arms: Sequence[Arm], power: str = "") -> str:
    if scatter is None:
        return UNKNOWN if arms else ""
    counts = sorted({len(arm.records) for arm in arms})
    bars = " and ".join(f"{scatter.bar(count):.2f} with {_seeds(count)}" for count in counts)
    words = SCATTERED.format(
        deviation=scatter.deviation, freedom=_degrees(scatter.freedom), bars=bars
    )
    low, high = PAPER_GAINS
    if power and scatter.bar(max(counts)) > high:
        words += " " + power.format(low=low, high=high)
    return words


def _verdict(given: Given, arm: Arm, other: Arm, scatter: Scatter | None) -> str:
    """Return a sentence on two arms; nothing where they have no seed in common."""
    loss = results.difference(arm, other, results.final_difference)
    if loss is None:
        return ""
    tokens = arm.records[0].tokens
    at = "at equal tokens"
    if tokens != other.records[0].tokens:
        at = f"after {tokens / 1e6:.1f} million tokens"
    words = f"`{arm.name}` against `{other.name}`, {_seeds(len(loss.values))}"
    words += f"{_across_machines(arm, other)}: "
    words += f"{loss.text(3, signed=True)} nats {at}"
    if not given.is_reference(arm):
        words += _word(loss, scatter)
    saved = results.difference(arm, other, results.time_saved)
    if saved is not None:
        words += f"; {_share(saved)} time"
    alike = None
    if other is given.reference and not given.is_reference(arm):
        alike = at_equal_time(given, arm)
    if alike is not None:
        fewer = "" if len(alike.values) == len(loss.values) else f", {_seeds(len(alike.values))}"
        fewer += ", extrapolated" if is_extrapolated(given, arm) else ""
        words += f"; {alike.text(3, signed=True)} at equal time{fewer}{_word(alike, scatter)}"
    return words + "."


def _share(saved: Figure) -> str:
    """Return a saving in words; below what one timing run can tell, there is none."""
    if abs(saved.mean) < A_FEW_PERCENT:
        return "about as much"
    return f"{abs(100 * saved.mean):.0f} % {'less' if saved.mean > 0 else 'more'}"


def _across_machines(arm: Arm, other: Arm) -> str:
    """Return how many pairs ran on two machines, which round differently; nothing where none."""
    there = {record.seed: machine_of(record) for record in other.records}
    own = {record.seed: machine_of(record) for record in arm.records if record.seed in there}
    apart = sum(machine != there[seed] for seed, machine in own.items())
    if not apart:
        return ""
    if apart == len(own):
        return ", on two machines" if apart == 1 else ", each on two machines"
    return f", {'one' if apart == 1 else apart} on two machines"


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def _degrees(count: int) -> str:
    return "1 degree" if count == 1 else f"{count} degrees"


def _word(difference: Figure, scatter: Scatter | None) -> str:
    if scatter is None:
        return ""
    if abs(difference.mean) < scatter.bar(len(difference.values)):
        return ", inconclusive"
    return ", better" if difference.mean < 0 else ", worse"


def _handicap(given: Given) -> str:
    """Return a sentence where a rate was tried that suits the reference better; else nothing."""
    best = best_rate(given)
    if best is None:
        return ""
    main = given.study.main
    rate, steps = best
    if float(rate) == float(main.value("--lr")):
        return ""
    return (
        f"**With the learning rate {rate}, `{main.arm}` came to a lower loss in {steps:,} steps "
        f"than with {main.value('--lr')}, with which all arms train. So differences to it are "
        "larger than they would be to a tuned baseline.**"
    )
