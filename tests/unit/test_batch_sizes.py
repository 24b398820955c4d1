"""Batch sizes by hand, and beside Megatron's own calculator."""

from argparse import Namespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_skyladder.ladder.batch_sizes import BatchSizes, batch_sizes


def growing(text, seq_length=64):
    return batch_sizes(
        Namespace(step_batch_size_schedule=text, global_batch_size=2, seq_length=seq_length)
    )


def test_without_growth_it_is_the_global_batch_size():
    sizes = batch_sizes(Namespace(global_batch_size=8, seq_length=64))
    assert sizes == BatchSizes(((0, 8),))
    assert (sizes.final, sizes.samples_in(0), sizes.samples_in(5)) == (8, 0, 40)


def test_growth_is_read_as_megatron_reads_it():
    # thresholds are tokens: 1000 // 64 = 15 samples, 2560 // 64 = 40
    assert growing("0:4 1K:8, 2.56k:16").stages == ((0, 4), (15, 8), (40, 16))
    assert growing("250B:1536 0:768", 8192).stages == ((0, 768), (30_517_578, 1536))
    assert growing("0:4 1K:8").final == 8
    assert growing("0:1 1.5M:2 1T:3", 8192).stages == ((0, 1), (183, 2), (122_070_312, 3))


@pytest.mark.parametrize(
    ("num_batches", "samples"),
    # 4 a batch until 15 samples are consumed (0, 4, 8, 12), 8 until 40 (16, 24, 32), then 16
    [(0, 0), (1, 4), (3, 12), (4, 16), (5, 24), (7, 40), (8, 56), (10, 88)],
)
def test_samples_of_a_growing_run(num_batches, samples):
    assert growing("0:4 960:8 2560:16").samples_in(num_batches) == samples


@pytest.mark.parametrize("text", ["", "8", "0:4:8", "1K:8", "0:4 10:8", "0:0", "0:x"])
def test_an_unreadable_schedule_is_refused(text):
    with pytest.raises(ValueError, match=r"--step-batch-size-schedule=.* cannot be read"):
        growing(text)


@given(
    steps=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 20)), max_size=4),
    first=st.integers(1, 20),
    num_batches=st.integers(0, 60),
)
def test_samples_equal_a_walk_through_the_run(steps, first, num_batches):
    stages, start = [(0, first)], 0
    for gap, size in steps:
        start += gap
        stages.append((start, size))
    consumed = 0
    for _ in range(num_batches):
        consumed += [size for start, size in stages if consumed >= start][-1]
    assert BatchSizes(tuple(stages)).samples_in(num_batches) == consumed


def ramped(first, increment, samples, final):
    """As the arguments of a release up to 0.17 have it, which have no other schedule."""
    words = [str(first), str(increment), str(samples)]
    return batch_sizes(Namespace(rampup_batch_size=words, global_batch_size=final))


def test_a_ramp_of_a_release_up_to_0_17():
    # three increments of 16 / 3 = 5.33 samples: 4 a batch from 6 on, 6 from 11, 8 from 16
    assert ramped(2, 2, 16, 8).stages == ((0, 2), (6, 4), (11, 6), (16, 8))
    assert ramped(8, 2, 16, 8).stages == ((0, 8),)
    later = Namespace(
        rampup_batch_size=["2", "2", "16"], global_batch_size=8, step_batch_size_schedule=None
    )
    assert batch_sizes(later).stages == ((0, 8),)  # it is ignored


@given(
    first=st.integers(1, 9),
    increment=st.integers(1, 9),
    count=st.integers(1, 9),
    samples=st.integers(1, 300),
)
def test_a_ramp_equals_a_walk_through_it(first, increment, count, samples):
    final = first + count * increment
    sizes = ramped(first, increment, samples, final)
    consumed = 0
    for number in range(1, 100):
        # Megatron's RampupBatchsizeNumMicroBatchesCalculator.update, up to 0.17
        grown = int(consumed / (samples / count))
        consumed += final if consumed > samples else first + grown * increment
        assert sizes.samples_in(number) == consumed


def test_equals_megatron():
    calculator = pytest.importorskip("megatron.core.num_microbatches_calculator")
    stepwise = getattr(calculator, "StepBatchsizeNumMicroBatchesCalculator", None)
    if stepwise is None:
        pytest.skip("this release has no --step-batch-size-schedule")
    text = "0:4 1K:8,2.5K:16"
    theirs = stepwise(1, 1, False, 1, text, 64)
    assert tuple(theirs.schedule) == growing(text).stages
