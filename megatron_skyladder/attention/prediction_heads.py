"""Heads of multi-token prediction (``--mtp-num-layers``) that see no token beyond a fragment.

At position i the head of depth k adds the embedding of token i + k to what the head before it made,
attends under the same mask as all layers, and predicts token i + k + 1. Megatron shifts tokens,
labels and loss mask by one for each depth, and puts zeros at the end of the sequence, where a token
would come from behind it; a loss mask of zeros takes these positions out of the loss. It does the
same at the end of each sequence where it packs several. Here this happens at the end of every
fragment, be it a document's or a window's:

    token      a b c | d e          fragments of 3 and 2
    depth 1    b c 0 | e 0          the input beside a's hidden state is b, and c is to be predicted
    counts     1 1 0 | 1 0          at c the input would be d, which no layer may show to c

So each fragment trains as it would alone, as a sequence of its own. The token to be predicted may
lie in the next fragment (b predicts d), as in the main head.

Megatron shifts what one context-parallel rank holds by messages to the neighbours in its zigzag;
here all ranks' tokens are gathered (8 bytes each) and every rank takes what follows its own, under
any layout. Counts of tokens are those of whole sequences, divided by the ranks, as
`runtime.sequence_mean` counts for the main head.

Shapes: B sequences of the micro-batch, S tokens of a sequence, s on this rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_skyladder.attention.core_attention import SkyLadderAttention, context_parallel_group
from megatron_skyladder.attention.segments import split_mask, to_device
from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.fragments import fragment_cu_seqlens, rows_cu_seqlens


def heads(model: torch.nn.Module) -> torch.nn.Module | None:
    """Return the block of prediction heads in a model chunk, where it has one."""
    found: torch.nn.Module | None = getattr(model, "mtp", None)
    return found


def follow_fragments(model: Any) -> None:
    """Let a model's prediction heads, and their losses, follow the fragments in training.

    Args:
        model: a GPTModel.
    """
    if not getattr(model.config, "mtp_num_layers", None):
        return
    group = context_parallel_group(model.config, getattr(model, "pg_collection", None))
    follower = _Follower(group)
    model.register_forward_pre_hook(follower.begin, with_kwargs=True)
    model.register_forward_hook(follower.end, always_call=True)
    block = heads(model)
    for module in () if block is None else block.modules():
        if isinstance(module, SkyLadderAttention):
            module.leave_statistics()  # heads are numbered from 1, as the layers are


def within_fragments(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's ``roll_tensor``: while a model trains, it does not roll across fragments."""

    @functools.wraps(original)
    def roll_tensor(
        tensor: torch.Tensor | None,
        shifts: int = -1,
        dims: int = -1,
        cp_group: Any = None,
        packed_seq_params: Any = None,
        **options: Any,
    ) -> Any:
        follower = _Follower.active
        if follower is None or tensor is None or packed_seq_params is not None:
            return original(tensor, shifts, dims, cp_group, packed_seq_params, **options)
        assert (shifts, tensor.dim(), dims % tensor.dim()) == (-1, 2, 1)
        return follower.roll(tensor)

    return roll_tensor


def can_follow() -> bool:
    """Return whether this Megatron shifts all that belongs to a head by one function (0.17 on)."""
    from megatron.core.transformer import multi_token_prediction

    return {"roll_tensor", "process_mtp_loss"} <= vars(multi_token_prediction).keys()


@dataclass(frozen=True)
class _Shift:
    """Where each token of this rank finds the next one of its fragment.

    Args:
        source: int64 [B, s], into the tokens of all ranks, [cp_size * B * s].
        inside: bool [B, s], whether there is a next one.
        taken: bool [cp_size * B * s], tokens that are the next one of some token.
    """

    source: torch.Tensor
    inside: torch.Tensor
    taken: torch.Tensor


