"""Rotary embeddings of the positions that a context-parallel rank really holds.

Megatron's rotary embedding takes the positions of Megatron's own cut, and keeps the result by the
sequence's length alone (``lru_cache`` around ``forward``): under a layout that changes with the
window it would come back stale, without an error. So what it returns is replaced behind that cache,
in a hook on the module itself; nothing of Megatron's classes is touched.

Multi-latent attention makes its embedding itself, in each layer and again when the layer is
recomputed, when later micro-batches have been read: there the mask is noted as it travels.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_skyladder.attention.core_attention import context_parallel_group
from megatron_skyladder.attention.segments import to_device
from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.sequence_layout import Kind, Layout


class WrongPositionsError(RuntimeError):
    """A batch is cut otherwise than its rotary embeddings."""


class RotaryPositions:
    """Gives a model's rotary embedding the positions of the layout, and compares them with the ids.

    The document mask of a micro-batch, which the layouts by the sequence follow, is noted when the
    model is called with it: the embedding is made before any layer runs, and never recomputed. One
    that a layer makes is noted when the layer's attention is called. All layers have the same.

    Args:
        model: a GPTModel with a ``rotary_pos_emb``, or with layers that have one each.
        group: the context-parallel group.
        checks_ids: whether position ids count from 0 in each sequence; not where they begin anew at
            each document (--reset-position-ids).
    """

    # a comparison waits for the device, so training makes it where the layout has changed
    compares_always = False

    def __init__(self, model: torch.nn.Module, group: Any, *, checks_ids: bool) -> None:
        self._clock = clock.current()
        self._group = group
        self._checks_ids = checks_ids
        self._mask: torch.Tensor | None = None
        self._ids: torch.Tensor | None = None
        self._compared: tuple[object, ...] | None = None
        self._kept: tuple[Any, Any] | None = None
        self._latest: tuple[Any, Any, tuple[Layout, ...]] | None = None
        model.register_forward_pre_hook(self._note, with_kwargs=True)
        for owner, rotary in owners_of_rotaries(model):
            if owner is not model:
                owner.register_forward_pre_hook(self._note_mask, with_kwargs=True)
            rotary.register_forward_hook(self._replace, with_kwargs=True)

    def _note(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what a GPTModel is called with: (input_ids, position_ids, attention_mask, ...)."""
        self._ids = args[1] if len(args) > 1 else kwargs.get("position_ids")
        self._mask = args[2] if len(args) > 2 else kwargs.get("attention_mask")

    def _note_mask(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what an attention is called with: (hidden_states, attention_mask, ...)."""
        self._mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")

    def _replace(
        self, rotary: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return what the embedding is to be, or None where Megatron's is right."""
        if kwargs.get("packed_seq", len(args) > 2 and args[2]):
            return None
        seq_length = args[0] if args else kwargs["max_seq_len"]
        offset = args[1] if len(args) > 1 else kwargs.get("offset", 0)
        rule = self._clock.layout_rule(seq_length, self._group.size(), training=rotary.training)
        layouts = self._layouts(rule)
        self._compare(rule, layouts)
        if all(layout.is_zigzag for layout in layouts):
            return None
        key = layouts, offset, self._clock.rotary(training=rotary.training)
        if self._kept is None or self._kept[0] != key:
            positions = self._positions(layouts)
            self._kept = key, _at(rotary, seq_length, offset, positions)
        return self._kept[1]

    def _layouts(self, rule: Any) -> tuple[Layout, ...]:
        """Return those that differ between sequences, or the one that all have."""
        mask = self._mask
        if self._latest is not None and self._latest[0] is mask and self._latest[1] == rule:
            return self._latest[2]
        layouts = self._layouts_of(rule, mask)
        self._latest = mask, rule, layouts
        return layouts

    @staticmethod
    def _layouts_of(rule: Any, mask: torch.Tensor | None) -> tuple[Layout, ...]:
        if rule.kind is not Kind.SEQUENCE or mask is None:
            return rule.layouts(1)
        return rule.layouts(int(mask[-1]) // rule.seq_length, mask.numpy())

    def _positions(self, layouts: tuple[Layout, ...]) -> np.ndarray:
        """Return the positions of this rank, int64 [layouts, seq_length / cp_size]."""
        return np.stack([layout.positions(self._group.rank()) for layout in layouts])

    def _compare(self, rule: Any, layouts: tuple[Layout, ...]) -> None:
        """Raise where the batch has other positions; pipeline stages without a batch cannot tell.

        Raises:
            WrongPositionsError: they differ.
        """
        ids, self._ids = self._ids, None  # the next call may be one without ids
        key = (rule.kind, rule.window_len) if rule.kind is Kind.SEQUENCE else layouts
        if ids is None or not self._checks_ids or self._clock.layout_kind is Kind.ZIGZAG:
            return  # nothing to compare, or nobody but Megatron cuts
        if key == self._compared and not self.compares_always:
            return
        self._compared = key
        expected = to_device(self._positions(layouts), ids.device)
        if not torch.equal(ids, expected.expand_as(ids)):
            row, column = (ids != expected).nonzero()[0].tolist()
            raise WrongPositionsError(
                f"sequence {row} of the micro-batch has position {int(ids[row, column])} in place "
                f"{column} of this context-parallel rank, but its rotary embedding and its keys "
                f"are those of position {int(expected.expand_as(ids)[row, column])}. Something "
                "else cuts or reorders the batch. --skyladder-context-parallel-layout zigzag "
                "leaves the cut to Megatron."
            )


def follow_layout(model: Any, *, checks_ids: bool) -> None:
    """Let a model's rotary embedding follow the layout, where sequences are shared out.

    Args:
        model: a GPTModel.
        checks_ids: see `RotaryPositions`.
    """
    group = context_parallel_group(model.config, getattr(model, "pg_collection", None))
    if group is not None and owners_of_rotaries(model):
        RotaryPositions(model, group, checks_ids=checks_ids)


def owners_of_rotaries(model: torch.nn.Module) -> list[tuple[torch.nn.Module, Any]]:
    """Return the modules of a model that make a rotary embedding, each with the one it has."""
    found = ((module, getattr(module, "rotary_pos_emb", None)) for module in model.modules())
    return [(module, rotary) for module, rotary in found if is_rotary(rotary)]


def is_rotary(module: Any) -> bool:
    """Return whether a module can make the embedding of all positions; see `whole_embedding`.

    Multimodal ones take their positions from elsewhere, and YaRN of 0.12 always cuts.
    """
    if not isinstance(module, RotaryEmbedding):
        return False
    return (
        hasattr(module, "get_emb") or "packed_seq" in inspect.signature(module.forward).parameters
    )


def whole_embedding(rotary: Any, seq_length: int, offset: int = 0) -> tuple[torch.Tensor, ...]:
    """Return the embedding of all positions, [seq_length, 1, 1, d], and a factor of YaRN's."""
    if hasattr(rotary, "get_emb"):
        whole = rotary.get_emb(seq_length, offset)
    else:  # up to 0.12: of packed sequences nothing is cut, and "packed" changes nothing else
        whole = type(rotary).forward(rotary, seq_length, offset, True)
    return whole if isinstance(whole, tuple) else (whole,)


def _at(rotary: Any, seq_length: int, offset: int, positions: np.ndarray) -> Any:
    """Return the embedding at some positions, as the module's ``forward`` returns it.

    Args:
        rotary: Megatron's module, plain or YaRN, which returns a factor beside the embedding.
        seq_length: tokens in a sequence.
        offset: added to each position.
        positions: int64 [1 or b, s].

    Returns:
        [s, 1 or b, 1, d].
    """
    embedding, *factor = whole_embedding(rotary, seq_length, offset)
    index = to_device(np.ascontiguousarray(positions.T), embedding.device)
    at = embedding[:, 0, 0][index][:, :, None]
    return (at, *factor) if factor else at
