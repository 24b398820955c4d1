"""What a run costs: parameters, floating-point operations and time, as functions of the window.

Arithmetic on a handful of numbers; no Megatron, no GPU. Attention work is counted in visible
(query, key) pairs, the unit of `fragments`, so that window and document masks go through one door.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.fragments import visible_pairs, window_pairs
from megatron_skyladder.ladder.presets import ModelShape
from megatron_skyladder.ladder.schedules import WindowSchedule

# Seconds that one FLOP of attention takes, relative to one of the matrix products, by Megatron's
# count of both. FlashAttention's backward repeats one of six products (7/6), and attention kernels
# run below the rate of matrix products. The paper measured two runs (Table 8: 1B, A100-40G):
# the first value here gives both savings best, the other two give one of them exactly (at 32K and
# at 8K). docs/planning.md has the numbers.
ATTENTION_COST = 1.354
ATTENTION_COST_RANGE = (1.138, 1.626)


@dataclass(frozen=True)
class Experts:
    """The MLPs that are mixtures of experts. Sizes in elements.

    Args:
        num_layers: layers that have them in place of a dense MLP.
        num_experts: of a layer, shared ones aside.
        topk: experts that each token goes to.
        ffn_hidden_size: of one expert.
        shared_ffn_hidden_size: of the experts that see every token, together; 0: none.
        shared_gate: whether these have a gate of their own.
        linear_bias: whether experts have biases.
        router_bias: whether the router has one.
    """

    num_layers: int
    num_experts: int
    topk: int
    ffn_hidden_size: int
    shared_ffn_hidden_size: int = 0
    shared_gate: bool = False
    linear_bias: bool = False
    router_bias: bool = False


@dataclass(frozen=True)
class Mamba:
    """The Mamba-2 layers of a hybrid model. Sizes in elements.

    Args:
        num_layers: how many.
        num_heads, head_dim: their product is the inner width.
        num_groups, state_dim: of the state.
        conv_size: taps of the convolution.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    num_groups: int
    state_dim: int
    conv_size: int = 4

    @property
    def inner_size(self) -> int:
        """Width of the state's input."""
        return self.num_heads * self.head_dim

    def weights(self, hidden_size: int) -> int:
        """Return the elements of a layer's two matrices."""
        inputs = 2 * self.inner_size + 2 * self.num_groups * self.state_dim + self.num_heads
        return hidden_size * (inputs + self.inner_size)

    def parameters(self, hidden_size: int) -> int:
        """Return a layer's parameters, its input norm aside."""
        conv = (self.inner_size + 2 * self.num_groups * self.state_dim) * (self.conv_size + 1)
        return self.weights(hidden_size) + conv + 3 * self.num_heads + self.inner_size


@dataclass(frozen=True)
class Latent:
    """Multi-latent attention, in place of queries, keys and values of one size. In elements.

    Args:
        query_rank: of the queries' latent; 0: they are projected directly.
        key_value_rank: of the keys' and values' latent.
        head_size: of queries and keys, without positions.
        rotary_size: of their rotary part, of which all keys share one.
        value_size: of a head of values.
    """

    query_rank: int
    key_value_rank: int
    head_size: int
    rotary_size: int
    value_size: int

    def weights(self, hidden_size: int, num_heads: int) -> int:
        """Return the elements of a layer's matrices, that of the output included."""
        queries = num_heads * (self.head_size + self.rotary_size)
        total = queries * (self.query_rank or hidden_size) + hidden_size * self.query_rank
        total += hidden_size * (self.key_value_rank + self.rotary_size)
        total += self.key_value_rank * num_heads * (self.head_size + self.value_size)
        return total + num_heads * self.value_size * hidden_size

    @property
    def normed(self) -> int:
        """Elements that --qk-layernorm normalises."""
        return self.query_rank + self.key_value_rank