class _Follower:
    """Knows the fragments of the micro-batch that a model is called with.

    Heads and losses shift tokens in the call itself, never when a layer is recomputed.
    """

    active: _Follower | None = None

    def __init__(self, group: Any) -> None:
        self._clock = clock.current()
        self._group = group
        self._mask: torch.Tensor | None = None
        self._shift: _Shift | None = None
        self._of_window: tuple[Any, _Shift] | None = None

    def begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what a GPTModel is called with: (input_ids, position_ids, attention_mask, ...)."""
        self._mask = args[2] if len(args) > 2 else kwargs.get("attention_mask")
        self._shift = None
        _Follower.active = self if model.training else None

    @staticmethod
    def end(*_: Any) -> None:
        """Leave other callers of Megatron's function alone."""
        _Follower.active = None

    def roll(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next token of each, 0 where there is none in its fragment, and their sum.

        Args:
            tensor: [B, s] of this rank's tokens: ids, positions, labels or a loss mask.

        Returns:
            [B, s], and the sum over whole sequences, divided by the context-parallel ranks.
        """
        cp_size = 1 if self._group is None else self._group.size()
        if self._shift is None:
            self._shift = self._find_shift(tensor, cp_size)
        shift, everything = self._shift, tensor.contiguous().view(-1)
        if cp_size > 1:
            parts = [torch.empty_like(everything) for _ in range(cp_size)]
            torch.distributed.all_gather(parts, everything, group=self._group)
            everything = torch.cat(parts)
        rolled = everything[shift.source].masked_fill(~shift.inside, 0)
        if cp_size == 1:
            return rolled, rolled.sum()
        return rolled, everything.masked_fill(~shift.taken, 0).sum() / cp_size

    def _find_shift(self, tensor: torch.Tensor, cp_size: int) -> _Shift:
        """Return that of the micro-batch; without documents it changes with the window alone."""
        num_rows, own_length = tensor.shape
        key = self._clock.window(training=True), num_rows, own_length, tensor.device
        if self._mask is None and self._of_window is not None and self._of_window[0] == key:
            return self._of_window[1]
        shift = self._make_shift(num_rows, own_length, cp_size, tensor.device)
        self._of_window = (key, shift) if self._mask is None else None
        return shift

    def _make_shift(
        self, num_rows: int, own_length: int, cp_size: int, device: torch.device
    ) -> _Shift:
        seq_length = own_length * cp_size
        window = min(self._clock.window(training=True), seq_length)
        sliding = self._clock.config.mask == "sliding"
        mask = None
        if self._mask is not None:
            mask, _ = split_mask(self._mask)
            cu_seqlens = mask.numpy()
        else:
            cut = seq_length if sliding else window
            row = fragment_cu_seqlens(np.empty(0, int), seq_length=seq_length, window_len=cut)
            cu_seqlens = rows_cu_seqlens([row] * num_rows)
        held = [[np.arange(seq_length)] * num_rows]  # positions by rank and sequence
        if cp_size > 1:
            rule = self._clock.layout_rule(seq_length, cp_size, training=True)
            layouts = rule.layouts(num_rows, None if mask is None else cu_seqlens)
            held = [[layout.positions(rank) for layout in layouts] for rank in range(cp_size)]
        # slot: where a token lies among those of all ranks
        slots = np.empty((num_rows, seq_length), dtype=np.int64)
        places = np.arange(slots.size).reshape(cp_size, num_rows, own_length)
        for rank, row in np.ndindex(cp_size, num_rows):
            slots[row, held[rank][row]] = places[rank, row]
        begins = np.zeros(num_rows * seq_length + 1, dtype=bool)
        begins[cu_seqlens] = True
        positions = np.stack(held[0 if self._group is None else self._group.rank()])
        following = positions + np.arange(num_rows)[:, None] * seq_length + 1
        inside = ~begins[following]
        taken = np.empty(num_rows * seq_length, dtype=bool)
        taken[slots.ravel()] = ~begins[:-1]
        source = slots.ravel()[np.where(inside, following, 0)]
        return _Shift(*(to_device(array, device) for array in (source, inside, taken)))
