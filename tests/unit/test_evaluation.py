"""Which rows are run again, and what is made of their losses; tests/distributed has the runs."""

import argparse
import logging
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from megatron_skyladder.ladder.config import SkyLadderConfig  # noqa: E402
from megatron_skyladder.ladder.flags import add_arguments, config_from_args  # noqa: E402
from megatron_skyladder.ladder.schedules import WindowSchedule  # noqa: E402
from megatron_skyladder.runtime import evaluation, trainer  # noqa: E402
from megatron_skyladder.runtime.evaluation import EXTRA_WORK, Sample, choose_sample  # noqa: E402
from megatron_skyladder.testing.trainer import PlainTrainer  # noqa: E402


@pytest.mark.parametrize(
    ("iterations", "rows", "micro_batch", "passes", "expected"),
    [
        (10, 16, 4, 2, Sample(64, 4)),  # four of ten iterations, twice
        (10, 16, 4, 1, Sample(144, 4)),
        (2, 16, 4, 2, Sample(12, 4)),  # 14 rows would do, but three micro-batches are 12
        (1, 4, 2, 3, Sample(1, 1)),  # a single row out of a micro-batch of two
        (1, 1, 1, 2, Sample(1, 1)),  # nothing to choose from: dearer than promised
        (3, 6, 4, 3, Sample(4, 4)),
    ],
)
def test_sample(
    iterations: int, rows: int, micro_batch: int, passes: int, expected: Sample
) -> None:
    assert choose_sample(iterations, rows, micro_batch, passes) == expected


@pytest.mark.parametrize("passes", [1, 2, 3, 7])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 8])
@pytest.mark.parametrize("iterations", [1, 2, 5, 40])
def test_the_cost_stays_below_twice_plain_validation(
    iterations: int, micro_batch: int, passes: int
) -> None:
    rows = 3 * micro_batch
    sample = choose_sample(iterations, rows, micro_batch, passes)
    assert sample.num_rows % sample.micro_batch_size == 0
    assert sample.micro_batch_size <= micro_batch
    assert sample.num_rows <= iterations * rows
    if iterations * rows > passes:
        assert sample.num_rows * passes <= EXTRA_WORK * iterations * rows


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_whole_iterations_are_the_same_rows_under_any_data_parallel_size(passes: int) -> None:
    samples = [choose_sample(8, 16 // size, 2, passes) for size in (1, 2, 4)]
    assert (
        len({sample.num_rows * size for sample, size in zip(samples, (1, 2, 4), strict=True)}) == 1
    )


def test_what_is_measured_is_said_once_and_a_dear_choice_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "megatron_skyladder")
    evaluation._announced.clear()
    for _ in range(2):
        evaluation.announce(40, Sample(16, 4), (512, 4096), 8192)
    (message,) = caplog.messages
    assert "blocked windows of 512, 4096, 8192 tokens, on the same 16 of the 40" in message
    evaluation.announce(1, Sample(1, 1), (512, 4096), 8192)
    assert "more than plain validation itself" in caplog.messages[-1]
    assert "Raise --eval-iters" in caplog.messages[-1]
    caplog.clear()
    evaluation.announce(0, Sample(1, 1), (512, 4096), 8192)  # a middle stage, a later TP rank
    assert not caplog.messages


def test_the_recorder_hands_everything_on_and_keeps_the_first() -> None:
    batches = [
        {name: torch.full((2, 4), index) for name in evaluation.BATCH_KEYS} for index in range(3)
    ]
    recorder = evaluation._Recorder(iter(batches), num_kept=3)
    assert [batch is given for batch, given in zip(recorder, batches, strict=True)] == [True] * 3
    assert [int(kept["tokens"][0, 0]) for kept in recorder.kept] == [0, 1]
    # Megatron moves tensors within the dict it gets: what is kept must not change with it
    batches[0]["tokens"] = torch.zeros(0)
    assert recorder.kept[0]["tokens"].shape == (2, 4)


def test_rows_are_cut_to_the_samples_micro_batches() -> None:
    batches = [
        {name: torch.arange(3)[:, None] + 3 * index for name in evaluation.BATCH_KEYS}
        for index in range(2)
    ]
    cut = evaluation._rebatch(batches, Sample(4, 2))
    assert [rows["labels"].flatten().tolist() for rows in cut] == [[0, 1], [2, 3]]


@pytest.fixture
def single_process() -> Iterator[None]:
    trainer.install(SkyLadderConfig(WindowSchedule("constant", 8, 8), 8, 1), PlainTrainer())
    yield
    trainer.uninstall()


@pytest.mark.parametrize(
    ("planned", "sizes", "agreed"),
    [
        (Sample(4, 2), [2, 2, 2, 2, 2], Sample(4, 2)),  # as planned
        (Sample(4, 2), [1, 1, 1, 1, 1], Sample(4, 2)),  # smaller micro-batches, but enough of them
        (Sample(4, 2), [1, 1, 1, 1], Sample(2, 2)),  # 3.6 sequences are affordable: whole pairs
        (Sample(4, 2), [2, 1], Sample(2, 2)),
        (Sample(4, 4), [2, 1], Sample(2, 2)),  # no micro-batch is that large
        (Sample(4, 2), [0, 1], Sample(1, 1)),
        (Sample(4, 2), [0, 0], None),
        (Sample(4, 2), [], Sample(4, 2)),  # this rank reads nothing: the others decide
    ],
)
def test_what_was_not_read_is_not_run(
    monkeypatch: pytest.MonkeyPatch, planned: Sample, sizes: list[int], agreed: Sample | None
) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: None)
    monkeypatch.setattr(evaluation.torch, "tensor", lambda x, **_: np.int64(x))
    batches = [{name: torch.zeros(n, 4) for name in evaluation.BATCH_KEYS} for n in sizes]
    taps = evaluation.Taps(iter(batches), None, planned.num_rows)
    for _ in taps.data_iterator:
        pass
    assert taps.num_seen == sum(sizes)
    assert taps.agree(planned, num_passes=1) == agreed
    if agreed and sizes:
        (rows,) = taps.rows(agreed)
        assert rows is not None
        assert [len(batch["labels"]) for batch in rows] == [
            agreed.micro_batch_size
        ] * agreed.num_microbatches


