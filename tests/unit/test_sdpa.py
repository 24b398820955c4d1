"""The sdpa backend against a dense softmax, and its promise to make no S x S mask."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from megatron_skyladder.attention import sdpa  # noqa: E402
from megatron_skyladder.attention.segments import Segments  # noqa: E402
from megatron_skyladder.ladder.fragments import dense_mask, fragment_cu_seqlens, rows_cu_seqlens  # noqa: E402

CPU = torch.device("cpu")
SCALE = 0.3


def dense_attention(query, key, value, mask):
    """Softmax over the visible keys, written out. query [Tq, H, D]; mask bool [Tq, Tk]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = torch.einsum("qhd,khd->hqk", query, key) * SCALE
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def random_qkv(num_queries, num_keys, heads=4, groups=2, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num_queries, heads, dim), (num_keys, groups, dim), (num_keys, groups, dim))
    return [
        torch.randn(shape, generator=generator, dtype=torch.double, requires_grad=True)
        for shape in shapes
    ]


def assert_same(outputs, qkv, expected):
    """Compare values and the gradients of q, k and v."""
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-12)
    direction = torch.randn_like(expected)
    got = torch.autograd.grad(outputs, qkv, direction)
    wanted = torch.autograd.grad(expected, qkv, direction)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("window", [1, 7, 32, 50, 96])
@pytest.mark.parametrize("ends", [[], [3, 4, 40, 90], [96]])
@pytest.mark.parametrize("sliding", [False, True])
def test_segments_match_the_dense_mask(window, ends, sliding):
    length = 96
    ends = np.array(ends, dtype=np.int32)
    mask = dense_mask(length, window_len=window, document_ends=ends, sliding=sliding)
    cut = length if sliding else window
    offsets = fragment_cu_seqlens(ends, seq_length=length, window_len=cut)
    segments = Segments(offsets, offsets, window if sliding else None, None, CPU)
    qkv = random_qkv(length, length)
    got = sdpa.attend_segments(*qkv, segments, SCALE)
    assert_same(got, qkv, dense_attention(*qkv, torch.from_numpy(mask)))


@pytest.mark.parametrize("window", [1, 5, 16, 33, 64])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grid_matches_the_dense_mask_in_every_row(window, groups):
    length, rows, heads, dim = 64, 3, 4, 8
    mask = torch.from_numpy(dense_mask(length, window_len=window))
    qkv = [
        tensor.view(length, rows, -1, dim)
        for tensor in random_qkv(length * rows, length * rows, heads, groups, dim)
    ]
    got = sdpa.attend_grid(*qkv, window, SCALE)
    expected = torch.stack(
        [dense_attention(*(tensor[:, row] for tensor in qkv), mask) for row in range(rows)], dim=1
    )
    assert_same(got, qkv, expected.flatten(2))


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 20)), min_size=1, max_size=9),
    sliding_window=st.one_of(st.none(), st.integers(1, 50)),
)
def test_queries_lie_at_the_end_of_their_keys(pieces, sliding_window):
    """Any lengths, with more keys than queries in some segments (keys of another rank)."""
    lengths_q = np.array([queries for queries, _ in pieces])
    lengths_k = np.array([queries + extra for queries, extra in pieces])
    offsets_q, offsets_k = (
        np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        for lengths in (lengths_q, lengths_k)
    )
    mask = torch.zeros(int(offsets_q[-1]), int(offsets_k[-1]), dtype=torch.bool)
    for index, (queries, extra) in enumerate(pieces):
        for query in range(queries):
            for key in range(extra + query + 1):
                if sliding_window is None or key > extra + query - sliding_window:
                    mask[offsets_q[index] + query, offsets_k[index] + key] = True
    segments = Segments(offsets_q, offsets_k, sliding_window, None, CPU)
    qkv = random_qkv(mask.shape[0], mask.shape[1])
    got = sdpa.attend_segments(*qkv, segments, SCALE)
    assert_same(got, qkv, dense_attention(*qkv, mask))


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("kind", ["grid", "documents", "sliding"])
def test_no_square_mask_is_made(kind):
    length = 4096
    qkv = [torch.randn(length, 2, 8, requires_grad=True) for _ in range(3)]
    with LargestTensor() as largest:
        if kind == "grid":
            out = sdpa.attend_grid(*(x.unsqueeze(1) for x in qkv), length, SCALE)
        else:
            ends = np.array([100, 3000], dtype=np.int32)
            offsets = fragment_cu_seqlens(ends, seq_length=length, window_len=length)
            window = 1500 if kind == "sliding" else None
            segments = Segments(offsets, offsets, window, None, CPU)
            out = sdpa.attend_segments(*qkv, segments, SCALE)
        out.sum().backward()
    assert (
        largest.elements < length * length / 2
    )  # bytes: an eighth of a square of booleans in fp32


def test_bucketing_pads_by_at_most_a_quarter():
    lengths = np.arange(1, 5000)
    padded = sdpa._bucket_lengths(lengths)
    assert (padded >= lengths).all()
    assert (padded[15:] <= 1.25 * lengths[15:]).all()
    assert len(np.unique(padded)) < 40


def test_rows_follow_one_another():
    rows = [np.array([0, 3, 8], np.int32), np.array([0, 8], np.int32)]
    np.testing.assert_array_equal(rows_cu_seqlens(rows), [0, 3, 8, 16])


def test_more_windows_than_a_call_takes_are_several_calls(monkeypatch):
    """Kernels on a GPU take a batch of 65,535; windows of 2 tokens in 128K are one more."""
    qkv = [x[:, None] for x in random_qkv(38, 38)]
    expected = sdpa.attend_grid(*qkv, 4, SCALE)
    batches = []
    original = sdpa.scaled_dot_product_attention

    def attend(query, *args, **kwargs):
        batches.append(query.shape[0])
        return original(query, *args, **kwargs)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(sdpa, "_LARGEST_BATCH", 4)
    assert_same(sdpa.attend_grid(*qkv, 4, SCALE), qkv, expected)
    assert batches == [4, 4, 1, 1]  # nine windows, and a shorter last one
