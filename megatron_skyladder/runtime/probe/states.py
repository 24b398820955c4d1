"""Does the state of a layer start anew where it should? Asked by changing what must not be seen.

A recurrent layer has no queries and keys to put questions with (see `questions`), so its inputs
are changed instead. Those of every second fragment: outputs of the others must not move, and both
kinds take turns. Those of each fragment's first token: the output of the second has to move.

Shapes: s tokens of a sequence on this rank, b sequences, h hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_skyladder.attention.recurrent import Kind
from megatron_skyladder.runtime.probe.sight import Sight
from megatron_skyladder.runtime.trainer import Groups

Forward = Callable[[torch.Tensor], torch.Tensor]


def faults(kind: Kind, sight: Sight, groups: Groups, hidden: torch.Tensor, run: Forward) -> str:
    """Return what is wrong with a layer's state, or nothing; all ranks of a stage call this.

    Args:
        kind: of layer.
        sight: whom its tokens may see.
        groups: this rank's.
        hidden: the layer's input, [s, b, h]; of sequence-parallel ranks the part that each has.
        run: the layer with another input, which returns its output, [s, b, h].
    """
    own = _own_part(sight.own, len(hidden), groups)
    starts = sight.first[own]
    _, numbers = torch.unique(sight.first, return_inverse=True)
    stock = run(hidden)
    for turn in (0, 1):
        changed = numbers[own] % 2 == turn
        moved = _moved(stock, run(_changed(hidden, changed)))
        inside, outside = _largest(moved, changed, groups)
        if outside > kind.leak * inside:
            return (
                f"inputs that must not be seen moved an output by {outside:.2g}, where those that "
                f"must be seen moved it by {inside:.2g} (rounding may be {kind.leak:g} of that)"
            )
    moved = _moved(stock, run(_changed(hidden, own == starts)))
    if (moved[own == starts + 1] == 0).any():
        return "the first token of a stretch that has to be seen as a whole is not seen by the next"
    return ""


def _own_part(own: torch.Tensor, length: int, groups: Groups) -> torch.Tensor:
    """Return the positions of this rank's tokens, where tensor-parallel ranks share them out."""
    parts = len(own) // length
    return own if parts == 1 else own.chunk(parts)[groups.tp.rank()]


def _changed(hidden: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return torch.where(where[..., None], 1 - hidden.flip(-1), hidden)


def _moved(stock: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return how far each token's output has moved, [s, b]."""
    return (other.float() - stock.float()).abs().amax(dim=-1)


def _largest(moved: torch.Tensor, inside: torch.Tensor, groups: Groups) -> tuple[float, float]:
    """Return the largest movement inside and outside, over all tokens of the sequences."""
    zero = torch.zeros_like(moved)
    both = [torch.where(inside, moved, zero).max(), torch.where(inside, zero, moved).max()]
    largest = torch.stack(both)
    for group in (groups.tp, groups.cp):
        if group is not None and group.size() > 1:
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    return float(largest[0]), float(largest[1])


@contextlib.contextmanager
def without_dropout(module: torch.nn.Module) -> Iterator[None]:
    """Let a layer do the same in each run, whether it is in training or not."""
    before: Any = getattr(module, "hidden_dropout", None)
    if before is not None:
        module.hidden_dropout = 0.0  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is not None:
            module.hidden_dropout = before