@pytest.mark.usefixtures("single_process")
def test_losses_by_length_and_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: None)
    generator = np.random.default_rng(0)
    plain, blocked = generator.random((2, 3, 8))
    weights = (generator.random((3, 8)) < 0.7).astype(float)
    pieces = [
        evaluation._Piece(
            4,
            torch.tensor(blocked[rows]),
            torch.tensor(weights[rows]),
            torch.arange(8)[None],
        )
        for rows in (slice(0, 2), slice(2, 3))
    ]
    found = evaluation.report(torch.tensor(plain), pieces, (4,), 8)

    def mean(losses: np.ndarray, start: int = 0, stop: int = 8) -> float:
        counted = weights[:, start:stop]
        return (losses[:, start:stop] * counted).sum() / counted.sum()

    wanted = {
        "skyladder/loss_at_4": mean(blocked),
        "skyladder/loss_at_8": mean(plain),
        "skyladder/loss_positions_0_3": mean(plain, 0, 4),
        "skyladder/loss_positions_4_7": mean(plain, 4, 8),
    }
    assert {name: pytest.approx(float(value)) for name, value in found.items()} == wanted


# --- the flag -----------------------------------------------------------------------------------


def lengths_of(text: str) -> tuple[int, ...]:
    args = add_arguments(argparse.ArgumentParser()).parse_args(["--skyladder-eval-lengths", text])
    vars(args).update(seq_length=2048, global_batch_size=8, train_samples=None, train_iters=100)
    config = config_from_args(args)
    assert config
    return config.eval_lengths


def test_lengths_are_sorted_and_told_once() -> None:
    assert lengths_of("2048,512,1024,512") == (512, 1024, 2048)


@pytest.mark.parametrize("text", ["4096", "0,512", "512,-1"])
def test_lengths_outside_the_row_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"has -?\d+, but context lengths lie between 1 and --seq"):
        lengths_of(text)


def test_the_row_alone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2048 is the whole sequence, .* such as 512\."):
        lengths_of("2048")


def test_what_is_no_list_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lengths_of("512;1024")
    assert "is not a list of lengths such as 512,4096,8192" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lengths", "validates", "warns"),
    [((16,), False, True), ((16,), True, False), ((), False, False)],
)
def test_losses_that_cannot_come_are_announced(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    lengths: tuple[int, ...],
    validates: bool,
    warns: bool,
) -> None:
    from megatron_skyladder.megatron_lm import evaluate

    config = SimpleNamespace(eval_lengths=lengths)
    monkeypatch.setattr(evaluate.clock, "current", lambda: SimpleNamespace(config=config))
    evaluate.warn_where_nothing_is_validated(SimpleNamespace(do_valid=validates, eval_iters=0))
    assert ("no losses by length will come" in caplog.text) == warns
