"""The probe's parts: what it states, what it asks, and what it makes of answers that are wrong."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("megatron.core")

import torch

from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.fragments import dense_mask
from megatron_skyladder.ladder.schedules import SCHEDULES, WindowSchedule
from megatron_skyladder.runtime.probe import gradients, questions, sequences, statement
from megatron_skyladder.runtime.probe.sight import Sight, run_starts

EOD = 9


SCHEDULE_CASES = {
    "constant": {},
    "linear": {"start_window": 3, "alpha": "1/8"},
    "stepwise": {"start_window": 100, "final_window": 5000, "alpha": 7},
    "sinusoidal": {"start_window": 32, "expand_fraction": 0.64, "total_steps": 100},
    "exponential": {"start_window": 32, "expand_fraction": "1/3", "total_steps": 99},
    "staged": {"stages": "16:1/3 64:1/6 512:1/2", "total_steps": 50},
    "cyclic": {"start_window": 8, "alpha": 13, "num_cycles": 3},
    "cyclic-jump": {"start_window": 8, "expand_fraction": 1, "total_steps": 70},
    "reversed": {"start_window": 8, "alpha": 5, "round_to": 16},
    "points": {"points": "0:20 0.1:200 0.1:60 1/3:512 0.5:33 0.9:final", "total_steps": 90},
}


def config_of(name, begin_samples=0):
    values = {"final_window": 512, **SCHEDULE_CASES[name]}
    return SkyLadderConfig(
        schedule=WindowSchedule(name, **values),
        seq_length=values["final_window"],
        step_samples=4,
        begin_samples=begin_samples,
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_window_is_stated_for_every_schedule(name):
    """Both statements agree, over the whole run and beyond: each was written by itself."""
    assert name in statement.STATED
    config = config_of(name, begin_samples=10)
    for samples in range(0, 6000, 2):
        assert statement.window(config, samples) == config.window_at_samples(samples), samples


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_next_change_is_where_the_window_changes(name):
    config = config_of(name)
    for now in (0, 3, 10, 50, 99, 200, 4000):
        change = statement.next_change(config, now)
        before = config.window_at_samples(now)
        if change is None:
            assert all(config.window_at_samples(now + 4 * step) == before for step in range(2000))
        else:
            assert change > now
            windows = [config.window_at_samples(samples) for samples in (change - 1, change)]
            assert windows[0] == before != windows[1]


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("window_len", [1, 3, 8, 20])
def test_the_first_visible_key_is_that_of_the_dense_mask(window_len, sliding):
    length = 20
    tokens = np.random.default_rng(0).integers(0, EOD + 1, (3, length))
    tokens[1, :] = 0  # a sequence without a document's end
    starts = statement.document_starts(tokens, EOD)
    first = statement.first_visible(
        3, length, window_len=window_len, sliding=sliding, starts=starts
    )
    for index, row in enumerate(tokens):
        mask = dense_mask(
            length,
            window_len=window_len,
            document_ends=np.flatnonzero(row == EOD) + 1,
            sliding=sliding,
        )
        expected = mask.argmax(axis=1) + index * length
        np.testing.assert_array_equal(first[index * length : (index + 1) * length], expected)


def test_documents_that_the_dataset_names():
    """Padding repeats the last entry, or is zero; the order does not matter."""
    named = statement.starts_of(np.array([[0, 3, 5, 8, 8], [0, 8, 2, 0, 0]]), 8)
    assert named.tolist() == [[0, 0, 0, 3, 3, 5, 5, 5], [0, 0, 2, 2, 2, 2, 2, 2]]


class Iterator:
    """As Megatron's RerunDataIterator, in what the probe knows of it."""

    def __init__(self, iterable):
        self.iterable, self.replaying, self.replay_pos = iterable, False, 0
        self.saved_microbatches = []

    def __next__(self):
        if self.replaying:
            self.replay_pos += 1
            return self.saved_microbatches[self.replay_pos - 1]
        return next(self.iterable)


