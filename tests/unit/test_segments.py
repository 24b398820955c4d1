"""Segments: device offsets, and the cache that must never hand out another mask's."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from megatron_skyladder.attention import segments as segments_module  # noqa: E402
from megatron_skyladder.attention.segments import (  # noqa: E402
    MaskCache,
    ParallelSegments,
    Part,
    Rows,
    Segments,
    grid_segments,
)
from megatron_skyladder.ladder.fragments import fragment_cu_seqlens  # noqa: E402

CPU = torch.device("cpu")


def rows_of(window_len, seq_length, num_rows, *, sliding=False, **parallel):
    return Rows(seq_length, num_rows, window_len, sliding, CPU, **parallel)


ROWS = rows_of(8, 8, 1)


def segments_of(offsets):
    offsets = np.array(offsets, dtype=np.int32)
    return Segments(offsets, offsets, None, None, CPU)


@pytest.mark.parametrize(
    ("num_segments", "padded"), [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (1000, 1024)]
)
def test_the_number_of_segments_is_padded_to_few_sizes(num_segments, padded):
    offsets = segments_of(range(num_segments + 1)).padded_q_device
    assert offsets.dtype == torch.int32
    assert offsets.tolist() == [*range(num_segments + 1)] + [num_segments] * (padded - num_segments)


def test_equal_offsets_are_one_tensor():
    segments = segments_of([0, 4, 9])
    assert segments.cu_seqlens_k_device is segments.cu_seqlens_q_device
    assert segments.padded_k_device is segments.padded_q_device
    assert segments.cu_seqlens_q_device.tolist() == [0, 4, 9]  # a count that is not padded


def test_keys_have_offsets_of_their_own():
    """Three queries see 3 of 203 keys, after two that see 200: lengths of 200 are two tiles."""
    queries, keys = (np.array(each, np.int32) for each in ([0, 2, 5], [0, 200, 203]))
    segments = Segments(queries, keys, None, None, CPU)
    assert segments.cu_seqlens_k_device.tolist() == [0, 200, 203]
    assert segments.padded_k_device.tolist() == [0, 200] + [203] * 15
    assert (segments.max_seqlen_q, segments.max_seqlen_k) == (128, 256)
    assert segments.ids_device.tolist() == [0, 0, 1, 1, 1]


def test_kernels_get_offsets_in_int32():
    """They read the memory as such, whatever lies there."""
    grid = grid_segments(rows_of(4, 10, 3))
    one = grid.of_one_sequence(10)
    for offsets in (one.cu_seqlens_q_device, one.padded_q_device, grid.ids_device):
        assert offsets.dtype == torch.int32


def test_grid_segments_of_two_rows():
    segments = grid_segments(rows_of(4, 10, 2))
    assert segments.cu_seqlens_q.tolist() == [0, 4, 8, 10, 14, 18, 20]
    assert (segments.max_seqlen_q, segments.grid, segments.sliding_window) == (128, 4, None)


def test_a_sliding_row_is_one_segment():
    segments = grid_segments(rows_of(4, 10, 2, sliding=True))
    assert segments.cu_seqlens_q.tolist() == [0, 10, 20]
    assert (segments.max_seqlen_q, segments.grid, segments.sliding_window) == (128, None, 4)


def test_a_sliding_window_of_the_whole_row_is_the_grid():
    segments = grid_segments(rows_of(10, 10, 1, sliding=True))
    assert (segments.grid, segments.sliding_window) == (10, None)


def test_masks_never_mix_even_when_memory_is_reused():
    cache = MaskCache()
    generator = np.random.default_rng(0)
    for _ in range(2000):  # freed masks leave their addresses to later ones
        size = int(generator.integers(1, 6))
        offsets = np.cumsum(np.r_[0, generator.integers(1, 9, size)]).astype(np.int32)
        mask = torch.from_numpy(offsets.copy())
        for _ in range(2):  # made, then looked up
            got = cache.get(mask, ROWS)
            np.testing.assert_array_equal(got.cu_seqlens_q, offsets)


def test_a_mask_changed_in_place_is_another_mask():
    cache = MaskCache()
    mask = torch.tensor([0, 4, 8], dtype=torch.int32)
    before = cache.get(mask, ROWS)
    assert before.lengths_q.tolist() == [4, 4]  # kept from here on, as what lies on a device is
    mask[1] = 3
    assert cache.get(mask, ROWS).lengths_q.tolist() == [3, 5]


def test_the_same_mask_is_made_once_through_detach():
    """Activation recompute hands on a detached copy of the tensor."""
    cache = MaskCache()
    mask = torch.tensor([0, 4, 8], dtype=torch.int32)
    first = cache.get(mask, ROWS)
    assert cache.get(mask.detach(), ROWS) is first


def test_the_same_mask_under_another_window_is_not_mixed_up():
    cache = MaskCache()
    mask = torch.tensor([0, 4, 8], dtype=torch.int32)
    one, other = cache.get(mask, ROWS), cache.get(mask, rows_of(4, 8, 1, sliding=True))
    assert (one.sliding_window, other.sliding_window) == (None, 4)


def test_a_context_parallel_rank_gets_its_part_of_the_grid():
    """Windows of 2 end with the chunks of 4: equal windows, nothing to fetch."""
    for rank in (0, 1):
        segments = grid_segments(rows_of(2, 16, 2, cp_size=2, cp_rank=rank))
        assert segments.cu_seqlens_q.tolist() == list(range(0, 17, 2))
        assert segments.cu_seqlens_k is segments.cu_seqlens_q
        assert (segments.grid, segments.max_seqlen_q, segments.max_seqlen_k) == (2, 128, 128)


def test_windows_that_end_with_the_chunks_but_are_no_grid_there():
    """Documents end with the chunks: nothing to fetch, but the fragments differ."""
    mask = torch.tensor([0, 4, 6, 8, 12, 16], dtype=torch.int32)
    segments = MaskCache().get(mask, rows_of(16, 16, 1, cp_size=2, cp_rank=1))
    assert segments.cu_seqlens_q.tolist() == [0, 2, 4, 8]
    assert segments.grid is None


def test_a_context_parallel_rank_that_needs_keys_of_others():
    """Windows of 6 in rows of 16; rank 1 holds 4..11: queries 4, 5 see 0..5 (see the plan)."""
    segments = grid_segments(rows_of(6, 16, 1, cp_size=2, cp_rank=1))
    assert isinstance(segments, ParallelSegments)
    assert segments.own.cu_seqlens_q.tolist() == [0, 6]
    assert segments.joined.cu_seqlens_q.tolist() == [0, 2]
    assert segments.joined.cu_seqlens_k.tolist() == [0, 6]
    assert (segments.joined.max_seqlen_q, segments.joined.max_seqlen_k) == (128, 128)
    other = grid_segments(rows_of(6, 16, 1, cp_size=2, cp_rank=0))
    assert isinstance(other, ParallelSegments)
    assert other.joined is None


@pytest.mark.parametrize(
    ("lengths", "tiles"), [((1,), 1), ((128,), 1), ((129, 3), 2), ((5, 0, 1000), 8)]
)
def test_the_longest_length_is_the_true_one_in_whole_tiles(lengths, tiles):
    segments = segments_of(np.cumsum((0, *lengths)))
    assert (segments.max_seqlen_q, segments.max_seqlen_k) == (128 * tiles, 128 * tiles)


@pytest.mark.parametrize("rank", range(4))
def test_equal_offsets_have_equal_maxima_on_every_rank(rank):
    """Transformer Engine drops FlashAttention where offsets are equal and maxima are not."""
    ends = np.array([300, 310, 900], np.int32)
    row = fragment_cu_seqlens(ends, seq_length=2048, window_len=700)
    segments = MaskCache().get(
        torch.from_numpy(row), rows_of(700, 2048, 1, cp_size=4, cp_rank=rank)
    )
    calls = (segments.own, segments.joined)
    equal = [x for x in calls if x and np.array_equal(x.cu_seqlens_q, x.cu_seqlens_k)]
    assert equal
    assert all(x.max_seqlen_q == x.max_seqlen_k for x in equal)


def test_one_sequence_of_a_grid():
    segments = grid_segments(rows_of(4, 10, 3)).of_one_sequence(10)
    assert segments.cu_seqlens_q.tolist() == [0, 4, 8, 10]
    assert segments.cu_seqlens_k is segments.cu_seqlens_q


def test_a_mask_that_carries_both_is_split_once(monkeypatch):
    """Every layer asks; finding where documents begin looks at the whole mask."""
    splits = []
    original = segments_module.split_mask
    monkeypatch.setattr(
        segments_module, "split_mask", lambda mask: splits.append(mask) or original(mask)
    )
    mask = torch.tensor([0, 4, 6, 8, 12, 0, 6, 12], dtype=torch.int32)
    cache, rows = MaskCache(), rows_of(4, 12, 1)
    for _ in range(3):
        fragments = cache.get(mask, rows, Part.FRAGMENTS)
        documents = cache.get(mask, rows, Part.DOCUMENTS)
        assert fragments.cu_seqlens_q.tolist() == [0, 4, 6, 8, 12]
        assert documents.cu_seqlens_q.tolist() == [0, 6, 12]
    assert len(splits) == 2
    assert cache.get(mask[:5], rows).cu_seqlens_q.tolist() == [0, 4, 6, 8, 12]


def test_a_mask_of_fragments_alone_stands_for_both():
    mask = torch.tensor([0, 4, 8, 12], dtype=torch.int32)
    cache, rows = MaskCache(), rows_of(4, 12, 1)
    for part in Part:
        assert cache.get(mask, rows, part).cu_seqlens_q.tolist() == [0, 4, 8, 12]


def test_the_oldest_masks_are_forgotten_first():
    cache = MaskCache()
    masks = [torch.tensor([0, end, 800], dtype=torch.int32) for end in range(1, 601)]
    made = [cache.get(mask, rows_of(800, 800, 1)) for mask in masks]
    kept = segments_module._KEPT_MASKS
    latest = [cache.get(mask, rows_of(800, 800, 1)) for mask in masks[-kept:]]
    assert all(one is other for one, other in zip(latest, made[-kept:], strict=True))
    assert cache.get(masks[-kept - 1], rows_of(800, 800, 1)) is not made[-kept - 1]
