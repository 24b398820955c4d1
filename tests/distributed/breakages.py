"""Bugs on purpose: a test that cannot see these is worth nothing."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch


def look_up_documents() -> None:
    """Let attention take the mask of the latest micro-batch, wherever it is asked from.

    Wrong as soon as a forward pass is recomputed after other micro-batches have been read.
    """
    from megatron_skyladder.attention import core_attention
    from megatron_skyladder.megatron_lm import batches

    get_batch, forward = batches.get_batch, core_attention.SkyLadderAttention.forward
    latest: Any = None

    def keeping_get_batch(*args: Any, **kwargs: Any) -> Any:
        nonlocal latest
        batch, latest = get_batch(*args, **kwargs)
        return batch, latest

    def looking_up(self: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        return forward(self, query, key, value, None if mask is None else latest, **kwargs)

    batches.get_batch = keeping_get_batch
    core_attention.SkyLadderAttention.forward = looking_up


def window_one_longer() -> None:
    """See W + 1 tokens, the classic."""
    from megatron_skyladder.ladder import clock

    window = clock.Clock.window

    def longer(self: Any, *, training: bool) -> int:
        return min(window(self, training=training) + 1, self.config.seq_length)

    clock.Clock.window = longer


def documents_end_before_eod() -> None:
    """Let a document end before its end-of-document token rather than after it."""
    from megatron_skyladder.ladder import fragments

    document_ends = fragments.document_ends

    def too_early(tokens: Any, eod: int) -> Any:
        ends = document_ends(tokens, eod)
        ends[:-1] -= 1
        return ends[ends > 0]

    fragments.document_ends = too_early


def mean_of_means() -> None:
    """Divide each context-parallel rank's loss by its own count, as Megatron does."""
    from megatron_skyladder.runtime import sequence_mean

    sequence_mean.with_mean_over_sequences = lambda forward_step: forward_step