def test_what_was_peeked_at_comes_again():
    source = iter([1, 2, 3])
    iterator = Iterator(source)
    for _ in range(2):
        assert sequences.peek(iterator) == (1, iterator)
    assert [next(iterator) for _ in range(3)] == [1, 2, 3]
    assert iterator.iterable is source


def test_a_plain_iterator_is_wrapped():
    batch, iterator = sequences.peek(iter([1, 2]))
    assert batch == 1 and list(iterator) == [1, 2]
    assert sequences.peek(None) == (None, None)
    assert sequences.peek(iter([]))[0] is None


def test_batches_that_are_read_again_after_a_resume():
    iterator = Iterator(iter([3]))
    iterator.replaying, iterator.replay_pos, iterator.saved_microbatches = True, 1, [1, 2]
    assert sequences.peek(iterator) == (2, iterator)
    assert next(iterator) == 2


def test_a_loader_answers_through_the_wrapper():
    class Loader:
        def __next__(self):
            return 1

        def save_state(self):
            return "state"

    iterator = Iterator(Loader())
    sequences.peek(iterator)
    assert iterator.iterable.save_state() == "state"


def test_planted_documents_differ_between_sequences():
    batch = {"tokens": torch.zeros(2, 16, dtype=torch.int64), "labels": torch.ones(2, 16)}
    places = sequences.marks(16, 5, np.repeat([0, 4, 12], [4, 8, 4]))
    assert {1, 4, 5, 6, 12, 15} <= set(places) and min(places) > 0 and max(places) < 16
    planted = sequences.planted(batch, EOD, places, 0)["tokens"]
    ends = [(torch.nonzero(row == EOD).flatten() + 1).tolist() for row in planted]
    assert sorted(ends[0] + ends[1]) == places and not set(ends[0]) & set(ends[1])
    assert not batch["tokens"].any()
    named = {**batch, "cu_seqlens": torch.tensor([[0, 16]])}
    assert sequences.planted(named, EOD, places, 0) is named


def sight_of(first, held, rank, num_sequences):
    length = len(first) // num_sequences
    shift = torch.arange(num_sequences) * length
    begins = torch.from_numpy(run_starts(held))
    return Sight(
        first=torch.as_tensor(first),
        own=held[rank][:, None] + shift,
        run_starts=(shift[:, None] + begins).flatten(),
        seq_length=length,
    )


ZIGZAG = torch.tensor([[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11]])


def test_runs_are_what_one_rank_holds_without_a_gap():
    assert run_starts(ZIGZAG).tolist() == [0] * 4 + [4] * 8 + [12] * 4
    assert run_starts(torch.arange(6)[None]).tolist() == [0] * 6


def dense_attention(sight, scale, first=None, *, causal=True):
    """Attention of a whole micro-batch by one dense mask: query p sees first[p]..p."""
    first = sight.first if first is None else first
    positions = torch.arange(sight.num_positions)
    visible = positions[None, :] >= first[:, None]
    if causal:
        visible &= positions[None, :] <= positions[:, None]

    def attend(query, key, value):
        q, k, v = (x.transpose(0, 1).flatten(0, 1).transpose(0, 1) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, scale=scale, enable_gqa=True
        )
        return out.transpose(0, 1).unflatten(0, (query.shape[1], -1)).transpose(0, 1).flatten(2)

    return attend


def inputs(sight, heads, groups, size, dtype=torch.float32, value_size=None):
    shape = sight.own.shape
    return (
        torch.empty(*shape, heads, size, dtype=dtype),
        torch.empty(*shape, groups, size, dtype=dtype),
        torch.empty(*shape, groups, value_size or size, dtype=dtype),
    )


def found(sight, attend, tensors, scale):
    return [
        wrong
        for call in questions.calls(sight, *tensors, scale)
        for wrong in questions.wrong_answers(sight, call, attend(call.query, call.key, call.value))
    ]


