"""What a run costs: parameters, floating-point operations and time, as functions of the window.

Arithmetic on a handful of numbers; no Megatron, no GPU. Attention work is counted in visible
(query, key) pairs, the unit of `fragments`, so that window and document masks go through one door.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction

from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.fragments import window_pairs
from megatron_skyladder.ladder.presets import ModelShape

# Peak dense bf16 TFLOP/s of one GPU, from the vendors' data sheets.
DEVICES = {
    "a100-40g": 312.0,
    "a100-80g": 312.0,
    "h100": 989.0,  # SXM
    "h100-pcie": 756.0,
    "h200": 989.0,
    "gh200": 989.0,
    "b200": 2250.0,
    "l40s": 362.0,
    "mi300x": 1307.0,
}

# Seconds that one FLOP of attention takes, relative to one of the matrix products, by Megatron's
# count of both. FlashAttention's backward repeats one of six products (7/6), and attention kernels
# run below the rate of matrix products. The paper measured two runs (Table 8: 1B, A100-40G):
# the first value here gives both savings best, the other two give one of them exactly (at 32K and
# at 8K). docs/planning.md has the numbers.
ATTENTION_COST = 1.354
ATTENTION_COST_RANGE = (1.138, 1.626)


@dataclass(frozen=True)
class DecoderShape:
    """A dense GPT as Megatron builds it, all layers alike. Sizes in elements.

    Args:
        vocab_size: rows of the embedding, padding included; see `padded_vocab_size`.
        gated_mlp: whether the MLP has a gate (SwiGLU), hence two input matrices.
        linear_bias: whether all linear layers have a bias.
        qkv_bias: whether the query, key and value projection has one, even without linear_bias.
        norm_bias: True for LayerNorm, False for RMSNorm.
        qk_norm: whether queries and keys are normalised, each over kv_channels.
        tied_embeddings: whether the output layer reuses the word embedding.
        learned_positions: rows of a learned position embedding; 0 for RoPE or none.
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
    def num_parameters(self) -> int:
        """All parameters, embeddings and vocabulary padding included."""
        embeddings = 1 if self.tied_embeddings else 2
        return (
            self.num_layers * self._layer_parameters
            + self._norm_parameters
            + embeddings * self.vocab_size * self.hidden_size
            + self.learned_positions * self.hidden_size
        )

    @property
    def matmul_parameters(self) -> int:
        """Weights that each token is multiplied with: the layers' matrices and the output layer."""
        return self.num_layers * self._layer_weights + self.vocab_size * self.hidden_size

    @property
    def _qkv_size(self) -> int:
        return self.query_size + 2 * self.num_query_groups * self.kv_channels

    @property
    def _ffn_inputs(self) -> int:
        return self.ffn_hidden_size * (2 if self.gated_mlp else 1)

    @property
    def _norm_parameters(self) -> int:
        return self.hidden_size * (2 if self.norm_bias else 1)

    @property
    def _layer_weights(self) -> int:
        attention = self._qkv_size + self.query_size
        return self.hidden_size * (attention + self._ffn_inputs + self.ffn_hidden_size)

    @property
    def _layer_parameters(self) -> int:
        biases = 0
        if self.linear_bias or self.qkv_bias:
            biases += self._qkv_size
        if self.linear_bias:
            biases += self._ffn_inputs + 2 * self.hidden_size
        if self.qk_norm:
            biases += 2 * self.kv_channels * (2 if self.norm_bias else 1)
        return self._layer_weights + 2 * self._norm_parameters + biases


def padded_vocab_size(vocab_size: int, *, divisible_by: int, tensor_parallel: int) -> int:
    """Return the rows of Megatron's embedding: the vocabulary up to a multiple of both."""
    multiple = divisible_by * tensor_parallel
    return -(-vocab_size // multiple) * multiple


# --- attention work -----------------------------------------------------------------------------


def window_runs(config: SkyLadderConfig, total_steps: int) -> list[tuple[int, int, int]]:
    """Return runs of equal windows, ``(first_step, end_step, window)``, counted from sample 0.

    A schedule that begins later (--skyladder-begin-samples) holds its first window until then.
    """
    begin = min(total_steps, -(-config.begin_samples // config.step_samples))
    runs = [
        (first + begin, end + begin, window)
        for first, end, window in config.schedule.segments(total_steps - begin)
    ]
    if begin:
        held = config.window_at_samples(0)
        runs.insert(0, (0, begin, held))
        if len(runs) > 1 and runs[1][2] == held:
            runs[:2] = [(0, runs[1][1], held)]
    return runs


def grid_pairs(config: SkyLadderConfig) -> Callable[[int], int]:
    """Return window -> visible pairs of a row, documents left aside."""
    sliding = config.mask == "sliding"
    return lambda window: window_pairs(window, config.seq_length, sliding=sliding)


def mean_pairs(
    runs: Iterable[tuple[int, int, int]], pairs: Callable[[int], float]
) -> Fraction | float:
    """Return the visible pairs of a row, averaged over the steps of a run."""
    total: Fraction | float = Fraction(0)
    steps = 0
    for first, end, window in runs:
        total += (end - first) * pairs(window)
        steps += end - first
    return total / steps


# --- floating-point operations ------------------------------------------------------------------


def flops(shape: DecoderShape, *, seq_length: int, pairs: Fraction | float, tokens: int) -> float:
    """Return FLOPs of forward and backward by the paper's count (its Table 8).

    (6 N + 12 layers hidden S) tokens, with N all parameters and S the mean of sum(l**2) / L over
    the windows l of a row: the full square of each window, though causal kernels do half of it.
    In pairs, l**2 is 2 * pairs - l.
    """
    context = (2 * pairs - seq_length) / seq_length
    attention = 12 * shape.num_layers * shape.query_size * context
    return float((6 * shape.num_parameters + attention) * tokens)


def megatron_flops(
    shape: DecoderShape, *, seq_length: int, pairs: Fraction | float, tokens: int
) -> tuple[float, float]:
    """Return (matrix products, attention) as Megatron's log counts them: the causal half only."""
    context = (2 * pairs - seq_length) / seq_length
    attention = 6 * shape.num_layers * shape.query_size * context
    return float(6 * shape.matmul_parameters * tokens), float(attention * tokens)


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
) -> StepTime:
    """Return the time of a step from the achieved rate.

    Args:
        seq_length: tokens in a row.
        batch_tokens: tokens in a global batch.
        flops_per_second: of all GPUs together, in a run with the full window, by Megatron's count
            (GPUs times the "throughput per GPU" in its log).
        attention_cost: see ATTENTION_COST.
    """
    pairs = window_pairs(seq_length, seq_length)
    products, attention = megatron_flops(
        shape, seq_length=seq_length, pairs=pairs, tokens=batch_tokens
    )
    seconds = (products + attention) / flops_per_second
    share = attention_cost * attention / (products + attention_cost * attention)
    return StepTime(fixed=seconds * (1 - share), attention=seconds * share)