def fail_between_steps() -> None:
    """Let a mistake of ours show on rank 1 alone, after a step and outside of ``forward_step``."""
    from megatron.training import training

    from megatron_skyladder.ladder.schedules import WindowSchedule

    train_step = training.train_step

    def failing(*args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        if os.environ["RANK"] == "1":
            WindowSchedule(alpha=1).window_at(-1)
        return result

    training.train_step = failing


def window_one_shorter() -> None:
    """See W - 1 tokens."""
    from megatron_skyladder.ladder import clock

    window = clock.Clock.window

    def shorter(self: Any, *, training: bool) -> int:
        found = window(self, training=training)
        return max(1, found - 1) if training else found

    clock.Clock.window = shorter


def schedule_one_shorter() -> None:
    """The same, one layer below: in the schedule that everything else asks."""
    from megatron_skyladder.ladder import schedules

    window_at = schedules.WindowSchedule.window_at
    schedules.WindowSchedule.window_at = lambda self, step: max(1, window_at(self, step) - 1)


def window_one_step_late() -> None:
    """Train each step with the window of the one before."""
    from megatron_skyladder.ladder import config

    window_at = config.SkyLadderConfig.window_at_samples
    config.SkyLadderConfig.window_at_samples = lambda self, samples: window_at(
        self, max(0, samples - self.step_samples)
    )


def window_stays() -> None:
    """Keep the window of the first look-up."""
    from megatron_skyladder.ladder import clock

    window = clock.Clock.window

    def kept(self: Any, *, training: bool) -> int:
        if not training:
            return window(self, training=False)
        if not hasattr(self, "kept"):
            self.kept = window(self, training=True)
        return self.kept

    clock.Clock.window = kept


def window_one_shorter_in_attention() -> None:
    """Cut the sequences one token earlier than the clock says: where the windows alone cut."""
    from megatron_skyladder.attention import core_attention

    grid_segments = core_attention.grid_segments
    core_attention.grid_segments = lambda rows: grid_segments(
        replace(rows, window_len=max(1, rows.window_len - 1))
    )


def own_window_one_longer() -> None:
    """Let local layers see one token more than Megatron's --window-size says."""
    from megatron_skyladder.attention import core_attention

    rows = core_attention.Rows

    def longer(*, own_window: int | None, **others: Any) -> Any:
        return rows(own_window=None if own_window is None else own_window + 1, **others)

    core_attention.Rows = longer


def second_ladder_ignored() -> None:
    """Let local layers see all of their own window from the start."""
    from megatron_skyladder.ladder import clock

    clock.Clock.local_window = lambda self, *, training: None


def second_ladder_one_step_late() -> None:
    """Give local layers the window of the step before."""
    from megatron_skyladder.attention import core_attention
    from megatron_skyladder.ladder import clock

    def late(self: Any) -> int | None:
        active = clock.current()
        samples = max(0, active._consumed_samples() - active.config.step_samples)
        return None if self.own_window is None else active.config.local_window_at_samples(samples)

    core_attention.SkyLadderAttention._own_window_now = late


def own_window_left_out_of_keys() -> None:
    """Keep segments by the mask and the ladder's window alone, whatever a layer's own window is."""
    from megatron_skyladder.attention import segments

    get = segments.MaskCache.get
    made: dict[Any, Any] = {}

    def kept(self: Any, mask: Any, rows: Any, part: Any) -> Any:
        key = mask.data_ptr(), mask._version, replace(rows, own_window=None)
        if key not in made or made[key][0] is not mask:
            made[key] = mask, get(self, mask, rows, part)
        return made[key][1]

    segments.MaskCache.get = kept


def on_hopper() -> None:
    """No bug, but another device: Transformer Engine is chosen for packed calls with sinks."""
    from megatron_skyladder.attention.backends import choose

    choose._capability = lambda: (9, 0)
    choose._te = lambda: choose.TransformerEngine((2, 20), (9, 26, 0))


def sinks_left_out() -> None:
    """Attend as if the softmax had no sink."""
    from megatron_skyladder.attention.backends import base

    with_sink = base.Backend.sink_of

    def without(self: Any, num_heads: int) -> Any:
        sink = with_sink(self, num_heads)
        return None if sink is None else sink * 0 - 1e4

    base.Backend.sink_of = without


def sliding_window_one_longer() -> None:
    """Take W for the keys before a query rather than for all that it sees."""
    from megatron_skyladder.attention import sdpa

    band_mask = sdpa._band_mask
    sdpa._band_mask = lambda queries, keys, window, device: band_mask(
        queries, keys, None if window is None else window + 1, device
    )


def not_causal() -> None:
    """Let queries see what comes after them."""
    from megatron_skyladder.attention import sdpa

    attention = sdpa.scaled_dot_product_attention

    def seeing_all(*args: Any, **kwargs: Any) -> Any:
        return attention(*args, **{**kwargs, "is_causal": False})

    sdpa.scaled_dot_product_attention = seeing_all


def evaluate_under_the_window() -> None:
    """Evaluate as training goes on, not on whole sequences."""
    from megatron_skyladder.ladder import clock

    window = clock.Clock.window
    clock.Clock.window = lambda self, *, training: window(self, training=True)


def evaluate_in_documents() -> None:
    """Mask documents in evaluation too."""
    from megatron_skyladder.megatron_lm import batches

    get_batch = batches.get_batch
    batches.get_batch = lambda iterator, *, training, **kwargs: get_batch(
        iterator, training=True, **kwargs
    )


def documents_never_found() -> None:
    """Take each sequence for one document."""
    from megatron_skyladder.ladder import fragments

    fragments.document_ends = lambda tokens, eod: np.array([len(tokens)], dtype=np.int32)


def documents_of_the_first_sequence() -> None:
    """Cut all sequences of a micro-batch where the first one's documents end."""
    from megatron_skyladder.runtime import document_mask

    offsets = document_mask.fragment_offsets

    def of_the_first(batch: Any, *args: Any) -> Any:
        tokens = batch["tokens"]
        return offsets({**batch, "tokens": tokens[:1].expand(tokens.shape)}, *args)

    document_mask.fragment_offsets = of_the_first


def documents_of_another_batch() -> None:
    """Mask each micro-batch with the documents of the sequences before it, shifted by one."""
    from megatron_skyladder.runtime import document_mask

    offsets = document_mask.fragment_offsets

    def of_another(batch: Any, *args: Any) -> Any:
        return offsets({**batch, "tokens": batch["tokens"].roll(1, dims=0)}, *args)

    document_mask.fragment_offsets = of_another


def another_kernel_on_rank_1() -> None:
    """Let rank 1 choose for packed calls what the other ranks have not."""
    from megatron_skyladder.attention.backends import choose

    usual = choose._choose

    def other(name: Any, call: Any, *args: Any) -> Any:
        found = usual(name, call, *args)
        if os.environ["RANK"] != "1" or call is not choose.Call.PACKED:
            return found
        return choose.Choice(call, "flash", "this node alone has it")

    choose._choose = other
    choose.BACKENDS["flash"] = choose.SdpaBackend  # which runs without a GPU


def second_chunk_reads_others() -> None:
    """Let the chunks of a stage begin with different sequences, where a rank reads any."""
    from megatron_skyladder.runtime import probe

    peek = probe._peek

    def other(data_iterator: Any) -> Any:
        batches, iterators = peek(data_iterator)
        if batches[-1] is not None:
            batches[-1] = {**batches[-1], "tokens": batches[-1]["tokens"].roll(1, dims=0)}
        return batches, iterators

    probe._peek = other


def rank_1_reads_others() -> None:
    """Let the sequences that rank 1 begins with have their documents' ends elsewhere."""
    from megatron_skyladder.runtime import probe

    peek = probe._peek

    def other(data_iterator: Any) -> Any:
        (batch,), iterators = peek(data_iterator)
        if os.environ["RANK"] == "1":
            assert batch is not None
            batch = {**batch, "tokens": batch["tokens"].roll(5, dims=1)}
        return [batch], iterators

    probe._peek = other


def sequences_run_together() -> None:
    """Let attention cross from one sequence of a micro-batch into the next."""
    from megatron_skyladder.ladder import fragments
    from megatron_skyladder.runtime import document_mask

    def joined(rows: Any) -> Any:
        ends = fragments_of(rows)
        return ends[(ends % rows[0][-1] != 0) | (ends == 0) | (ends == ends[-1])]

    fragments_of = fragments.rows_cu_seqlens
    document_mask.fragments.rows_cu_seqlens = joined


def mask_left_behind() -> None:
    """Make the document mask and hand the model none."""
    from megatron_skyladder.megatron_lm import batches

    get_batch = batches.get_batch
    batches.get_batch = lambda *args, **kwargs: (get_batch(*args, **kwargs)[0], None)


def other_tokens_than_masked() -> None:
    """Mask the documents of one micro-batch and train on another one."""
    from megatron_skyladder.megatron_lm import batches

    get_batch = batches.get_batch

    def shifted(*args: Any, **kwargs: Any) -> Any:
        batch, mask = get_batch(*args, **kwargs)
        if batch["tokens"] is not None:
            batch["tokens"] = batch["tokens"].roll(1, dims=1)
        return batch, mask

    batches.get_batch = shifted


def keys_sent_one_off() -> None:
    """Send other context-parallel ranks the keys one token before those that they need."""
    from megatron_skyladder.ladder import key_exchange

    sends = key_exchange._Holding.sends

    def one_off(self: Any, tails: Any) -> Any:
        return tuple(
            (max(0, start - 1), stop - min(1, start)) for start, stop in sends(self, tails)
        )

    key_exchange._Holding.sends = one_off


def first_fetched_key_wrong() -> None:
    """Spoil the first key that comes from another rank, and not its value."""
    from megatron_skyladder.attention import context_parallel

    wait = context_parallel._Exchange.wait

    def spoiling(self: Any) -> Any:
        incoming = wait(self)
        if not torch.is_grad_enabled():  # forward, or a forward pass without gradients
            incoming[:1, 0] = 0
        return incoming

    context_parallel._Exchange.wait = spoiling


def gradients_of_keys_dropped() -> None:
    """Leave out what other ranks' queries say about this rank's keys."""
    from megatron_skyladder.attention import context_parallel

    backward = context_parallel._Start.backward

    def dropping(ctx: Any, *grads: Any) -> Any:
        _, key, value = backward(ctx, *grads)
        return None, key * 0, value * 0  # type: ignore[operator]

    context_parallel._Start.backward = staticmethod(dropping)


def gradients_of_keys_alone_dropped() -> None:
    """The same for the keys, while their values get theirs."""
    from megatron_skyladder.attention import context_parallel

    backward = context_parallel._Start.backward

    def dropping(ctx: Any, *grads: Any) -> Any:
        _, key, value = backward(ctx, *grads)
        return None, key * 0, value  # type: ignore[operator]

    context_parallel._Start.backward = staticmethod(dropping)


def gradients_one_off() -> None:
    """Add what comes back to the key before the one that was sent."""
    from megatron_skyladder.attention import context_parallel

    backward = context_parallel._Start.backward

    def shifted(ctx: Any, *grads: Any) -> Any:
        _, key, value = backward(ctx, *grads)
        return None, key.roll(-1, dims=0), value.roll(-1, dims=0)

    context_parallel._Start.backward = staticmethod(shifted)


def attention_of_megatron() -> None:
    """Leave the core attention in the layer spec as it is."""
    from megatron_skyladder.megatron_lm import hooks

    hooks.with_skyladder = lambda spec: spec


def attention_of_megatron_in_a_layer() -> None:
    """Put Megatron's own core attention into the second layer of a model that is built."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.training import training

    setup = training.setup_model_and_optimizer

    def replacing(*args: Any, **kwargs: Any) -> Any:
        model, *others = setup(*args, **kwargs)
        for module in model[0].modules():
            if getattr(module, "layer_number", None) == 2 and hasattr(module, "core_attention"):
                stock = DotProductAttention(module.config, 2, AttnMaskType.causal, "self")
                module.core_attention = stock
        return model, *others

    training.setup_model_and_optimizer = replacing


def attention_of_megatron_on_rank_1() -> None:
    """Leave the core attention as it is in one pipeline stage."""
    if os.environ["RANK"] == "1":
        attention_of_megatron()


def weights_not_finite() -> None:
    """Let the first layer's first weight be NaN, as in a damaged checkpoint."""
    from megatron.training import training

    setup = training.setup_model_and_optimizer

    def damaging(*args: Any, **kwargs: Any) -> Any:
        model, *others = setup(*args, **kwargs)
        with torch.no_grad():
            for name, parameter in model[0].named_parameters():
                if "layers.0." in name:
                    parameter.view(-1)[0] = float("nan")
        return model, *others

    training.setup_model_and_optimizer = damaging


def hybrid_models_stay_stock() -> None:
    """Build HybridModel as if nobody had asked for windows."""
    from megatron_skyladder.megatron_lm import hooks

    hooks.HOOKS = tuple(hook for hook in hooks.HOOKS if not hook.of_hybrid_model)


def _move_cuts(by: int) -> None:
    """Let states start anew so many tokens later than they should."""
    from dataclasses import replace as copy_with

    from megatron_skyladder.attention import recurrent

    segments = recurrent.Cut.segments

    def moved(self: Any, kernel: str, first: Any) -> Any:
        found = segments(self, kernel, first)
        offsets = found.cu_seqlens_q.copy()
        offsets[1:-1] = np.clip(offsets[1:-1] + by, 0, offsets[-1])
        return copy_with(found, cu_seqlens_q=offsets, cu_seqlens_k=offsets)

    recurrent.Cut.segments = moved


def state_starts_late() -> None:
    """A fragment's first token sees the fragment before."""
    _move_cuts(1)


def state_starts_early() -> None:
    """A fragment sees the last token of the one before, which does not see its own."""
    _move_cuts(-1)


def state_runs_on() -> None:
    """Cut nothing within a sequence."""
    from megatron_skyladder.attention import recurrent, segments

    original = recurrent.Cut.segments

    def whole(self: Any, kernel: str, first: Any) -> Any:
        original(self, kernel, first)
        rows = segments.Rows(first.shape[1], len(first), first.shape[1], False, first.device)
        return segments.grid_segments(rows)

    recurrent.Cut.segments = whole


def state_starts_everywhere() -> None:
    """Let no token see another."""
    from megatron_skyladder.attention import recurrent, segments

    original = recurrent.Cut.segments

    def single(self: Any, kernel: str, first: Any) -> Any:
        original(self, kernel, first)
        return segments.grid_segments(
            segments.Rows(first.shape[1], len(first), 1, False, first.device)
        )

    recurrent.Cut.segments = single


def other_kernel() -> None:
    """Let gated delta net layers run a rule that nobody has hooked."""
    from megatron_skyladder.megatron_lm import hooks

    of_delta = hooks.STATES["G"]
    hooks.STATES["G"] = tuple(hook for hook in of_delta if hook.name != "chunk_gated_delta_rule")


def rotary_left_to_megatron() -> None:
    """Cut batches by the layout, and rotary embeddings as Megatron does."""
    from megatron_skyladder.attention import rotary

    rotary._at = lambda module, seq_length, offset, _: type(module).forward(
        module, seq_length, offset
    )


def rotary_kept_by_length() -> None:
    """Choose the positions of rotary embeddings where Megatron does, inside its cache."""
    from functools import lru_cache

    from megatron_skyladder.attention import rotary

    at = rotary._at
    latest: dict[str, Any] = {}

    @lru_cache
    def cached(module: Any, seq_length: int, offset: int) -> Any:
        return at(module, seq_length, offset, latest["positions"])

    def kept(module: Any, seq_length: int, offset: int, positions: Any) -> Any:
        latest["positions"] = positions
        return cached(module, seq_length, offset)

    rotary._at = kept


def keys_of_another_layout() -> None:
    """Exchange keys as if the window were one token shorter when sequences are shared out."""
    from megatron_skyladder.attention import core_attention

    grid_segments = core_attention.grid_segments

    def of_another(rows: Any) -> Any:
        layout = replace(rows.layout, window_len=max(1, rows.layout.window_len - 1))
        return grid_segments(replace(rows, layout=layout))

    core_attention.grid_segments = of_another


def batch_left_in_order() -> None:
    """Leave batches as the dataset has them, under a layout of one's own."""
    from megatron_skyladder.megatron_lm import batches

    batches.in_order = dict


def values_swapped_in_exchange() -> None:
    """Take the first channels of what other ranks send for values, and the last for keys."""
    from megatron_skyladder.attention import context_parallel

    def arrive(*args: Any) -> Any:
        received, out = apply(*args)
        return received.flip(-1), out

    apply = context_parallel._Arrive.apply
    context_parallel._Arrive = type("Swapped", (), {"apply": staticmethod(arrive)})


def heads_see_beyond_fragments() -> None:
    """Shift tokens of prediction heads as Megatron does, by the sequence alone."""
    from megatron_skyladder.attention import prediction_heads

    prediction_heads._Follower.begin = lambda *_: None


def own_window_ignored_in_windows() -> None:
    """Let the kernel for equal windows know no window within them; the whole sequence has another.

    Shows once the ladder's window is longer than a local layer's own.
    """
    from megatron_skyladder.attention.backends import sdpa

    stock = sdpa.SdpaBackend.attend_windows

    def ignoring(self: Any, query: Any, key: Any, value: Any, segments: Any) -> Any:
        if segments.grid < len(query):
            segments = replace(segments, sliding_window=None)
        return stock(self, query, key, value, segments)

    sdpa.SdpaBackend.attend_windows = ignoring


def own_window_ignored_in_documents() -> None:
    """The same where documents are masked: the call is a packed one."""
    from megatron_skyladder.attention.backends import sdpa

    stock = sdpa.SdpaBackend.forward

    def ignoring(self: Any, query: Any, key: Any, value: Any, segments: Any) -> Any:
        if segments.grid is None:
            segments = replace(segments, sliding_window=None)
        return stock(self, query, key, value, segments)

    sdpa.SdpaBackend.forward = ignoring


def windows_end_at_a_tile() -> None:
    """Let a kernel cut windows longer than 32 tokens at 32, but not whole sequences."""
    from megatron_skyladder.attention import sdpa

    stock = sdpa.attend_grid

    def cutting(query: Any, key: Any, value: Any, window_len: int, *args: Any) -> Any:
        window_len = window_len if window_len == len(query) else min(window_len, 32)
        return stock(query, key, value, window_len, *args)

    sdpa.attend_grid = cutting


def whole_sequences_without_gradients_of_keys() -> None:
    """Let the kernel for the full window drop a gradient; evaluation has none."""
    from megatron_skyladder.attention.backends import base

    stock = base.Backend.attend_full
    base.Backend.attend_full = lambda self, query, key, value, segments: stock(
        self, query, key.detach() + 0 * key, value, segments
    )


def whole_sequences_refused_in_training() -> None:
    """Have no backward kernel for the full window."""
    from megatron_skyladder.attention.backends import base

    stock = base.Backend.attend_full

    def refusing(self: Any, query: Any, key: Any, value: Any, segments: Any) -> Any:
        if query.requires_grad:
            raise NotImplementedError("no backward kernel for the full window")
        return stock(self, query, key, value, segments)

    base.Backend.attend_full = refusing


def documents_lost_in_the_full_window() -> None:
    """Take packed segments that nothing slides in and no grid cuts short for one sequence each."""
    from megatron_skyladder.attention import core_attention

    stock = core_attention.MaskCache.get

    def losing(self: Any, mask: Any, rows: Any, part: Any) -> Any:
        if rows.window_len < rows.seq_length:
            return stock(self, mask, rows, part)
        return core_attention.grid_segments(rows)

    core_attention.MaskCache.get = losing