def random_sight(draw_first, num_sequences, length):
    first = np.concatenate(
        [np.maximum.accumulate(row) + index * length for index, row in enumerate(draw_first)]
    )
    return sight_of(first, torch.arange(length)[None], 0, num_sequences)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_one_key_too_few_or_too_many_is_found(data):
    """Whatever the mask (each query sees an interval up to itself) and wherever it is wrong."""
    count, length = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 24))
    rows = [
        [data.draw(st.integers(0, position)) for position in range(length)] for _ in range(count)
    ]
    sight = random_sight(rows, count, length)
    heads, groups = data.draw(st.sampled_from([(1, 1), (4, 2), (9, 3)]))
    scale = data.draw(st.sampled_from([0.1, 0.35, 1.0]))
    tensors = inputs(sight, heads, groups, 8)
    assert found(sight, dense_attention(sight, scale), tensors, scale) == []
    at = data.draw(st.integers(0, sight.num_positions - 1))
    wrong = sight.first.clone()
    wrong[at] += data.draw(st.sampled_from([-1, 1]))
    if 0 <= wrong[at] <= at:
        faults = found(sight, dense_attention(sight, scale, wrong), tensors, scale)
        assert {fault.query for fault in faults} == {at}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [8, 64])
def test_single_keys_count_in_long_windows_in_any_precision(dtype, size):
    """A mean over 400 keys would not show one more or less of them in low precision."""
    length, window_len = 512, 400
    places = np.arange(length)
    sight = sight_of(np.maximum(0, places - window_len + 1), torch.arange(length)[None], 0, 1)
    tensors, scale = inputs(sight, 8, 1, size, dtype), size**-0.5

    def wrong_questions(actual_window):
        first = torch.as_tensor(np.maximum(0, places - actual_window + 1))
        faults = found(sight, dense_attention(sight, scale, first), tensors, scale)
        asked = [fault.index for fault in faults if fault.index != questions.AVERAGE]
        return {questions.QUESTIONS[index].key for index in asked}

    assert wrong_questions(window_len) == set()
    assert "the first that it has to see" in wrong_questions(window_len - 1)
    assert "the last before those that it may see" in wrong_questions(window_len + 1)


def test_what_comes_after_a_query_is_found():
    sight = sight_of(np.zeros(32, dtype=np.int64), torch.arange(32)[None], 0, 1)
    faults = found(sight, dense_attention(sight, 1.0, causal=False), inputs(sight, 8, 8, 16), 1.0)
    assert "the one after itself" in {
        questions.QUESTIONS[f.index].key for f in faults if f.index != questions.AVERAGE
    }


def test_heads_of_values_may_be_of_another_size():
    """As in multi-head latent attention."""
    sight = sight_of(np.zeros(32, dtype=np.int64), torch.arange(32)[None], 0, 1)
    attend = dense_attention(sight, 0.2)
    assert found(sight, attend, inputs(sight, 4, 4, 24, value_size=16), 0.2) == []


def test_an_output_that_is_not_finite_is_wrong():
    sight = sight_of(np.zeros(16, dtype=np.int64), torch.arange(16)[None], 0, 1)

    def attend(query, key, value):
        return torch.full((16, 1, 8 * 16), float("nan"))

    faults = found(sight, attend, inputs(sight, 8, 8, 16), 1.0)
    assert {fault.index for fault in faults} == set(range(questions.AVERAGE + 1))
    assert all(fault.got is None for fault in faults)


