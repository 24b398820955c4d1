"""Which loss functions count tokens anew under context parallelism; tests/distributed has runs."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from megatron_skyladder.runtime import sequence_mean  # noqa: E402
from megatron_skyladder.runtime.sequence_mean import (  # noqa: E402
    over_sequences,
    with_mean_over_sequences,
)
from megatron_skyladder.runtime.trainer import Groups  # noqa: E402
from megatron_skyladder.testing.trainer import PlainTrainer  # noqa: E402

LOSSES = torch.tensor([[3.0, 1.0]])  # of this rank; the other one has three tokens that count


@pytest.fixture
def cp_size(monkeypatch):
    """Return a function that sets the number of context-parallel ranks, all but this one fake.

    Args of it: the number, and how many tokens the other ranks count together.
    """

    def set_size(size, others=3):
        group = SimpleNamespace(size=lambda: size)
        trainer = PlainTrainer(groups=Groups(tp=None, pp=None, cp=group, dp=None, dp_cp=None))
        monkeypatch.setattr(sequence_mean.trainer, "_trainer", trainer)
        monkeypatch.setattr(
            torch.distributed, "all_reduce", lambda total, group: total.add_(others)
        )

    return set_size


def call(loss_func):
    """Run one micro-batch as Megatron's schedules do."""
    forward_step = with_mean_over_sequences(lambda iterator, model: (LOSSES, loss_func))
    output, wrapped = forward_step(None, None)
    return wrapped(output)


def own_tokens(losses):
    return losses.sum(), torch.tensor(2, dtype=torch.int), {"lm loss": "as it was"}


def test_without_context_parallelism_nothing_is_touched(cp_size):
    cp_size(1)
    assert over_sequences(own_tokens) is own_tokens
    assert with_mean_over_sequences(own_tokens) is own_tokens


def test_each_rank_divides_by_the_count_of_all(cp_size):
    cp_size(2)
    loss, num_tokens, report = call(own_tokens)
    assert (loss.item(), num_tokens.item(), num_tokens.dtype) == (8, 5, torch.int)
    assert report == {"lm loss": "as it was"}


def test_a_count_that_is_no_tensor(cp_size):
    cp_size(2)
    assert call(lambda losses: (losses.sum(), 2, {}))[1].item() == 5


def test_a_plain_count_goes_where_the_loss_is(cp_size):
    """NCCL adds up nothing on the host."""
    cp_size(2)
    wrapped = over_sequences(lambda losses: (losses.sum(), 2, {}))
    assert wrapped(LOSSES.to("meta"))[1].device.type == "meta"


def test_the_count_that_is_logged_stays(cp_size):
    """Megatron adds that one up over the ranks by itself, after the loss has been divided."""
    cp_size(2)
    count = torch.tensor(2)
    _, num_tokens, report = call(lambda losses: (losses.sum(), count, {"tokens": count}))
    assert (num_tokens.item(), report["tokens"].item()) == (5, 2)


@pytest.mark.parametrize("count", [4, 1])
def test_a_loss_function_that_counts_over_all_ranks_stays_as_it_was(cp_size, count):
    """As Megatron's did up to 0.12, also where fewer tokens count than this rank holds."""
    cp_size(2, others=count)  # which then say the same number
    loss, num_tokens, _ = call(lambda losses: (losses.sum(), torch.tensor(count), {}))
    assert loss / num_tokens == LOSSES.sum() / count


def test_a_mean_is_left_alone(cp_size):
    cp_size(2)
    loss, report = call(lambda losses: (losses.mean(), {}))
    assert (loss.item(), report) == (2, {})
