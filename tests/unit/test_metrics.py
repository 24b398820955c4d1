"""What is logged, against counts by hand and Megatron's own count of FLOPs."""

import inspect
from argparse import Namespace
from collections.abc import Iterator

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.training")

from megatron_skyladder.ladder import clock  # noqa: E402
from megatron_skyladder.ladder.config import SkyLadderConfig  # noqa: E402
from megatron_skyladder.ladder.costs import ATTENTION_COST  # noqa: E402
from megatron_skyladder.ladder.fragments import dense_mask, fragment_cu_seqlens, rows_cu_seqlens  # noqa: E402
from megatron_skyladder.ladder.schedules import WindowSchedule  # noqa: E402
from megatron_skyladder.megatron_lm import training_log  # noqa: E402
from megatron_skyladder.runtime import metrics, trainer  # noqa: E402
from megatron_skyladder.runtime.metrics import Meter, Outlook, Rate, Work  # noqa: E402
from megatron_skyladder.testing.trainer import PlainTrainer  # noqa: E402

LENGTH = 48
CAUSAL = LENGTH * (LENGTH + 1) // 2


def config(mask: str = "local", **schedule: object) -> SkyLadderConfig:
    values = {"start_window": 8, "final_window": LENGTH, "alpha": 8, **schedule}
    return SkyLadderConfig(
        schedule=WindowSchedule(**values),  # type: ignore[arg-type]
        seq_length=LENGTH,
        step_samples=4,
        mask=mask,
    )


@pytest.fixture
def consumed() -> Iterator[list[int]]:
    """A clock under windows 8, 16, ..., 48; the list holds the consumed samples."""
    samples = [0]
    clock.install(config(), lambda: samples[0])
    yield samples
    clock.uninstall()


@pytest.fixture
def running() -> Iterator[PlainTrainer]:
    """The same clock, of a trainer that says how many samples are consumed."""
    plain = PlainTrainer(seq_length=LENGTH)
    trainer.install(config(), plain)
    yield plain
    trainer.uninstall()


# --- work ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["local", "sliding"])
@pytest.mark.parametrize("window", [1, 7, 16, 48])
def test_counted_work_is_what_the_dense_mask_has(mask: str, window: int) -> None:
    sliding = mask == "sliding"
    rows = [np.array([5, 20, 48]), np.array([48]), np.array([1, 2, 47, 48])]
    cut = LENGTH if sliding else window
    offsets = [fragment_cu_seqlens(e, seq_length=LENGTH, window_len=cut) for e in rows]
    meter = Meter(config(mask))
    meter.count(torch.from_numpy(rows_cu_seqlens(offsets)), window, num_rows=3)
    dense = [
        dense_mask(LENGTH, window_len=window, document_ends=ends, sliding=sliding) for ends in rows
    ]
    alone = dense_mask(LENGTH, window_len=window, sliding=sliding)
    work = meter.step()
    assert work.rows == 3
    assert work.pairs == sum(visible.sum() for visible in dense)
    assert work.grid_pairs == 3 * alone.sum()
    assert work.fragments == sum(len(offset) - 1 for offset in offsets)


@pytest.mark.parametrize(("window", "fragments"), [(8, 6), (20, 3), (48, 1)])
def test_work_of_the_grid(window: int, fragments: int) -> None:
    pairs = dense_mask(LENGTH, window_len=window).sum()
    assert metrics.grid_work(config(), window) == Work(1, pairs, pairs, fragments)
    assert metrics.grid_work(config("sliding"), window).fragments == 1


def test_the_interval_adds_up_steps_and_the_step_starts_anew(consumed: list[int]) -> None:
    meter = metrics.meter()
    mask = torch.tensor([0, 24, 48], dtype=torch.int32)
    clock.current().window(training=True)
    meter.count(mask, 48, num_rows=1)
    meter.count(mask, 48, num_rows=1)
    assert meter.end_step() == Work(2, 1200, 2 * CAUSAL, 4)
    assert meter.end_step() == metrics.grid_work(meter.config, 8)  # nothing counted: the grid alone
    assert meter.interval == Work(3, 1200 + 6 * 36, 2 * CAUSAL + 6 * 36, 10)


def test_the_interval_goes_on_after_it_was_logged(consumed: list[int]) -> None:
    """What is counted later is not in what was noted for the log line."""
    meter = metrics.meter()
    clock.current().window(training=True)
    meter.end_step()
    metrics.count_over_data_parallel()
    meter.end_step()
    assert (meter.logged_interval.rows, meter.interval.rows) == (1, 2)