@dataclass(frozen=True)
class DecoderShape:
    """A decoder as Megatron builds it. Sizes in elements.

    Args:
        num_layers: layers with attention; of a GPT, all.
        vocab_size: rows of the embedding, padding included; see `padded_vocab_size`.
        gated_mlp: whether the MLP has a gate (SwiGLU), hence two input matrices.
        linear_bias: whether all linear layers have a bias.
        qkv_bias: whether the query, key and value projection has one, even without linear_bias.
        norm_bias: True for LayerNorm, False for RMSNorm.
        qk_norm: whether queries and keys are normalised, each over kv_channels.
        tied_embeddings: whether the output layer reuses the word embedding.
        learned_positions: rows of a learned position embedding; 0 for RoPE or none.
        output_gate: whether attention's result has a gate, as wide as the queries.
        num_mlp_layers: layers with a dense MLP; None: every layer that has no experts.
        experts: the layers that have a mixture of experts, or None.
        mamba: the layers that have a state in place of attention, or None.
        latent: multi-latent attention, or None.
        prediction_heads: of multi-token prediction; each has a layer like the last one.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    gated_mlp: bool = True
    linear_bias: bool = False
    qkv_bias: bool = False
    norm_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    learned_positions: int = 0
    output_gate: bool = False
    num_mlp_layers: int | None = None
    experts: Experts | None = None
    mamba: Mamba | None = None
    latent: Latent | None = None
    prediction_heads: int = 0

    @classmethod
    def of_paper(cls, model: ModelShape) -> DecoderShape:
        """Return one of the paper's models: RMSNorm, SwiGLU, no bias, untied, RoPE."""
        return cls(
            model.num_layers,
            model.hidden_size,
            model.ffn_hidden_size,
            model.num_attention_heads,
            model.num_query_groups,
            model.hidden_size // model.num_attention_heads,
            model.vocab_size,
        )

    @property
    def query_size(self) -> int:
        """Width of all queries of a layer together."""
        return self.num_attention_heads * self.kv_channels

    @property
    def head_size(self) -> float:
        """Size of a head, the mean of keys and values."""
        if self.latent is None:
            return self.kv_channels
        return (self.latent.head_size + self.latent.rotary_size + self.latent.value_size) / 2

    @property
    def core_size(self) -> float:
        """Work of a (query, key) pair in all layers: elements of their heads, as `head_size`."""
        return self.attention_layers * self.num_attention_heads * self.head_size

    @property
    def num_parameters(self) -> int:
        """All parameters, embeddings and vocabulary padding included: what memory has to hold."""
        return self._parameters(active=False)

    @property
    def active_parameters(self) -> int:
        """The parameters that a token meets: of the experts, those it goes to."""
        return self._parameters(active=True)

    @property
    def matmul_parameters(self) -> int:
        """Weights that each token is multiplied with: the layers' matrices and the output layer.

        Of a mixture of experts, those that the token goes to; Megatron does not count the router.
        """
        attention = self._attention_weights + (self.latent.normed if self.latent else 0)
        layers = self.attention_layers * attention + self._mlp_layers * self._mlp_weights
        layers += self.prediction_heads * self.hidden_size * (2 * self.hidden_size + 3)
        if self.experts:
            layers += self.experts.num_layers * self._expert_weights(self.experts.topk)
        if self.mamba:
            layers += self.mamba.num_layers * self.mamba.weights(self.hidden_size)
        return layers + (1 + self.prediction_heads) * self.vocab_size * self.hidden_size

    @property
    def attention_layers(self) -> int:
        """Layers with attention, those of prediction heads included."""
        return self.num_layers + self.prediction_heads

    @property
    def _mlp_layers(self) -> int:
        if self.num_mlp_layers is not None:
            return self.num_mlp_layers
        return self.attention_layers - (self.experts.num_layers if self.experts else 0)

    @property
    def _qkv_size(self) -> int:
        gate = self.query_size if self.output_gate else 0
        return self.query_size + gate + 2 * self.num_query_groups * self.kv_channels

    @property
    def _norm_parameters(self) -> int:
        return self.hidden_size * (2 if self.norm_bias else 1)

    @property
    def _attention_weights(self) -> int:
        if self.latent:
            return self.latent.weights(self.hidden_size, self.num_attention_heads)
        return self.hidden_size * (self._qkv_size + self.query_size)

    @property
    def _mlp_weights(self) -> int:
        return self._mlp_matrices(self.ffn_hidden_size)

    def _ffn_inputs(self, ffn_hidden_size: int) -> int:
        return ffn_hidden_size * (2 if self.gated_mlp else 1)

    def _mlp_matrices(self, ffn_hidden_size: int) -> int:
        return self.hidden_size * (self._ffn_inputs(ffn_hidden_size) + ffn_hidden_size)

    def _mlp_biases(self, ffn_hidden_size: int) -> int:
        return self._ffn_inputs(ffn_hidden_size) + self.hidden_size

    def _expert_weights(self, num_experts: int) -> int:
        """Return the matrices of a layer's shared experts and so many others."""
        assert self.experts is not None
        routed = num_experts * self._mlp_matrices(self.experts.ffn_hidden_size)
        return routed + self._mlp_matrices(self.experts.shared_ffn_hidden_size)

    def _parameters(self, *, active: bool) -> int:
        embeddings = 1 if self.tied_embeddings else 2
        total = (
            self.attention_layers * self._attention_parameters
            + self._mlp_layers * self._mlp_parameters
            + self._norm_parameters
            + embeddings * self.vocab_size * self.hidden_size
            + self.learned_positions * self.hidden_size
            + self.prediction_heads * (2 * self.hidden_size**2 + 3 * self._norm_parameters)
        )
        if self.experts:
            num_experts = self.experts.topk if active else self.experts.num_experts
            total += self.experts.num_layers * self._expert_parameters(num_experts)
        if self.mamba:
            layer = self.mamba.parameters(self.hidden_size) + self._norm_parameters
            total += self.mamba.num_layers * layer
        return total

    @property
    def _attention_parameters(self) -> int:
        biases = 0
        if (self.linear_bias or self.qkv_bias) and not self.latent:
            biases += self._qkv_size
        if self.linear_bias:
            biases += self.hidden_size
        if self.qk_norm:
            normed = self.latent.normed if self.latent else 2 * self.kv_channels
            biases += normed * (2 if self.norm_bias else 1)
        return self._attention_weights + self._norm_parameters + biases

    @property
    def _mlp_parameters(self) -> int:
        biases = self._mlp_biases(self.ffn_hidden_size) if self.linear_bias else 0
        return self._mlp_weights + self._norm_parameters + biases

    def _expert_parameters(self, num_experts: int) -> int:
        assert self.experts is not None
        experts = self.experts
        router = (self.hidden_size + experts.router_bias) * experts.num_experts
        gate = self.hidden_size if experts.shared_gate else 0
        biases = 0
        if experts.linear_bias:
            biases += num_experts * self._mlp_biases(experts.ffn_hidden_size)
            if experts.shared_ffn_hidden_size:
                biases += self._mlp_biases(experts.shared_ffn_hidden_size)
        weights = self._expert_weights(num_experts) + router + gate
        return weights + self._norm_parameters + biases


