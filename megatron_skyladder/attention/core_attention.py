"""The core-attention module that takes the place of Megatron's, in every layer spec.

Megatron hands a core attention ``[s, b, h, d]`` tensors and whatever stands in ``attention_mask``,
through activation recompute too. The mask is made of two things: the window, which is constant over
a step and looked up from the clock, and the documents, which change with the micro-batch and
therefore travel in ``attention_mask`` (int32 cu_seqlens on the host, see `segments`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_skyladder.attention import context_parallel, limits
from megatron_skyladder.attention.backends import from_thd, make_backend, to_thd
from megatron_skyladder.attention.backends.choose import has_sink
from megatron_skyladder.attention.segments import (
    MaskCache,
    ParallelSegments,
    Part,
    Rows,
    Segments,
    grid_segments,
)
from megatron_skyladder.attention.statistics import LayerStatistics, recording
from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.local_layers import layer_settings, own_window

_NO_SINK = -1e4  # a logit whose exponential is 0
_masks = MaskCache()


def forget_masks() -> None:
    """Drop what is cached for masks that travelled."""
    _masks.clear()


class SkyLadderAttention(MegatronModule):
    """Causal attention within the current window, and within documents where a mask says so.

    A local layer (`ladder.local_layers`) keeps its own sliding window within them, which may have a
    ladder of its own (`ladder.local_ladder`).

    Shapes: s tokens of a sequence on this context-parallel rank, b sequences of the micro-batch, h
    query heads and g key/value heads of this tensor-parallel rank, d head size of queries and keys,
    c of values: the same but under multi-latent attention, which says so by ``k_channels`` and
    ``v_channels``.

    The arguments are those with which Megatron builds any core attention.

    Raises:
        UsageError: the model asks for something that windows cannot be combined with.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **backend_arguments: Any,
    ) -> None:
        super().__init__(config=config)
        _check_model(config, attn_mask_type, attention_type, attention_dropout)
        key_size = backend_arguments.get("k_channels") or config.kv_channels
        self.head_sizes = key_size, backend_arguments.get("v_channels") or key_size
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(key_size)
        self.layer_number = layer_number
        self.own_window = own_window(*layer_settings(config), layer_number)
        self._clock = clock.current()
        self._cp_group = context_parallel_group(config, pg_collection)
        self.backend = make_backend(
            self._clock.config.attention_backend,
            config=config,
            scale=self.softmax_scale,
            slides=self._clock.config.mask == "sliding" or self.own_window is not None,
            layer_number=layer_number,
            attention_dropout=attention_dropout,
            softmax_scale=softmax_scale,
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
            **backend_arguments,
        )
        self.sink_is_off = False  # the probe asks for keys alone
        if has_sink(config):
            self._add_sink(config, pg_collection)
        interval = self._clock.config.attention_stats_interval
        self._statistics = (
            LayerStatistics(layer_number, interval, self.softmax_scale, self._clock.iteration)
            if interval
            else None
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        /,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [s, b, h, d]; key: [s, b, g, d]; value: [s, b, g, c].
            attention_mask: None where only the window cuts the sequences; else int32 [N + 1] on the
                host: cu_seqlens of the fragments over all whole sequences, one after the other,
                on every context-parallel rank.

        Returns:
            [s, b, h * c].

        Raises:
            ValueError: the mask is not one of ours, or the call is one of inference.
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise ValueError(
                "SkyLadder attention got packed sequences or an attention bias. Switch off "
                "Megatron's own packing (--sft, --dataloader-inter-document-masking) and use "
                "--skyladder-intra-document to keep documents apart."
            )
        if key.shape[0] != query.shape[0]:
            raise ValueError(
                f"SkyLadder attention got {query.shape[0]} queries for {key.shape[0]} keys. It "
                "trains and evaluates whole sequences; for generation build the model without it."
            )
        segments = self._segments(query, attention_mask)
        backend, record = self.backend, None
        if self._statistics is not None and self.training:
            record = self._statistics.recorder(query.device)
        if isinstance(segments, ParallelSegments):
            tokens = to_thd(query), to_thd(key), to_thd(value)
            measured = backend if record is None else recording(backend, record)
            out = context_parallel.attend(measured, *tokens, segments, self._cp_group)
            return from_thd(out, query.shape[1])
        if record is not None:
            record(to_thd(query), to_thd(key), segments)
        if segments.grid == query.shape[0]:
            return backend.attend_full(query, key, value, segments)
        if segments.grid is not None:
            return backend.attend_windows(query, key, value, segments)
        out = backend(to_thd(query), to_thd(key), to_thd(value), segments)
        return from_thd(out, query.shape[1])

    def leave_statistics(self) -> None:
        """Measure nothing here: the layer's number is also that of another."""
        self._statistics = None

    def _add_sink(self, config: TransformerConfig, pg_collection: Any) -> None:
        """Give each head of this rank one more logit, by Megatron's names.

        As Megatron's own attention does, but for one thing: the parameter is marked as shared out
        over tensor-parallel ranks, or the norm of the gradients would count the first rank's alone.
        """
        self.tp_group = getattr(pg_collection, "tp", None)
        if self.tp_group is None:
            self.tp_group = parallel_state.get_tensor_model_parallel_group()
        num_heads = config.num_attention_heads // self.tp_group.size()
        device, dtype = torch.cuda.current_device(), config.params_dtype
        self.softmax_offset: torch.Tensor | None = None
        if config.softmax_type == "learnable":
            empty = torch.empty(num_heads, device=device, dtype=dtype)
            self.softmax_offset = torch.nn.Parameter(empty)
            if config.perform_initialization:
                config.init_method(self.softmax_offset)
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

        def sink() -> torch.Tensor:
            if self.softmax_offset is None or self.sink_is_off:
                logit = _NO_SINK if self.sink_is_off else 0.0
                return torch.full((num_heads,), logit, device=device, dtype=torch.float32)
            return self.softmax_offset

        self.backend.use_sink(sink)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return it as Megatron's own attention does, whose name and cut the sinks have."""
        if getattr(self, "softmax_offset", None) is None:
            return super().sharded_state_dict(*args, **kwargs)
        return DotProductAttention.sharded_state_dict(self, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # a checkpoint of Megatron's own attention may hold Transformer Engine's (empty) FP8 state
        state_dict.pop(f"{prefix}_extra_state", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _segments(
        self, query: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> Segments | ParallelSegments:
        cp_size, cp_rank = 1, 0
        if self._cp_group is not None:
            cp_size, cp_rank = self._cp_group.size(), self._cp_group.rank()
        seq_length = query.shape[0] * cp_size
        window_len = min(self._clock.window(training=self.training), seq_length)
        own_window = self._own_window_now()
        hides = own_window is not None and own_window < window_len
        rows = Rows(
            seq_length=seq_length,
            num_rows=query.shape[1],
            window_len=window_len,
            sliding=self._clock.config.mask == "sliding",
            device=query.device,
            cp_size=cp_size,
            cp_rank=cp_rank,
            layout=self._clock.layout_rule(seq_length, cp_size, training=self.training),
            own_window=own_window if hides else None,
        )
        if attention_mask is None:
            return grid_segments(rows)
        _check_mask(attention_mask, seq_length * rows.num_rows)
        carries_both = self._clock.config.recurrent_state == "documents"
        return _masks.get(attention_mask, rows, Part.FRAGMENTS if carries_both else Part.WHOLE)

    def _own_window_now(self) -> int | None:
        """Return what a query of this layer sees at most, by its model and its own ladder."""
        if self.own_window is None:
            return None
        ladder = self._clock.local_window(training=self.training)
        return self.own_window if ladder is None else min(self.own_window, ladder)


def context_parallel_group(config: TransformerConfig, pg_collection: Any) -> Any:
    """Return the group over which sequences are shared out, or None where they are whole.

    Args:
        config: of the model.
        pg_collection: the groups it was built with; None: those of the process.
    """
    if config.context_parallel_size == 1:
        return None
    if pg_collection is None:
        try:
            from megatron.core.process_groups_config import ProcessGroupCollection
        except ImportError:  # up to 0.14
            from megatron.core import parallel_state

            return parallel_state.get_context_parallel_group()
        return ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"]).cp
    return pg_collection.cp


def _check_mask(mask: torch.Tensor, num_tokens: int) -> None:
    """Reject any other mask than ours: Megatron's dense one must not be taken for cu_seqlens."""
    if mask.dtype != torch.int32 or mask.dim() != 1 or mask.device.type != "cpu":
        raise ValueError(
            f"SkyLadder attention got a mask of shape {tuple(mask.shape)}, {mask.dtype} on "
            f"{mask.device}; it takes int32 cu_seqlens on the host, or None. Give "
            "--no-create-attention-mask-in-dataloader, and leave --reset-attention-mask out."
        )
    if mask[-1] != num_tokens:
        raise ValueError(
            f"the document mask ends at {int(mask[-1])} tokens, but the micro-batch has "
            f"{num_tokens}. The mask belongs to another micro-batch."
        )


def _check_model(
    config: TransformerConfig,
    attn_mask_type: AttnMaskType,
    attention_type: str,
    attention_dropout: float | None,
) -> None:
    if attention_type != "self" or attn_mask_type not in (
        AttnMaskType.causal,
        AttnMaskType.padding_causal,
    ):
        raise UsageError(
            f"SkyLadder attention is causal self-attention; this layer asks for {attention_type} "
            f"attention with a {attn_mask_type.name} mask."
        )
    limits.check_model(config, attention_dropout)
