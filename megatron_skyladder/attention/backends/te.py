"""``te``: Megatron's TEDotProductAttention, as stock Megatron builds it."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch

from megatron_skyladder.attention.backends.base import Backend, require_arguments, window_size
from megatron_skyladder.attention.segments import Segments
from megatron_skyladder.ladder.local_layers import layer_settings, own_window

# TE's names; Megatron's enumeration lacks the second, and only the name is looked at
_CAUSAL = SimpleNamespace(name="causal")
_PADDING_CAUSAL = SimpleNamespace(name="padding_causal")
_PADDING_CAUSAL_BOTTOM_RIGHT = SimpleNamespace(name="padding_causal_bottom_right")


class TransformerEngineBackend(Backend):
    """The full window is stock's own call, windows are its batch, all else is packed (thd).

    TE's own context parallelism stays off: keys have been fetched before it is called. Modules are
    held in tuples, so that their (empty) FP8 state stays out of checkpoints and a run can go on
    with another backend. For the same reason their own sinks are taken away: each call is handed
    the one parameter that the layer has, for as many heads as the call has.

    Args:
        stock: builds a module from changes to stock's arguments.
        scale: factor on the logits.
        own_window: tokens that a query sees at most by the sliding window that stock's module has;
            None: it has none.
    """

    def __init__(self, stock: Any, scale: float, *, own_window: int | None = None) -> None:
        super().__init__(scale)
        self._build = stock
        self._own_window = own_window
        self._full = (stock(),)
        # or TE's PyTorch attention takes the queries' lengths for those of the keys
        self._packed = (stock(mask="padding_causal", attention_type="cross"),)
        # a module whose own window has to stay what it is serves the full window alone
        self._windows: dict[int, tuple[Any]] = {} if own_window else {1: self._full}

    @classmethod
    def build(cls, *, config: Any, scale: float, **stock_arguments: Any) -> Backend:
        """See `Backend`."""
        from megatron.core.extensions.transformer_engine import TEDotProductAttention
        from megatron.core.transformer.enums import AttnMaskType

        config = copy.copy(config)
        config.context_parallel_size = 1

        def stock(
            mask: str = "causal", attention_type: str = "self", num_sequences: int = 1
        ) -> torch.nn.Module:
            own = copy.copy(config)
            own.num_attention_heads *= num_sequences
            own.num_query_groups *= num_sequences
            return TEDotProductAttention(
                own,
                attn_mask_type=AttnMaskType[mask],
                attention_type=attention_type,
                **stock_arguments,
            )

        layer_number = stock_arguments["layer_number"]
        own = own_window(*layer_settings(config), layer_number)
        return cls(stock, scale, own_window=own)

    @classmethod
    def check_installed(cls) -> None:
        """See `Backend`."""
        import transformer_engine.pytorch  # noqa: F401

    @classmethod
    def check_sink(cls) -> None:
        """See `Backend`: from Transformer Engine 2.8 on."""
        from transformer_engine.pytorch import DotProductAttention

        require_arguments(DotProductAttention.__init__, "softmax_type")

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """See `Backend`."""
        from megatron.core.packed_seq_params import PackedSeqParams

        key, value = _starting_at_zero(key), _starting_at_zero(value)
        (attention,) = self._packed
        attention.window_size = window_size(segments)
        offsets_q, offsets_k = segments.padded_q_device, segments.padded_k_device
        same = offsets_k is offsets_q
        out = self._call(
            attention,
            query,
            key,
            value,
            attn_mask_type=_PADDING_CAUSAL if same else _PADDING_CAUSAL_BOTTOM_RIGHT,
            packed_seq_params=PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=offsets_q,
                cu_seqlens_kv=offsets_k,
                max_seqlen_q=segments.max_seqlen_q,
                max_seqlen_kv=segments.max_seqlen_k,
            ),
        )
        return out.view(*query.shape[:2], value.shape[-1])

    def attend_windows(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """See `Backend`: [S, b, h, d] -> [S / W, W, b * h, d]; a shorter last window is a call."""
        from megatron.core.packed_seq_params import PackedSeqParams

        assert segments.grid is not None
        num_tokens, num_sequences = query.shape[:2]
        if num_sequences not in self._windows:
            self._windows[num_sequences] = (self._build(num_sequences=num_sequences),)
        (attention,) = self._windows[num_sequences]
        whole = num_tokens - num_tokens % segments.grid
        outputs = []
        for start, stop in ((0, whole), (whole, num_tokens)):
            if start == stop:
                continue
            width = min(segments.grid, stop - start)
            attention.window_size = window_size(segments)
            batched = (
                _starting_at_zero(x[start:stop].flatten(1, 2)).unflatten(0, (-1, width))
                for x in (query, key, value)
            )
            out = self._call(
                attention,
                *batched,
                attn_mask_type=_CAUSAL,
                packed_seq_params=PackedSeqParams(qkv_format="bshd"),
            )
            outputs.append(out.reshape(stop - start, num_sequences, -1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def attend_full(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """See `Backend`; argument for argument what stock Megatron's layer calls.

        But where a local layer's own window is still growing: stock's module has all of it.
        """
        from megatron.core.transformer.enums import AttnMaskType

        if segments.sliding_window not in (None, self._own_window):
            return self.attend_windows(query, key, value, segments)
        (attention,) = self._full
        return self._call(attention, query, key, value, attn_mask_type=AttnMaskType.causal)

    def _call(
        self,
        attention: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **arguments: Any,
    ) -> torch.Tensor:
        sink = self.sink_of(query.shape[-2])
        if sink is None:
            return attention(query, key, value, None, **arguments)
        attention._parameters.pop("softmax_offset", None)  # its own, which nothing trains
        attention.softmax_offset = sink
        try:
            return attention(query, key, value, None, **arguments)
        finally:
            attention.softmax_offset = None  # or the graph behind it would live until the next call


def _starting_at_zero(tensor: torch.Tensor) -> torch.Tensor:
    """TE tells the layout from addresses and knows none in which contiguous keys begin later."""
    return tensor.clone() if tensor.storage_offset() and tensor.is_contiguous() else tensor