def padded_vocab_size(vocab_size: int, *, divisible_by: int, tensor_parallel: int) -> int:
    """Return the rows of Megatron's embedding: the vocabulary up to a multiple of both."""
    multiple = divisible_by * tensor_parallel
    return -(-vocab_size // multiple) * multiple


# --- attention work -----------------------------------------------------------------------------


def window_runs(config: SkyLadderConfig, total_steps: int) -> list[tuple[int, int, int]]:
    """Return runs of equal windows, ``(first_step, end_step, window)``, counted from sample 0.

    A schedule that begins later (--skyladder-begin-samples) holds its first window until then.
    """
    return _runs_of(config.schedule, config, total_steps)


def _runs_of(
    schedule: WindowSchedule, config: SkyLadderConfig, total_steps: int
) -> list[tuple[int, int, int]]:
    begin = min(total_steps, config.begin_steps)
    runs = schedule.segments(total_steps - begin)
    if begin:
        held = schedule.window_at(0)
        later = [(first + begin, end + begin, window) for first, end, window in runs]
        runs = [(0, begin, held), *later]
        if later and later[0][2] == held:
            runs[:2] = [(0, later[0][1], held)]
    return runs


def layer_runs(config: SkyLadderConfig, total_steps: int) -> list[tuple[int, ...]]:
    """Return runs of steps in which all layers keep their windows, counted from sample 0.

    Returns:
        What `window_runs` does; where local layers have a ladder of their own (`local_ladder`),
        ``(first_step, end_step, window, local_window)``: what a query of theirs sees at most.
    """
    runs = window_runs(config, total_steps)
    if config.local_schedule is None:
        return list(runs)
    own = _runs_of(config.local_schedule, config, total_steps)
    firsts = np.union1d([first for first, _, _ in runs], [first for first, _, _ in own])
    columns = []
    for each in (runs, own):
        starts, _, windows = (np.array(column) for column in zip(*each, strict=True))
        columns.append(windows[np.searchsorted(starts, firsts, side="right") - 1])
    both = (firsts, np.append(firsts[1:], total_steps), columns[0], np.minimum(*columns))
    return list(zip(*(column.tolist() for column in both), strict=True))


def grid_pairs(config: SkyLadderConfig) -> Callable[..., Any]:
    """Return (window, local window) -> visible pairs of a sequence without documents.

    Where layers differ in what they see, the mean over those with attention. Takes arrays as well.
    Without the second number, or where it is None, local layers see all of their own window.
    """
    length, sliding, local = config.seq_length, config.mask == "sliding", config.local_layers

    def pairs(window: Any, local_window: Any = None) -> Any:
        of_global = window_pairs(window, length, sliding=sliding)
        if local is None:
            return of_global
        own = local.window if local_window is None else local_window
        return local.mean(of_global, window_pairs(window, length, sliding=sliding, own_window=own))

    return pairs


def masked_pairs(
    config: SkyLadderConfig, cu_seqlens: np.ndarray, window: int, local_window: int | None = None
) -> float:
    """Return the visible pairs of sequences whose documents are masked; the mean over layers.

    Args:
        config: the run's.
        cu_seqlens: int [num_fragments + 1], over all sequences.
        window: tokens.
        local_window: what a query of a local layer sees at most; None: all of its own window.
    """
    at_most = window if config.mask == "sliding" else None
    of_global, local = visible_pairs(cu_seqlens, window_len=at_most), config.local_layers
    if local is None:
        return of_global
    own = local.window if local_window is None else local_window
    at_most = own if at_most is None else min(at_most, own)
    mean: float = local.mean(of_global, visible_pairs(cu_seqlens, window_len=at_most))
    return mean


def mean_pairs(
    runs: Sequence[tuple[int, ...]], pairs: Callable[..., np.ndarray]
) -> Fraction | float:
    """Return the visible pairs of a sequence, averaged over the steps of a run.

    Args:
        runs: ``(first_step, end_step, window)``, or with what local layers see: `layer_runs`.
        pairs: windows (and those of local layers), int64 [num_runs] -> pairs of a sequence,
            integers or floats [num_runs].
    """
    firsts, ends, *windows = zip(*runs, strict=True)
    steps: list[int] = list(map(operator.sub, ends, firsts))
    of_windows = pairs(*(np.array(column, dtype=np.int64) for column in windows))
    # integers of any size, so that the sum is exact
    total: int | float = sum(map(operator.mul, steps, of_windows.tolist()))
    return (Fraction(total) if isinstance(total, int) else total) / sum(steps)


# --- floating-point operations ------------------------------------------------------------------


def flops(shape: DecoderShape, *, seq_length: int, pairs: Fraction | float, tokens: int) -> float:
    """Return FLOPs of forward and backward by the paper's count (its Table 8).

    (6 N + 12 layers hidden S) tokens, with N all parameters (of a mixture of experts, those that a
    token meets) and S the mean of sum(l**2) / L over the windows l of a sequence: the full
    square of each window, though causal kernels do half of it. In pairs, l**2 is 2 * pairs - l.
    """
    context = (2 * pairs - seq_length) / seq_length
    attention = 12 * shape.core_size * context
    return float((6 * shape.active_parameters + attention) * tokens)


def megatron_flops(
    shape: DecoderShape, *, seq_length: int, pairs: Fraction | float, tokens: int
) -> tuple[float, float]:
    """Return (matrix products, attention) as Megatron's log counts them: the causal half only."""
    context = (2 * pairs - seq_length) / seq_length
    attention = 6 * shape.core_size * context
    products = 6 * shape.matmul_parameters
    if shape.mamba:  # the scan, three times 7 operations for each element of the state
        products += 21 * shape.mamba.num_layers * shape.mamba.inner_size * shape.mamba.state_dim
    return float(products * tokens), float(attention * tokens)


# --- time ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: a part that no window changes, and attention.

    Args:
        fixed: matrix products, optimizer, communication.
        attention: attention under the full causal mask; a window takes its share of it.
    """

    fixed: float
    attention: float

    def seconds(self, attention_fraction: float) -> float:
        """Return the time of a step whose attention work is this share of full causal."""
        return self.fixed + self.attention * attention_fraction

    def saved(self, attention_fraction: float, baseline: float = 1.0) -> float:
        """Return the share of the time that is saved against the baseline's attention work."""
        return 1 - self.seconds(attention_fraction) / self.seconds(baseline)


def step_time(
    shape: DecoderShape,
    *,
    seq_length: int,
    batch_tokens: int,
    flops_per_second: float,
    attention_cost: float = ATTENTION_COST,
    product_speedup: float = 1.0,
) -> StepTime:
    """Return the time of a step from the achieved rate.

    Args:
        seq_length: tokens of a sequence.
        batch_tokens: tokens in a global batch.
        flops_per_second: of all GPUs together, in a run with the full window, by Megatron's count
            (GPUs times the "throughput per GPU" in its log).
        attention_cost: see ATTENTION_COST.
        product_speedup: how much faster the matrix products run than those of attention, by peak:
            2 where they run in FP8 and attention in 16 bits.
    """
    pairs = window_pairs(seq_length, seq_length)
    products, attention = megatron_flops(
        shape, seq_length=seq_length, pairs=pairs, tokens=batch_tokens
    )
    seconds = (products + attention) / flops_per_second
    attention *= attention_cost * product_speedup
    share = attention / (products + attention)
    return StepTime(fixed=seconds * (1 - share), attention=seconds * share)