def test_what_is_counted_after_a_snapshot_is_forgotten(consumed: list[int]) -> None:
    """The probe's own passes: the step under way counts on in place."""
    meter = metrics.meter()
    mask = torch.tensor([0, 24, 48], dtype=torch.int32)
    meter.count(mask, 48, num_rows=1)
    before = meter.snapshot()
    meter.count(mask, 48, num_rows=1)
    meter.restore(before)
    assert meter.step() == Work(1, 600, CAUSAL, 2)


def test_each_clock_has_its_own_meter(consumed: list[int]) -> None:
    first = metrics.meter()
    assert metrics.meter() is first
    clock.install(config(), lambda: 0)
    assert metrics.meter() is not first


# --- FLOPs --------------------------------------------------------------------------------------


def megatron_arguments(**changes: object) -> Namespace:
    values = {
        "seq_length": LENGTH,
        "hidden_size": 32,
        "num_layers": 3,
        "num_attention_heads": 4,
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 8,
        "ffn_hidden_size": 96,
        "swiglu": True,
        "padded_vocab_size": 256,
        "num_experts": None,
        "moe_layer_freq": 1,
        "moe_ffn_hidden_size": None,
        "moe_latent_size": None,
        "moe_router_topk": 2,
        "moe_shared_expert_intermediate_size": None,
        "mtp_num_layers": None,
        "multi_latent_attention": False,
        "attention_output_gate": False,
        "experimental_attention_variant": None,
        "linear_attention_type": None,
        "hybrid_layer_pattern": None,
        "hybrid_override_pattern": None,
        "hybrid_attention_ratio": 0,
        "hybrid_mlp_ratio": 0,
        "is_hybrid_model": False,
        **changes,
    }
    return Namespace(**values)


@pytest.mark.parametrize("samples", [0, 4, 12, 40])
def test_flops_are_megatrons_own_for_these_fragments(consumed: list[int], samples: int) -> None:
    from megatron.training.training import num_floating_point_operations as original

    if "seqlen_squared_sum_in_batch" not in inspect.signature(original).parameters:
        pytest.skip("this Megatron counts whole rows only")
    consumed[0] = samples
    window = clock.current().window(training=True)
    lengths = np.diff(
        fragment_cu_seqlens(np.empty(0, np.int32), seq_length=LENGTH, window_len=window)
    )
    wanted = original(
        megatron_arguments(), 16, seqlen_squared_sum_in_batch=16 * int((lengths**2).sum())
    )
    counted = training_log.counting_windows(original)
    assert counted(megatron_arguments(), 16) == pytest.approx(wanted, rel=1e-12)


def test_flops_to_be_logged_are_the_intervals_mean(consumed: list[int]) -> None:
    def original(options: Namespace, batch_size: int) -> float:
        return batch_size * (options.seq_length + options.seq_length**2)

    counted = training_log.counting_windows(original)
    meter = metrics.meter()
    clock.current().window(training=True)
    meter.end_step()  # window 8: six squares of 8
    consumed[0] = 40
    clock.current().window(training=True)
    meter.end_step()  # window 48
    options = Namespace(seq_length=LENGTH)
    assert counted(options, 2) == pytest.approx(2 * (48 + 48**2))
    metrics.count_over_data_parallel()
    meter.in_log = True
    assert counted(options, 2) == pytest.approx(2 * (48 + (6 * 8**2 + 48**2) / 2))


def test_attention_share_of_any_count_that_has_a_square() -> None:
    def count(options: Namespace, batch_size: int) -> float:
        return batch_size * (3 * options.seq_length + 5 * options.seq_length**2)

    wanted = 5 * 48**2 / (3 * 48 + 5 * 48**2)
    assert training_log.attention_share(count, Namespace(seq_length=48), 7) == pytest.approx(wanted)


# --- the time left ------------------------------------------------------------------------------


def test_outlook_is_the_sum_over_the_steps_ahead() -> None:
    settings = config()  # windows 8, 16, ..., 48, then 48 for good
    outlook = Outlook(settings, total_samples=40)
    fractions = [
        dense_mask(LENGTH, window_len=settings.schedule.window_at(step)).sum() / CAUSAL
        for step in range(10)
    ]
    for step in range(10):
        steps, work = outlook.left(4 * step)
        assert steps == 10 - step
        assert work == pytest.approx(sum(fractions[step:]))
    assert outlook.left(2)[1] == pytest.approx(sum(fractions) - fractions[0] / 2)
    assert outlook.left(44) == (0, 0)


