"""What the backward pass has to bring to each key, and what it brought.

Two ways, because attention that is all on one key (`questions`) has no gradient but the value's:

* every query that asks for a key which few others ask for sends its own gradient there: it has to
  arrive at that key's value, on whatever rank that lies, and nothing else;
* at a few queries beside the boundaries the gradients of an ordinary softmax, worked out from the
  textbook over the keys that they may see.

Shapes as in `questions`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_skyladder.runtime.probe.questions import (
    AVERAGE,
    LEVEL_RMS,
    QUESTIONS,
    SEEN,
    Call,
    targets,
    values_of,
    vectors,
)
from megatron_skyladder.runtime.probe.sight import Sight

TOLERANCE = {True: 0.01, False: 0.1}  # in float32, below it; of the whole gradient's norm
_MAX_SAMPLES = 48
_MAX_TABLE = 1 << 24  # numbers: what is asked for in each sample is kept once, up to 64 MB
_BACK_SALT, _QUERY_SALT, _KEY_SALT = range(11, 14)

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Make = Callable[[torch.Tensor], torch.Tensor]  # positions [...] -> vectors [..., g, size]


@dataclass(frozen=True)
class Lost:
    """A gradient that is not what it has to be.

    Args:
        what: ``value``, ``key`` or ``query``.
        key: the position at which it shows first, or None where only the whole is off.
        deviation: relative to what it has to be.
    """

    what: str
    key: int | None
    deviation: float


def wrong_values(sight: Sight, call: Call, attend: Attend) -> tuple[torch.Tensor, list[Lost]]:
    """Attend, send a gradient back from each query, and look where it arrives.

    Args:
        sight: who may see whom.
        call: what each head asks.
        attend: (query, key, value) -> [s, b, h * c].

    Returns:
        The output, and what is wrong.
    """
    num_heads, (num_groups, size) = len(call.asked), call.value.shape[2:]
    query, key, value = (
        tensor.detach().requires_grad_() for tensor in (call.query, call.key, call.value)
    )
    everywhere = torch.arange(sight.num_positions, device=value.device)
    back = value.new_zeros(*sight.own.shape, num_heads, size)
    expected = torch.zeros(sight.own.numel(), num_groups, size, device=value.device)
    for head, index in enumerate(call.asked):
        if index == AVERAGE or QUESTIONS[index].answers_back is None:
            continue
        keys, sends = _senders(sight, index, everywhere)
        sent = vectors(sight.own * num_heads + head, size, _BACK_SALT)
        back[:, :, head] = (sent * sends[sight.own][..., None]).to(value.dtype)
        arrives = sends & (sight.place_of[keys] >= 0)
        arriving = vectors(everywhere[arrives] * num_heads + head, size, _BACK_SALT)
        group = head * num_groups // num_heads
        expected[:, group].index_add_(0, sight.place_of[keys[arrives]], arriving)
    out = attend(query, key, value)
    (gradient,) = torch.autograd.grad(out, value, back.flatten(2))
    found = gradient.float().flatten(0, 1) - expected
    deviations = found.square().mean(dim=-1).sqrt() / LEVEL_RMS
    wrong = ~(deviations < SEEN)
    if not wrong.any():
        return out.detach(), []
    place = int(wrong.any(dim=-1).nonzero()[0])
    lost = Lost("value", int(sight.own.flatten()[place]), float(deviations[place].max()))
    return out.detach(), [lost]


def _senders(
    sight: Sight, index: int, everywhere: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the key that each of all queries asks for, and which of them send a gradient."""
    answers_back = QUESTIONS[index].answers_back
    assert answers_back is not None
    keys, put = targets(sight, index, everywhere)
    return keys, put & answers_back(sight, everywhere)


def samples(sight: Sight) -> list[int]:
    """Return the queries whose gradients are worked out: beside the ends of runs and fragments."""
    begins = (sight.run_starts[1:] != sight.run_starts[:-1]).nonzero().flatten() + 1
    # the last query that still sees the key before a run
    last = torch.searchsorted(sight.first, begins - 1, right=True) - 1
    ends = sight.is_last_seer.nonzero().flatten()
    few = _MAX_SAMPLES // 4
    chosen = torch.cat([_spread(begins, few), _spread(last, few), _spread(ends, 2 * few)])
    return sorted(set(chosen.tolist()))


def _spread(positions: torch.Tensor, count: int) -> torch.Tensor:
    """Return at most ``count`` of them, the first and the last among them."""
    if len(positions) <= count:
        return positions
    picked = torch.linspace(0, len(positions) - 1, count, device=positions.device)
    return positions[picked.round().long()]