def test_the_key_that_was_got_instead_is_named():
    sight = sight_of(np.zeros(16, dtype=np.int64), torch.arange(16)[None], 0, 1)
    right = dense_attention(sight, 1.0)

    def attend(query, key, value):
        return right(query, key, value.roll(1, dims=0))  # each value one place late

    first = found(sight, attend, inputs(sight, 8, 8, 16), 1.0)[0]
    assert (first.query, first.key, first.got) == (0, 0, 15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window_len", [5, 16])
@pytest.mark.parametrize("table", [gradients._MAX_TABLE, 0])  # kept once, or made for each sample
def test_gradients_are_those_of_the_textbook(monkeypatch, dtype, window_len, table):
    monkeypatch.setattr(gradients, "_MAX_TABLE", table)
    first = statement.first_visible(2, 16, window_len=window_len, sliding=False)
    sight = sight_of(first, torch.arange(16)[None], 0, 2)
    sight = dataclasses.replace(sight, run_starts=torch.from_numpy(run_starts(ZIGZAG)).repeat(2))
    tensors, scale = inputs(sight, 4, 2, 16, dtype), 0.25
    attend = dense_attention(sight, scale)
    for call in questions.calls(sight, *tensors, scale):
        assert gradients.wrong_values(sight, call, attend)[1] == []
    assert gradients.wrong_softmax(sight, *tensors, scale, attend) == []


class Spoilt(torch.autograd.Function):
    """The identity; its gradient is spoilt."""

    @staticmethod
    def forward(ctx, tensor, spoil):
        ctx.spoil = spoil
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return ctx.spoil(grad), None


SPOILT = {
    "dropped": (lambda grad: grad * 0, "value"),
    "one key's dropped": (lambda grad: torch.cat([grad[:3], grad[3:4] * 0, grad[4:]]), "value"),
    "one off": (lambda grad: grad.roll(1, dims=0), "value"),
    "doubled": (lambda grad: 2 * grad, "value"),
    "of keys": (lambda grad: grad * 0, "key"),
    "of queries": (lambda grad: grad * 0, "query"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_wrong_gradient_is_found(name):
    spoil, what = SPOILT[name]
    sight = sight_of(
        statement.first_visible(1, 16, window_len=7, sliding=True), torch.arange(16)[None], 0, 1
    )
    right = dense_attention(sight, 0.25)

    def attend(query, key, value):
        given = {"query": query, "key": key, "value": value}
        return right(**{**given, what: Spoilt.apply(given[what], spoil)})

    tensors = inputs(sight, 2, 1, 16)
    lost = gradients.wrong_softmax(sight, *tensors, 0.25, attend)
    if what == "value":
        lost = [
            fault
            for call in questions.calls(sight, *tensors, 0.25)
            for fault in gradients.wrong_values(sight, call, attend)[1]
        ]
    assert {fault.what for fault in lost} == {what}


def test_no_sum_of_floats_that_a_gpu_refuses_in_deterministic_mode(monkeypatch):
    """Megatron's --deterministic-mode; torch's own list of what raises on CUDA."""
    cumsum = torch.Tensor.cumsum

    def checked(tensor, *args, **kwargs):
        assert not tensor.is_floating_point()
        return cumsum(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "cumsum", checked)
    test_heads_of_values_may_be_of_another_size()


def test_nothing_random_is_drawn():
    state = torch.get_rng_state()
    sight = sight_of(np.zeros(16, dtype=np.int64), torch.arange(16)[None], 0, 1)
    found(sight, dense_attention(sight, 1.0), inputs(sight, 8, 8, 16), 1.0)
    assert torch.equal(state, torch.get_rng_state())


def test_values_tell_positions_apart():
    """Over many positions and in small heads no two are alike."""
    values = questions.values_of(torch.arange(1 << 15), 2, 16).flatten(1)
    assert len(values.unique(dim=0)) == 1 << 15
    assert values.abs().max() == 2.0


@pytest.mark.parametrize(("size", "count"), [(2, 40), (8, 1000), (64, 1 << 15), (128, 1 << 17)])
def test_a_code_meets_itself_best(size, count):
    codes = questions.Codes(count, size, torch.device("cpu"))
    some = torch.arange(0, count, max(1, count // 50))
    products = codes(some) @ codes(torch.arange(count)).T
    best = products[torch.arange(len(some)), some].clone()
    products[torch.arange(len(some)), some] = -torch.inf
    assert torch.all(products.max(dim=1).values <= best - 0.99 * codes.separation)
