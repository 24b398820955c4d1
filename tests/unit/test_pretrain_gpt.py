"""How a launch that fails says so."""

import logging
from types import SimpleNamespace

import pytest

from megatron_skyladder import pretrain_gpt
from megatron_skyladder.ladder.schedules import WindowSchedule
from megatron_skyladder.megatron_lm import releases
from megatron_skyladder.testing import requires_megatron


def refuse():
    WindowSchedule(start_window=9, final_window=8)


def fail_elsewhere():
    int("eight")


@pytest.fixture
def launch(monkeypatch):
    """Return a function that runs ``main`` with something in the place of the trainer."""
    monkeypatch.delenv("SKYLADDER_TRACEBACK", raising=False)
    monkeypatch.setattr(releases, "installed", lambda: None)
    monkeypatch.setattr(releases, "release_of", lambda _: None)
    monkeypatch.setattr(pretrain_gpt.cpu_engine, "install_or_check_device", lambda: None)
    monkeypatch.setattr(pretrain_gpt, "log_to_console", lambda: None)
    monkeypatch.setattr(logging.getLogger("megatron_skyladder"), "propagate", True)

    def run(trainer, rank="0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(pretrain_gpt, "_launch", trainer)
        pretrain_gpt.main()

    return run


@pytest.mark.parametrize(("rank", "num_messages"), [("0", 1), ("3", 0)])
def test_what_we_refuse_is_said_once_without_a_traceback(launch, caplog, rank, num_messages):
    with pytest.raises(SystemExit) as leaving:
        launch(refuse, rank)
    assert leaving.value.code == 2
    assert caplog.text.count("--skyladder-start-window=9 is above") == num_messages


def test_the_traceback_on_request(launch, monkeypatch):
    monkeypatch.setenv("SKYLADDER_TRACEBACK", "1")
    with pytest.raises(ValueError, match="is above the final window"):
        launch(refuse)


@pytest.mark.parametrize("rank", ["0", "3"])
def test_the_errors_of_others_keep_their_traceback(launch, rank):
    with pytest.raises(ValueError, match="invalid literal"):
        launch(fail_elsewhere, rank)


@requires_megatron
def test_an_error_in_a_step_keeps_its_traceback_on_every_rank(launch, monkeypatch):
    import megatron.training

    monkeypatch.setattr(megatron.training, "get_timers", refuse)
    with pytest.raises(ValueError, match="is above the final window"):
        launch(lambda: pretrain_gpt.forward_step(None, None), "3")


@pytest.mark.parametrize(
    ("given", "warned"),
    [
        ({}, True),
        ({"context_parallel_size": 1}, False),
        ({"eod_mask_loss": False}, False),
        ({"calculate_per_token_loss": True}, False),
    ],
)
def test_where_stock_megatron_averages_otherwise_than_one_process(caplog, given, warned):
    options = {"context_parallel_size": 2, "eod_mask_loss": True, "calculate_per_token_loss": False}
    pretrain_gpt._warn_of_unequal_parts(SimpleNamespace(**options | given))
    assert ("Add --calculate-per-token-loss" in caplog.text) == warned