def test_time_left_without_a_ladder_is_steps_times_time() -> None:
    outlook = Outlook(config(schedule="constant", alpha=None), total_samples=400)
    measured = Work(5, 5 * CAUSAL, 5 * CAUSAL, 5)
    hours = metrics.hours_left(outlook, 40, step_seconds=36, share=0.3, measured=measured)
    assert hours == pytest.approx(90 * 36 / 3600)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_time_left_grows_with_the_windows_ahead(share: float) -> None:
    """The first of ten steps, at window 8, took an hour; without attention so do the nine left."""
    settings = config()
    measured = Work(1, 6 * 36, 6 * 36, 6)
    hours = metrics.hours_left(
        Outlook(settings, total_samples=40), 4, step_seconds=3600, share=share, measured=measured
    )
    masks = [dense_mask(LENGTH, window_len=settings.schedule.window_at(step)) for step in range(10)]
    times = [1 - share + ATTENTION_COST * share * mask.sum() / CAUSAL for mask in masks]
    assert hours == pytest.approx(sum(times[1:]) / times[0])


def test_time_left_keeps_the_share_that_documents_leave() -> None:
    outlook = Outlook(config(schedule="constant", alpha=None), total_samples=400)
    halved = Work(2, CAUSAL, 2 * CAUSAL, 9)
    hours = metrics.hours_left(outlook, 0, step_seconds=36, share=0.3, measured=halved)
    assert hours == pytest.approx(100 * 36 / 3600)


# --- the log line -------------------------------------------------------------------------------


def logged(totals: dict, losses: dict, skipped: int) -> dict[str, float]:
    """Do what Megatron's training_log does with losses; return what it prints."""
    if not skipped:
        totals["advanced iterations"] = totals.get("advanced iterations", 0) + 1
        for name, value in losses.items():
            totals[name] = totals.get(name, torch.zeros(1)) + value
    return {
        name: (total / max(1, totals.get("advanced iterations", 0))).item()
        for name, total in totals.items()
        if name not in ("advanced iterations", "skipped iterations")
    }


def test_values_are_those_of_the_latest_step_and_the_time_of_the_interval(
    running: PlainTrainer,
) -> None:
    """Steps at windows 8 and 16; they took 7 seconds each, for 2 of a step's 4 samples."""
    meter = metrics.meter()
    for running.consumed_samples in (0, 4):
        clock.current().window(training=True)
        meter.end_step()
    running.consumed_samples = 8
    metrics.count_over_data_parallel()
    outlook = Outlook(config(), total_samples=40)
    both = Work(2, 6 * 36 + 3 * 136, 6 * 36 + 3 * 136, 6 + 3)
    hours = metrics.hours_left(outlook, 8, step_seconds=14, share=0.5, measured=both)
    rate = Rate(step_seconds=7, step_samples=2, step_flops=42e12, num_gpus=3, attention_share=0.5)
    assert metrics.values(outlook, rate) == {
        "skyladder/window": 16,
        "skyladder/attention_fraction": pytest.approx(3 * 136 / CAUSAL),
        "skyladder/visible_context": pytest.approx(3 * 136 / LENGTH),
        "skyladder/fragments_per_row": 3,
        "skyladder/tflops_per_gpu": pytest.approx(2),
        "skyladder/hours_left": pytest.approx(hours),
    }


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("skipped", [0, 1])
def test_the_console_shows_the_latest_value_and_the_mean_loss(
    steps_before: int, skipped: int
) -> None:
    totals = {"advanced iterations": steps_before, "lm loss": torch.tensor([6.0])}
    losses = {"lm loss": torch.tensor([2.0])}
    values = {"skyladder/window": 512}
    training_log.put_on_line(losses, totals, values, skipped=bool(skipped))
    assert list(losses) == ["lm loss"]  # a fork takes exp() of whatever is in there
    assert list(totals)[1] == "lm loss"  # the first is what Megatron's telemetry calls the loss
    printed = logged(totals, losses, skipped)
    assert printed["skyladder/window"] == 512
    if steps_before and not skipped:
        assert printed["lm loss"] == 2.0
    assert totals["skyladder/window"].device.type == "cpu"  # printing it waits for nothing


def test_losses_come_first_also_in_a_fresh_total() -> None:
    totals: dict = {}
    losses = {"lm loss": torch.ones(1)}
    training_log.put_on_line(losses, totals, {"skyladder/window": 8}, skipped=False)
    assert list(totals) == ["lm loss", "skyladder/window"]


def test_the_end_of_a_run_whose_batch_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's own global batch size is the smallest one there; the time left came out as 0."""
    from megatron_skyladder.megatron_lm import adapter

    options = Namespace(
        train_samples=None,
        train_iters=10,
        seq_length=64,
        global_batch_size=2,
        step_batch_size_schedule="0:2 512:4",  # from 8 samples on
    )
    monkeypatch.setattr(adapter.compat, "args", lambda: options)
    assert adapter.MegatronLM().total_samples == 4 * 2 + 6 * 4
