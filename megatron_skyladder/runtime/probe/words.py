"""What was found, in sentences."""

from __future__ import annotations

from megatron_skyladder.runtime.probe.gradients import Lost
from megatron_skyladder.runtime.probe.questions import AVERAGE, QUESTIONS, Wrong
from megatron_skyladder.runtime.probe.sight import Sight


def of_answer(where: str, sight: Sight, wrong: Wrong) -> str:
    """Say which query saw, or did not see, which key."""
    first = _place(sight, int(sight.first[wrong.query]))
    may_see = f"it may see the positions {first}..{_place(sight, wrong.query)}"
    got = "" if wrong.got is None else f", it got that at {_place(sight, wrong.got)} alone"
    more = f"; {wrong.count} queries of this rank got a wrong answer to this question"
    if wrong.index == AVERAGE:
        what = f"does not get the mean over the keys that it may see{got}"
    elif QUESTIONS[wrong.index].seen or wrong.key == wrong.query:
        what = f"does not see the key at {_place(sight, wrong.key)}{got}"
    else:
        what = f"sees the key at {_place(sight, wrong.key)}, {QUESTIONS[wrong.index].key}"
    return f"{where}: the query at {_at(sight, wrong.query)} {what} ({may_see}{more})"


def of_gradient(where: str, sight: Sight, lost: Lost) -> str:
    """Say which gradient is off, and by how much."""
    at = "" if lost.key is None else f" at {_at(sight, lost.key)}"
    return (
        f"{where}: the backward pass brings another gradient to the {lost.what}{at} than the "
        f"queries that see it send (relative deviation {lost.deviation:.2g})"
    )


def _place(sight: Sight, position: int) -> int:
    return position % sight.seq_length


def _at(sight: Sight, position: int) -> str:
    return f"position {_place(sight, position)} of sequence {position // sight.seq_length}"