def wrong_softmax(
    sight: Sight,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    attend: Attend,
) -> list[Lost]:
    """Compare the gradients of a few queries with those of the textbook.

    Args:
        sight: who may see whom.
        query: [s, b, h, c], as the attention gets it; only its shape and type are used.
        key: [s, b, g, c], the same.
        value: [s, b, g, d], the same.
        scale: the attention's factor on the logits.
        attend: (query, key, value) -> [s, b, h * d].

    Returns:
        What deviates by more than rounding, as a share of its norm; nothing where all is right.
    """
    num_heads, num_groups = query.shape[2], key.shape[2]
    per_group = num_heads // num_groups
    spread = 1 / (scale * query.shape[3] ** 0.5 * LEVEL_RMS**2)  # logits of about one
    chosen = samples(sight)
    sampled = torch.zeros(sight.num_positions, dtype=torch.bool, device=query.device)
    sampled[chosen] = True
    groups = torch.arange(num_groups, device=query.device)

    def made_once(make: Make, size: int) -> Make:
        if sight.num_positions * num_groups * size > _MAX_TABLE:
            return make
        table = make(torch.arange(sight.num_positions, device=query.device))
        return lambda at: table[at]

    def queries_of(at: torch.Tensor) -> torch.Tensor:
        unit = vectors(at[..., None] * num_groups + groups, query.shape[3], _QUERY_SALT)
        return (unit * spread).to(query.dtype).float()

    def keys_of(at: torch.Tensor) -> torch.Tensor:
        return vectors(at[..., None] * num_groups + groups, key.shape[3], _KEY_SALT)

    def back_of(at: torch.Tensor) -> torch.Tensor:
        sent = vectors(at[..., None] * num_groups + groups, value.shape[3], _BACK_SALT)
        return sent * sampled[at][..., None, None]

    queries, keys = made_once(queries_of, query.shape[3]), made_once(keys_of, key.shape[3])
    values = made_once(lambda at: values_of(at, num_groups, value.shape[3]), value.shape[3])
    back = made_once(back_of, value.shape[3])
    given = [
        queries(sight.own).repeat_interleave(per_group, dim=2).to(query.dtype),
        keys(sight.own).to(key.dtype),
        values(sight.own).to(value.dtype),
    ]
    given = [tensor.requires_grad_() for tensor in given]
    sent = back(sight.own)[:, :, :, None]  # from the first head of each group
    sent = torch.nn.functional.pad(sent, (0, 0, 0, per_group - 1)).flatten(2)
    gradients = torch.autograd.grad(attend(*given), given, sent.to(value.dtype))
    expected = [torch.zeros_like(tensor, dtype=torch.float32).flatten(0, 1) for tensor in given]
    for at in chosen:
        span = torch.arange(int(sight.first[at]), at + 1, device=query.device)
        here = torch.tensor(at, device=query.device)
        textbook = _textbook(queries(here), keys(span), values(span), back(here), scale)
        places = sight.place_of[span]
        held = places >= 0
        for total, part in zip(expected[1:], textbook[1:], strict=True):
            total.index_add_(0, places[held], part[held])
        if sight.place_of[at] >= 0:
            expected[0].view(-1, num_groups, per_group, query.shape[3])[
                sight.place_of[at], :, 0
            ] += textbook[0]
    tolerance = TOLERANCE[query.dtype == torch.float32]
    lost = []
    for what, got, wanted in zip(("query", "key", "value"), gradients, expected, strict=True):
        size = float(wanted.norm()) or 1.0
        deviation = float((got.float().flatten(0, 1) - wanted).norm()) / size
        if not deviation <= tolerance:
            lost.append(Lost(what, None, deviation))
    return lost


def _textbook(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, back: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of softmax attention of one query.

    Args:
        query: [g, d], of one head of each group.
        key: [n, g, d], all that it may see.
        value: [n, g, c].
        back: [g, c], the output's gradient.
        scale: on the logits.

    Returns:
        Those of the query [g, d], the keys [n, g, d] and the values [n, g, c].
    """
    weights = ((key * query).sum(dim=-1) * scale).softmax(dim=0)[..., None]  # [n, g, 1]
    answered = (value * back).sum(dim=-1, keepdim=True)
    logits = weights * (answered - (weights * answered).sum(dim=0)) * scale
    return (logits * key).sum(dim=0), logits * query, weights * back
