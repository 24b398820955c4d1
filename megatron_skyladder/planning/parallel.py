"""What context parallelism costs at each window, balance and traffic: counted for ``plan``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_skyladder.ladder.exchange_costs import (
    OUR_PASSES,
    RankCosts,
    gathered_tokens,
    kept_tokens,
    key_value_bytes,
    rank_costs,
)
from megatron_skyladder.ladder.fragments import fragment_cu_seqlens
from megatron_skyladder.ladder.sequence_layout import Kind, LayoutRule


class PlannedRun(Protocol):
    """What is asked of a plan here; see `estimate.Plan`."""

    @property
    def config(self) -> Any: ...

    @property
    def shape(self) -> Any: ...

    @property
    def context_parallel_size(self) -> int: ...

    @property
    def tensor_parallel_size(self) -> int: ...

    @property
    def total_steps(self) -> int: ...

    @property
    def counts_documents(self) -> bool: ...

    @property
    def documents(self) -> Any: ...

    @property
    def longest_window(self) -> int: ...

    def window(self, step: int, /) -> int: ...

    def local_window(self, step: int, /) -> int | None: ...


SAMPLE_TOKENS = 1 << 19  # of measured documents; counting looks at every token
SAMPLE_STEPS = 48  # of a run, for its mean
NUM_BYTES = 2  # bf16


@dataclass(frozen=True)
class ParallelCosts:
    """Costs of one window, per sequence; where layers differ, the mean over those with attention.

    Args:
        work: attention work of each rank, in pairs.
        waiting_share: of the attention work, what sees a key of another rank and waits for it.
        received_bytes: keys and values that a rank receives in one layer, and gradients that come
            back, on average over the ranks; None where the model is not known.
        gather_share: the same relative to gathering all keys.
    """

    work: tuple[float, ...]
    waiting_share: float
    received_bytes: float | None
    gather_share: float

    @property
    def max_over_mean(self) -> float:
        """The busiest rank's work relative to the mean, 1.0 where all have the same."""
        return max(self.work) * len(self.work) / sum(self.work)


def layout_kind(plan: PlannedRun) -> Kind:
    """Return what decides who holds what in training: documents too where they are masked."""
    if plan.config.context_parallel_layout == "zigzag":
        return Kind.ZIGZAG
    return Kind.SEQUENCE if plan.counts_documents else Kind.WINDOW


def parallel_costs(
    plan: PlannedRun, window: int, local_window: int | None = None, *, kind: Kind | None = None
) -> ParallelCosts:
    """Return the costs of a window under the plan's masks.

    Args:
        plan: the run.
        window: tokens.
        local_window: what a query of a local layer sees at most; None: all of its own window.
        kind: of layout; None: the plan's.
    """
    cu_seqlens = _offsets(plan, window)
    length, cp_size = plan.config.seq_length, plan.context_parallel_size
    num_rows = int(cu_seqlens[-1]) // length
    sliding = plan.config.mask == "sliding"
    rule = LayoutRule(kind or layout_kind(plan), length, cp_size, window, sliding)
    layouts = rule.layouts(num_rows, cu_seqlens)
    at_most, local = window if sliding else None, plan.config.local_layers
    costs: RankCosts = rank_costs(cu_seqlens, layouts, sliding_window=at_most)
    pairs, waiting, received = costs.pairs, costs.waiting_pairs.sum(), costs.received.mean()
    own = 0 if local is None else local.window if local_window is None else local_window
    if local is not None and own < window:
        of_local: RankCosts = rank_costs(cu_seqlens, layouts, sliding_window=own)
        pairs = local.mean(pairs, of_local.pairs)
        waiting = local.mean(waiting, of_local.waiting_pairs.sum())
        received = local.mean(received, of_local.received.mean())
    tokens = float(received) / num_rows
    size = None if plan.shape is None else OUR_PASSES * _key_value_bytes(plan, tokens)
    return ParallelCosts(
        work=tuple(float(each) / num_rows for each in pairs),
        waiting_share=float(waiting / pairs.sum()),
        received_bytes=size,
        gather_share=tokens / gathered_tokens(cp_size, length),
    )


def kept_bytes(plan: PlannedRun) -> float | None:
    """Return what keys and values of other ranks take until the backward pass.

    For one sequence in all layers, at the run's longest window, on the rank that keeps most; ends
    of documents are not counted, so with documents masked it is an upper bound. Pipeline stages
    change nothing on the first one, which has a stage's layers and as many micro-batches under way
    as there are stages.

    Returns:
        Bytes; None where the model is not known.
    """
    if plan.shape is None:
        return None
    config, local = plan.config, plan.config.local_layers
    window, sliding = plan.longest_window, config.mask == "sliding"
    kind = Kind.ZIGZAG if layout_kind(plan) is Kind.ZIGZAG else Kind.WINDOW
    rule = LayoutRule(kind, config.seq_length, plan.context_parallel_size, window, sliding)
    tokens: float = kept_tokens(rule)
    if local is not None and local.window < window:
        tokens = local.mean(tokens, kept_tokens(rule, local.window))
    return plan.shape.attention_layers * _key_value_bytes(plan, tokens)


def _key_value_bytes(plan: PlannedRun, tokens: float) -> float:
    """Return the size of tokens' keys and values in a layer, on one tensor-parallel rank."""
    groups = max(1, plan.shape.num_query_groups // plan.tensor_parallel_size)
    return key_value_bytes(
        tokens, num_groups=groups, head_dim=plan.shape.head_size, num_bytes=NUM_BYTES
    )


@dataclass(frozen=True)
class BusiestRank:
    """Attention work of the busiest rank and of the mean one, at steps along a run.

    Args:
        steps: int, [num_samples], ascending.
        busiest: pairs of a sequence, [num_samples].
        mean: the same of the mean rank.
    """

    steps: np.ndarray
    busiest: np.ndarray
    mean: np.ndarray

    @property
    def over_mean(self) -> float:
        """The busiest rank's work over the mean one's, of the whole run."""
        return float(self.busiest.sum() / self.mean.sum())

    def over_mean_at(self, step: int) -> float:
        """Return the same at a step, interpolated."""
        return float(np.interp(step, self.steps, self.busiest / self.mean))


def busiest_rank(plan: PlannedRun) -> BusiestRank:
    """Return how unequal the ranks' work is over the run."""
    parts = np.arange(SAMPLE_STEPS) + 0.5  # the middles of equal parts of the run
    steps = np.unique((parts * plan.total_steps / SAMPLE_STEPS).astype(int))
    windows = [(plan.window(step), plan.local_window(step)) for step in steps.tolist()]
    works = {each: parallel_costs(plan, *each).work for each in set(windows)}
    busiest = np.array([max(works[each]) for each in windows])
    return BusiestRank(steps, busiest, np.array([np.mean(works[each]) for each in windows]))


def _offsets(plan: PlannedRun, window: int) -> np.ndarray:
    """Return cu_seqlens over one sequence, or over a sample of the measured ones."""
    length = plan.config.seq_length
    cut = length if plan.config.mask == "sliding" else window
    if not plan.counts_documents:
        return fragment_cu_seqlens(np.empty(0, np.int32), seq_length=length, window_len=cut)
    assert plan.documents is not None
    rows = plan.documents.rows
    num_tokens = min(rows.num_rows, max(1, SAMPLE_TOKENS // length)) * length
    document_ends = np.cumsum(rows.ends - rows.starts)
    grid = (np.arange(0, num_tokens, length)[:, None] + np.arange(0, length, cut)).ravel()
    return np.union1d(np.append(grid, num_tokens), document_ends[document_ends < num_tokens])
