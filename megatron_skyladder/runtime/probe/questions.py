"""Questions to an attention: may this query see that key? Asked of every query, in few calls.

An attention is asked by tensors of its own shapes. Each position has a code, which is its key; a
query that holds the code of position t, scaled up, gives all its attention to t if it sees t, and
otherwise to others. Each position has a value that no other has, so the output tells whether t was
seen: no L x L matrix is needed, and one key too few or too many shows at any length, in any
precision. Each head asks another question, so one call asks as many as there are heads.

Shapes: s tokens of a sequence on this rank, b sequences, h query heads, g key/value heads, d head
size of queries and keys, c of values; N = b * seq_length positions (see `sight.Sight`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_skyladder.runtime.probe.sight import Sight

MARGIN = 24.0  # logits between the key that is asked for and the next best: e^-24 is nothing
SEEN = 0.25  # a deviation from a key's value, relative to the values' root mean square
LEVEL_RMS = math.sqrt((0.5**2 + 1**2 + 1.5**2 + 2**2) / 4)  # of `vectors`
_LEVELS_PER_WORD, _MAX_WORDS = 10, 512  # of 3 bits each; a head has not more than ten times as many
_INSIDE_SALT, _OUTSIDE_SALT, VALUE_SALT = range(1, 4)
_HASH_BITS = 0xFFFFFFFF

Targets = Callable[[Sight, torch.Tensor], torch.Tensor]


def noise(seeds: torch.Tensor, salt: int) -> torch.Tensor:
    """Return a number in 0..2^32-1 for each, by arithmetic: no random state is touched."""
    mixed = seeds * 0x9E3779B1 + (seeds >> 32) * 0xC2B2AE3D + salt * 0x85EBCA77 & _HASH_BITS
    for multiplier, shift in ((0x85EBCA6B, 15), (0xC2B2AE35, 13), (0x27D4EB2F, 16)):
        mixed = ((mixed ^ (mixed >> shift)) * multiplier) & _HASH_BITS
    return mixed ^ (mixed >> 16)


def vectors(seeds: torch.Tensor, size: int, salt: int) -> torch.Tensor:
    """Return a vector for each seed, [..., size], float32, of levels that every precision holds.

    They are halves from -2 to 2 without 0, drawn by `noise`, ten from each number.
    """
    num_words = -(-size // _LEVELS_PER_WORD)
    words = noise(
        seeds[..., None] * _MAX_WORDS + torch.arange(num_words, device=seeds.device), salt
    )
    shifts = 3 * torch.arange(_LEVELS_PER_WORD, dtype=torch.int32, device=seeds.device)
    levels = (words & 0x3FFFFFFF).int()[..., None] >> shifts & 7
    steps = levels.to(torch.int8).flatten(-2)[..., :size] - 4
    return (steps + (steps >= 0)).float() / 2


class Codes:
    """A vector for each position; the product of two is largest where they are the same.

    A position is written in digits of a base that is as small as the head size allows, and each
    digit as a direction in the plane, several times over.

    Args:
        num_positions: N.
        size: d.
        device: where the codes go.
    """

    def __init__(self, num_positions: int, size: int, device: torch.device) -> None:
        pairs = max(1, size // 2)
        base = 2
        while base**pairs < num_positions:
            base += 1
        self._size = size
        self._powers = [1]
        while self._powers[-1] * base < num_positions:
            self._powers.append(self._powers[-1] * base)
        self._repeats = pairs // len(self._powers)
        angles = torch.arange(base, dtype=torch.float64) * (2 * math.pi / base)
        self._directions = torch.stack((angles.cos(), angles.sin()), dim=1).float().to(device)
        self._base = base
        self.separation = self._repeats * (1 - math.cos(2 * math.pi / base))

    def __call__(self, positions: torch.Tensor) -> torch.Tensor:
        """Return [..., d]; the product of one with itself is ``separation`` above all others."""
        powers = torch.tensor(self._powers, device=positions.device)
        digits = positions[..., None] // powers % self._base
        code = self._directions[digits].flatten(-2).repeat(*[1] * positions.dim(), self._repeats)
        return torch.nn.functional.pad(code, (0, self._size - code.shape[-1]))


@dataclass(frozen=True)
class Question:
    """One key that each query asks for.

    Args:
        key: which, for messages.
        seen: whether a query has to see it.
        targets: the key of each query, by its position; outside 0..N-1: this query has none.
        answers_back: which queries ask for a key that hardly any other asks for, by their
            positions: their gradients show at that key. None: of this question none.
    """

    key: str
    seen: bool
    targets: Targets
    answers_back: Targets | None = None


def _inside(sight: Sight, at: torch.Tensor) -> torch.Tensor:
    first = sight.first[at]
    return first + noise(at, _INSIDE_SALT) % (at - first + 1)


def _outside(sight: Sight, at: torch.Tensor) -> torch.Tensor:
    first = sight.first[at]
    visible = at - first + 1
    hidden = sight.num_positions - visible
    chosen = noise(at, _OUTSIDE_SALT) % hidden.clamp(min=1)
    return torch.where(hidden > 0, chosen + visible * (chosen >= first), -1)


def _remote(sight: Sight, at: torch.Tensor) -> torch.Tensor:
    before = sight.run_starts[at] - 1
    return torch.where(before >= sight.first[at], before, -1)


QUESTIONS = (
    Question(
        "the first that it has to see",
        True,
        lambda sight, at: sight.first[at],
        lambda sight, at: sight.is_last_seer[at],
    ),
    Question("the last before those that it may see", False, lambda sight, at: sight.first[at] - 1),
    Question("one that it has to see", True, _inside, lambda sight, at: torch.ones_like(at).bool()),
    Question("the one after itself", False, lambda sight, at: at + 1),
    Question("itself", True, lambda sight, at: at, lambda sight, at: torch.ones_like(at).bool()),
    Question("one that it must not see", False, _outside),
    Question(
        "the last on another context-parallel rank",
        True,
        _remote,
        lambda sight, at: sight.run_starts[at] == at,
    ),
)
AVERAGE = len(QUESTIONS)  # a head that asks for no key, and has to get the mean over all it may see


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an attention: what each head asks.

    Args:
        query: [s, b, h, d].
        key: [s, b, g, d].
        value: [s, b, g, c].
        asked: of each head, an index into `QUESTIONS`, or `AVERAGE`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    asked: tuple[int, ...]


def calls(
    sight: Sight, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> list[Call]:
    """Return the calls that ask all questions, in the shapes and types of an attention's inputs.

    Args:
        sight: who may see whom.
        query: as the attention gets it, [s, b, h, d].
        key: [s, b, g, d].
        value: [s, b, g, c].
        scale: the attention's factor on the logits.
    """
    num_heads, num_groups = query.shape[2], key.shape[2]
    codes = Codes(sight.num_positions, query.shape[3], query.device)
    keys = codes(sight.own)[:, :, None].expand(-1, -1, num_groups, -1).to(key.dtype)
    values = values_of(sight.own, num_groups, value.shape[3]).to(value.dtype)
    result = []
    for start in range(0, AVERAGE + 1, num_heads):
        asked = tuple((start + head) % (AVERAGE + 1) for head in range(num_heads))
        heads = [
            torch.zeros_like(query[:, :, 0])
            if index == AVERAGE
            else codes(targets(sight, index, sight.own)[0]) * (MARGIN / scale / codes.separation)
            for index in asked
        ]
        queries = torch.stack(heads, dim=2).to(query.dtype)
        result.append(Call(queries, keys.contiguous(), values, asked))
    return result


def values_of(positions: torch.Tensor, num_groups: int, size: int) -> torch.Tensor:
    """Return each position's values, [..., g, c], float32."""
    groups = torch.arange(num_groups, device=positions.device)
    return vectors(positions[..., None] * num_groups + groups, size, VALUE_SALT)


