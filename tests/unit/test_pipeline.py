"""How many micro-batches an interleaved pipeline is given where we choose their number."""

import pytest

pytest.importorskip("megatron.core")

from megatron_skyladder.runtime.pipeline import interleaved, num_microbatches


def is_taken(count: int, *, group: int, pp_size: int) -> bool:
    """As `forward_backward_pipelining_with_interleaving` checks it."""
    return pp_size <= group <= count and not 0 < count % group < pp_size


@pytest.mark.parametrize("pp_size", [2, 3, 4, 8])
def test_it_is_the_first_number_that_megatron_takes(pp_size: int) -> None:
    for group in range(pp_size, 3 * pp_size + 1):
        for wanted in range(1, 5 * pp_size):
            count = wanted
            while not is_taken(count, group=group, pp_size=pp_size):
                count += 1
            assert interleaved(wanted, group=group, pp_size=pp_size) == count, (group, wanted)


def test_one_chunk_takes_any_number() -> None:
    assert num_microbatches([object()], 3) == 3
