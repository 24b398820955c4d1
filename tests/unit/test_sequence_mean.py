"""Which loss functions count tokens anew under context parallelism; tests/distributed has runs."""

import logging
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from megatron_skyladder.runtime import sequence_mean  # noqa: E402
from megatron_skyladder.runtime.sequence_mean import SequenceMean  # noqa: E402
from megatron_skyladder.runtime.trainer import Groups  # noqa: E402
from megatron_skyladder.testing.trainer import PlainTrainer  # noqa: E402

LOSSES = torch.tensor([[3.0, 1.0]])  # of this rank; the other one has three tokens that count


@pytest.fixture
def cp_size(monkeypatch):
    """Return a function that sets the number of context-parallel ranks, all but this one fake."""

    def set_size(size):
        group = SimpleNamespace(size=lambda: size)
        trainer = PlainTrainer(groups=Groups(tp=None, pp=None, cp=group, dp=None, dp_cp=None))
        monkeypatch.setattr(sequence_mean.trainer, "_trainer", trainer)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda total, group: total.add_(3))

    return set_size


def call(mean, loss_func):
    """Run one micro-batch as Megatron's schedules do."""
    forward_step = mean.wrap(lambda iterator, model: (LOSSES, loss_func))
    output, wrapped = forward_step(None, None)
    return wrapped(output)


def own_tokens(losses):
    return losses.sum(), torch.tensor(2, dtype=torch.int), {"lm loss": "as it was"}


def test_without_context_parallelism_nothing_is_touched(cp_size):
    cp_size(1)
    assert SequenceMean().wrap(own_tokens) is own_tokens


def test_each_rank_divides_by_the_count_of_all(cp_size):
    cp_size(2)
    loss, num_tokens, report = call(SequenceMean(), own_tokens)
    assert (loss.item(), num_tokens.item(), num_tokens.dtype) == (8, 5, torch.int)
    assert report == {"lm loss": "as it was"}


def test_a_count_that_is_no_tensor(cp_size):
    cp_size(2)
    assert call(SequenceMean(), lambda losses: (losses.sum(), 2, {}))[1].item() == 5


def test_a_loss_function_that_counts_over_all_ranks_is_left_alone(cp_size, caplog):
    """As Megatron's did up to 0.12; what the first micro-batch says holds for the whole run."""
    cp_size(2)
    caplog.set_level(logging.INFO, "megatron_skyladder")
    mean = SequenceMean()
    for count in (4, 1):
        loss, num_tokens, _ = call(mean, lambda losses, count=count: (losses.sum(), count, {}))
        assert (loss.item(), num_tokens) == (4, count)
    assert caplog.text.count("counts tokens over the context-parallel ranks") == 1


def test_a_mean_is_left_alone(cp_size):
    cp_size(2)
    loss, report = call(SequenceMean(), lambda losses: (losses.mean(), {}))
    assert (loss.item(), report) == (2, {})