def targets(sight: Sight, index: int, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the key that each query asks for, and whether the question is put to it at all.

    A query to which it is not (the first token has no key before it) asks for itself.
    """
    keys = QUESTIONS[index].targets(sight, at)
    put = (keys >= 0) & (keys < sight.num_positions)
    return torch.where(put, keys, at), put


@dataclass(frozen=True)
class Wrong:
    """The first wrong answer to a question.

    Args:
        index: of the question; `AVERAGE` for the mean.
        query: its position.
        key: the position of the key that it asked for.
        count: how many queries of this rank got a wrong answer.
        got: the position of the key whose value it got instead, where it is one key's.
    """

    index: int
    query: int
    key: int
    count: int
    got: int | None


def wrong_answers(sight: Sight, call: Call, out: torch.Tensor) -> list[Wrong]:
    """Return what the output of a call shows to be wrong.

    Args:
        sight: who may see whom.
        call: what was asked.
        out: [s, b, h * c].
    """
    size = call.value.shape[3]
    num_heads, num_groups = len(call.asked), call.key.shape[2]
    answers = out.view(*out.shape[:2], num_heads, size)
    found = []
    for head, index in enumerate(call.asked):
        group = head * num_groups // num_heads
        answer = answers[:, :, head].float()
        if index == AVERAGE:
            tolerance = MEAN_TOLERANCE[out.dtype == torch.float32]
            wrong = _wrong_means(sight, answer, group, num_groups, tolerance)
            asked = sight.own
        else:
            asked, put = targets(sight, index, sight.own)
            expected = values_of(asked, num_groups, size)[:, :, group]
            seen = _deviation(answer, expected) < SEEN
            wrong = (seen != torch.where(put, QUESTIONS[index].seen, True)) | ~_finite(answer)
        if wrong.any():
            place = tuple(wrong.nonzero()[0].tolist())
            got = _source(sight, answer[place], group, num_groups)
            found.append(
                Wrong(index, int(sight.own[place]), int(asked[place]), int(wrong.sum()), got)
            )
    return found


def _deviation(answer: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (answer - expected).square().mean(dim=-1).sqrt() / LEVEL_RMS


def _finite(answer: torch.Tensor) -> torch.Tensor:
    return answer.isfinite().all(dim=-1)


def _wrong_means(
    sight: Sight, answer: torch.Tensor, group: int, num_groups: int, tolerance: float
) -> torch.Tensor:
    """Return which queries did not get the mean of the values that they may see, bool [s, b].

    Means over n keys are as small as 1 / sqrt(n); low precision rounds them, and one key more or
    less shows up to some hundred keys only: the other questions are there for single keys.
    """
    size = min(answer.shape[-1], _MEAN_CHANNELS)
    everywhere = torch.arange(sight.num_positions, device=answer.device)
    whole = vectors(everywhere * num_groups + group, size, VALUE_SALT)
    # halves, counted as integers: until 2.13 at least torch sums floats on a GPU in no fixed order,
    # which it refuses under Megatron's --deterministic-mode
    sums = torch.nn.functional.pad((2 * whole).long().cumsum(dim=0), (0, 0, 1, 0))
    first = sight.first[sight.own]
    visible = (sight.own - first + 1)[..., None]
    mean = (sums[sight.own + 1] - sums[first]).double() / (2 * visible)
    deviation = (answer[..., :size] - mean).square().mean(dim=-1).sqrt()
    unit = LEVEL_RMS / visible[..., 0].sqrt()
    return ~(deviation <= tolerance * unit)


_MEAN_CHANNELS = 16  # of the values: enough to tell keys apart, and little memory at any length
MEAN_TOLERANCE = {True: 0.01, False: 0.1}  # in float32, below it; of a mean's usual size


def _source(sight: Sight, answer: torch.Tensor, group: int, num_groups: int) -> int | None:
    """Return the position whose value this is, if it is one's; answer: [c]."""
    block = 1 << 16  # positions at a time
    for start in range(0, sight.num_positions, block):
        stop = min(start + block, sight.num_positions)
        positions = torch.arange(start, stop, device=answer.device)
        known = vectors(positions * num_groups + group, answer.shape[-1], VALUE_SALT)
        matches = (_deviation(answer, known) < SEEN).nonzero()
        if len(matches):
            return start + int(matches[0])
    return None
