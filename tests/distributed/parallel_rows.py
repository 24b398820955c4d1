"""What each rank runs for test_context_parallel_runs.py: random rows against dense rows.

Every rank makes the same random rows and computes both the dense answer for whole rows and its own
part through `SkyLadderAttention`, so the only messages are those under test.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from megatron_skyladder.attention.core_attention import SkyLadderAttention
from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.exchange_costs import rank_costs
from megatron_skyladder.ladder.fragments import dense_mask, fragment_cu_seqlens, rows_cu_seqlens
from megatron_skyladder.ladder.schedules import WindowSchedule
from megatron_skyladder.ladder.sequence_layout import Kind, LayoutRule, zigzag

HEAD_DIM = 4


@dataclass(frozen=True)
class Case:
    """Rows of one micro-batch and their mask.

    Args:
        seq_length: tokens of a sequence.
        window_len: tokens.
        ends: of each row's documents, exclusive; None: documents are not masked.
        num_rows: rows.
        heads: of queries, and of keys and values.
        sliding: whether the window slides.
        kind: what decides which tokens a rank holds.
        value_dim: size of a head of values; of queries and keys it is ``HEAD_DIM``.
        own_window: tokens that a query of a local layer sees at most; None: of a global layer.
    """

    seq_length: int
    window_len: int
    ends: tuple[tuple[int, ...], ...] | None
    num_rows: int = 1
    heads: tuple[int, int] = (2, 1)
    sliding: bool = False
    kind: Kind = Kind.ZIGZAG
    value_dim: int = HEAD_DIM
    own_window: int | None = None

    @property
    def cut(self) -> int:
        return self.seq_length if self.sliding else self.window_len

    def cu_seqlens(self) -> np.ndarray:
        """Offsets over all whole rows."""
        return rows_cu_seqlens(
            [
                fragment_cu_seqlens(
                    np.array(ends, np.int32), seq_length=self.seq_length, window_len=self.cut
                )
                for ends in self.ends or ((),) * self.num_rows
            ]
        )

    def own_part(self, rows: torch.Tensor, group: Any) -> torch.Tensor:
        """Return a rank's tokens of whole rows, [S, rows, ...]."""
        rule = LayoutRule(self.kind, self.seq_length, group.size(), self.window_len, self.sliding)
        layouts = rule.layouts(self.num_rows, None if self.ends is None else self.cu_seqlens())
        held = [torch.from_numpy(layout.positions(group.rank())) for layout in layouts]
        return torch.stack([rows[own, row] for row, own in enumerate(held)], dim=1)

    def dense(self) -> torch.Tensor:
        """bool [rows, S, S], True where visible."""
        masks = [
            dense_mask(
                self.seq_length,
                window_len=self.window_len,
                document_ends=np.array(ends, int),
                sliding=self.sliding,
                own_window=self.own_window,
            )
            for ends in self.ends or ((),) * self.num_rows
        ]
        return torch.from_numpy(np.stack(masks))

    def tensors(self, seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Whole rows of query, key, value and the output's gradient, [S, rows, heads, D]."""
        generator = torch.Generator().manual_seed(seed)
        num_heads, num_groups = self.heads
        shapes = (
            (num_heads, HEAD_DIM),
            (num_groups, HEAD_DIM),
            (num_groups, self.value_dim),
            (num_heads, self.value_dim),
        )
        return [
            torch.randn(self.seq_length, self.num_rows, *shape, generator=generator, dtype=dtype)
            for shape in shapes
        ]


def random_case(generator: np.random.Generator, cp_size: int) -> Case:
    seq_length = 2 * cp_size * int(generator.integers(1, 9))
    num_rows = int(generator.integers(1, 4))
    ends = None
    if generator.random() < 0.6:
        ends = tuple(
            tuple(
                np.unique(generator.integers(1, seq_length + 1, generator.integers(0, 7))).tolist()
            )
            for _ in range(num_rows)
        )
    heads = [(4, 4), (4, 2), (2, 1), (3, 1)][generator.integers(4)]
    window_len = int(generator.integers(1, seq_length + 1))
    sliding = bool(generator.random() < 0.4)
    kind = list(Kind)[generator.integers(3)]
    value_dim = [HEAD_DIM, 3, 6][generator.integers(3)]  # as in multi-latent attention, and wider
    own_window = int(generator.integers(1, window_len + 2)) if generator.random() < 0.4 else None
    return Case(seq_length, window_len, ends, num_rows, heads, sliding, kind, value_dim, own_window)


def attend_densely(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """[S, rows, heads, D] of a softmax over the visible keys."""
    per_group = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(per_group, 2) for x in (key, value))
    logits = torch.einsum("qbhd,kbhd->bhqk", query, key) / HEAD_DIM**0.5
    weights = logits.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", weights, value)


def with_gradients(function: Any, inputs: list[torch.Tensor], direction: torch.Tensor) -> list:
    """Return the output and the gradients of the inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs).view(direction.shape)
    out.backward(direction)
    return [out.detach(), *(x.grad for x in inputs)]


@contextlib.contextmanager
def attention_module(case: Case, group: Any) -> Iterator[SkyLadderAttention]:
    """The core attention of one rank of a group, under the case's window."""
    config = SkyLadderConfig(
        schedule=WindowSchedule(schedule="constant", final_window=case.window_len),
        seq_length=case.seq_length,
        step_samples=1,
        mask="sliding" if case.sliding else "local",
        attention_backend="sdpa",
    )
    clock.install(config, lambda: 0).layout_kind = case.kind
    num_heads, num_groups = case.heads
    transformer = TransformerConfig(
        num_layers=1,
        hidden_size=num_heads * HEAD_DIM,
        num_attention_heads=num_heads,
        num_query_groups=num_groups,
        attention_dropout=0.0,
        context_parallel_size=group.size(),
        window_size=None if case.own_window is None else (case.own_window - 1, 0),
    )
    yield SkyLadderAttention(
        transformer,
        2,
        AttnMaskType.causal,
        "self",
        pg_collection=SimpleNamespace(cp=group),
        k_channels=HEAD_DIM,
        v_channels=case.value_dim,
    )
    clock.uninstall()


def compare(case: Case, group: Any, seed: int) -> None:
    """Compare a rank's outputs and gradients with those of whole rows, to rounding of float64."""
    *qkv, direction = case.tensors(seed, torch.float64)
    expected = with_gradients(lambda *x: attend_densely(*x, case.dense()), qkv, direction)  # type: ignore[call-arg]
    mask = None if case.ends is None else torch.from_numpy(case.cu_seqlens())
    own = [case.own_part(x, group) for x in (*qkv, direction)]
    with attention_module(case, group) as attention:

        def forward(*x: torch.Tensor) -> torch.Tensor:
            return attention(*x, mask)

        found = with_gradients(forward, own[:3], own[3])
        if seed % 3 == 0:  # forward twice, the second time inside the backward pass
            recomputed = with_gradients(
                lambda *x: checkpoint(forward, *x, use_reentrant=True), own[:3], own[3]
            )
            for a, b in zip(recomputed, found, strict=True):
                assert torch.equal(a, b), case
        with torch.no_grad():
            assert torch.equal(forward(*own[:3]).view_as(found[0]), found[0]), case
    for name, got, whole in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        torch.testing.assert_close(
            got,
            case.own_part(whole, group),
            rtol=1e-10,
            atol=1e-12,
            msg=lambda text, name=name: f"{name} of {case}, seed {seed}: {text}",
        )


@contextlib.contextmanager
def gloo() -> Iterator[None]:
    torch.distributed.init_process_group("gloo")
    yield
    torch.distributed.barrier()  # rank 0 keeps the store that the others still need
    torch.distributed.destroy_process_group()


def random_rows(num_cases: int) -> None:
    """Compare random rows in groups of several sizes and starts; ends, or hangs."""
    layouts = [[(0, 1, 2, 3)], [(0, 1), (2, 3)], [(0, 2), (1, 3)], [(1, 2, 3)]]
    with gloo():
        rank = torch.distributed.get_rank()
        for layout in layouts:
            groups = {ranks: torch.distributed.new_group(ranks) for ranks in layout}  # type: ignore[attr-defined]
            for ranks, group in groups.items():
                if rank in ranks:
                    generator = np.random.default_rng(ranks)  # each group its own rows
                    for seed in range(num_cases):
                        compare(random_case(generator, len(ranks)), group, seed)


class _Recorder:
    """Notes the order of messages and attention calls of this rank."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.received: list[int] = []
        original = torch.distributed.all_to_all_single

        def all_to_all_single(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            assert kwargs["async_op"]
            self.calls.append("send")
            self.received.append(output.shape[0])
            work = original(output, *args, **kwargs)
            return SimpleNamespace(wait=lambda: (self.calls.append("wait"), work.wait()))  # type: ignore[func-returns-value]

        torch.distributed.all_to_all_single = all_to_all_single

    def wrap(self, backend: torch.nn.Module, names: list[str]) -> None:
        """Note this backend's calls under these names, and when their backward pass begins."""
        attend, remaining = backend.forward, iter(names)

        def recorded(*args: Any) -> torch.Tensor:
            name = next(remaining)
            self.calls.append(name)
            out = attend(*args)
            out.register_hook(lambda _: self.calls.append(f"{name} backward"))
            return out

        backend.forward = recorded


class _NoLookAtTheDevice(TorchFunctionMode):
    """Fails where a tensor's value is asked for: on a GPU the host would wait for it."""

    NAMES = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__index__")
    FORBIDDEN = frozenset(getattr(torch.Tensor, name) for name in NAMES)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        assert func not in self.FORBIDDEN, f"{func.__name__} waits for the device"
        return func(*args, **(kwargs or {}))


def order_of_calls() -> None:
    """Messages are under way before own work begins, forward and backward, and are counted."""
    both = "send own wait joined", "joined backward send own backward wait"
    only_own = "send own wait", "send own backward wait"
    only_joined = "send wait joined", "joined backward send wait"
    full = [both, only_joined, only_joined, only_joined]
    expected = {  # by layout and window, then by rank; chunks are of 8 tokens
        (Kind.ZIGZAG, 8): [("", "")] * 4,  # windows end with chunks: no message
        (Kind.ZIGZAG, 12): [both, both, only_joined, only_own],  # they start at 0, 12, 24, ...
        (Kind.ZIGZAG, 64): full,
        (Kind.WINDOW, 8): [("", "")] * 4,
        (Kind.WINDOW, 16): [("", "")] * 4,  # each rank has one whole window
        (Kind.WINDOW, 64): full,
    }
    with gloo():
        group = torch.distributed.group.WORLD
        for (kind, window), of_rank in expected.items():
            case = Case(64, window, None, kind=kind)
            forward, backward = of_rank[group.rank()]
            recorder = _Recorder()
            *qkv, direction = (case.own_part(x, group) for x in case.tensors(0, torch.float32))
            with attention_module(case, group) as attention:
                names = [name for name in ("own", "joined") if name in forward.split()]
                recorder.wrap(attention.backend, names)
                with _NoLookAtTheDevice():
                    with_gradients(lambda *x, call=attention: call(*x, None), qkv, direction)
            assert " ".join(recorder.calls) == f"{forward} {backward}".strip(), window
            costs = rank_costs(case.cu_seqlens(), [zigzag(64, 4)] * case.num_rows)
            counted = [costs.received[group.rank()], costs.sent[group.rank()]]
            assert recorder.received == (counted if forward else []), window


def bfloat16(num_cases: int) -> None:
    """Errors against float64 are those of bfloat16 on whole rows, and of the roundings in messages.

    A rank that holds all of a row rounds a key's gradient once. Of four ranks each rounds its part,
    the owner rounds the sum of the three that it received and then that sum with its own part: six
    roundings, whose errors are independent.
    """
    with gloo():
        group = torch.distributed.group.WORLD
        errors = {"whole": [], "parts": []}  # type: ignore[var-annotated]
        case = Case(64, 64, None, heads=(4, 2))
        dense = case.dense()
        for seed in range(num_cases):
            *qkv, direction = case.tensors(seed, torch.bfloat16)
            exact = with_gradients(
                lambda *x: attend_densely(*x, dense),  # type: ignore[call-arg]
                [x.double() for x in qkv],
                direction.double(),  # type: ignore[call-arg]
            )
            with attention_module(case, group) as attention:
                parts = with_gradients(
                    lambda *x, call=attention: call(*x, None),
                    [case.own_part(x, group) for x in qkv],
                    case.own_part(direction, group),
                )
            alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
            with attention_module(case, alone) as attention:
                whole = with_gradients(
                    lambda *x, call=attention: call(*x, None), list(qkv), direction
                )
            exact = [case.own_part(x, group) for x in exact]
            whole = [case.own_part(x, group) for x in whole]
            for name, got in (("whole", whole), ("parts", parts)):
                errors[name].append(
                    [float((a - b).norm()) for a, b in zip(got, exact, strict=True)]
                )
        means = {name: np.mean(values, axis=0) for name, values in errors.items()}
        bounds = means["whole"] * np.sqrt([1, 1, 6, 6])  # of output, query, key and value
        assert (means["parts"] <= bounds).all(), means
