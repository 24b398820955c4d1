"""Segments: device offsets, and the cache that must never hand out another mask's."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from megatron_skyladder.segments import MaskCache, Segments, grid_segments  # noqa: E402

CPU = torch.device("cpu")


def segments_of(offsets):
    offsets = np.array(offsets, dtype=np.int32)
    return Segments(offsets, offsets, 8, 8, None, None, CPU)


@pytest.mark.parametrize(
    ("num_segments", "padded"), [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (1000, 1024)]
)
def test_the_number_of_segments_is_padded_to_few_sizes(num_segments, padded):
    offsets = segments_of(range(num_segments + 1)).cu_seqlens_q_device
    assert offsets.dtype == torch.int32
    assert offsets.tolist() == [*range(num_segments + 1)] + [num_segments] * (padded - num_segments)


def test_equal_offsets_are_one_tensor():
    segments = segments_of([0, 4, 9])
    assert segments.cu_seqlens_k_device is segments.cu_seqlens_q_device


def test_grid_segments_of_two_rows():
    segments = grid_segments(4, 10, 2, sliding=False, device=CPU)
    assert segments.cu_seqlens_q.tolist() == [0, 4, 8, 10, 14, 18, 20]
    assert (segments.max_seqlen_q, segments.grid, segments.sliding_window) == (4, 4, None)


def test_a_sliding_row_is_one_segment():
    segments = grid_segments(4, 10, 2, sliding=True, device=CPU)
    assert segments.cu_seqlens_q.tolist() == [0, 10, 20]
    assert (segments.max_seqlen_q, segments.grid, segments.sliding_window) == (10, None, 4)


def test_a_sliding_window_of_the_whole_row_is_the_grid():
    segments = grid_segments(10, 10, 1, sliding=True, device=CPU)
    assert (segments.grid, segments.sliding_window) == (10, None)


def test_masks_never_mix_even_when_memory_is_reused():
    cache = MaskCache()
    generator = np.random.default_rng(0)
    for _ in range(2000):  # freed masks leave their addresses to later ones
        size = int(generator.integers(1, 6))
        offsets = np.cumsum(np.r_[0, generator.integers(1, 9, size)]).astype(np.int32)
        mask = torch.from_numpy(offsets.copy())
        for _ in range(2):  # made, then looked up
            got = cache.get(mask, max_seqlen=8, sliding_window=None, device=CPU)
            np.testing.assert_array_equal(got.cu_seqlens_q, offsets)


def test_a_mask_changed_in_place_is_another_mask():
    cache = MaskCache()
    mask = torch.tensor([0, 4, 8], dtype=torch.int32)
    cache.get(mask, max_seqlen=8, sliding_window=None, device=CPU)
    mask[1] = 3
    got = cache.get(mask, max_seqlen=8, sliding_window=None, device=CPU)
    assert got.lengths_q.tolist() == [3, 5]


def test_the_same_mask_is_made_once_through_detach():
    """Activation recompute hands on a detached copy of the tensor."""
    cache = MaskCache()
    mask = torch.tensor([0, 4, 8], dtype=torch.int32)
    first = cache.get(mask, max_seqlen=8, sliding_window=None, device=CPU)
    assert cache.get(mask.detach(), max_seqlen=8, sliding_window=None, device=CPU) is first
