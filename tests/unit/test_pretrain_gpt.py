"""How a launch that fails says so."""

import argparse
import logging
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from test_config import REFUSED, parse

from megatron_skyladder import pretrain_gpt
from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.flags import config_from_args
from megatron_skyladder.ladder.schedules import WindowSchedule
from megatron_skyladder.megatron_lm import patch_calls, releases
from megatron_skyladder.runtime import ending
from megatron_skyladder.testing import requires_megatron

INSTALLED = releases.installed


def refuse():
    WindowSchedule(start_window=9, final_window=8)


def fail_elsewhere():
    int("eight")


def fail_in_ours():
    WindowSchedule(alpha=1).window_at(-1)


@pytest.fixture
def launch(monkeypatch):
    """Return a function that runs ``main`` with something in the place of the trainer."""
    monkeypatch.delenv("SKYLADDER_TRACEBACK", raising=False)
    monkeypatch.setattr(releases, "installed", lambda: None)
    monkeypatch.setattr(releases, "check_for_our_start", lambda _: None)
    monkeypatch.setattr(pretrain_gpt.cpu_engine, "install_or_check_device", lambda: None)
    monkeypatch.setattr(pretrain_gpt, "log_to_console", lambda: None)
    monkeypatch.setattr(logging.getLogger("megatron_skyladder"), "propagate", True)

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("SLURM_LOCALID", raising=False)

    def run(trainer, rank="0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(pretrain_gpt, "_launch", trainer)
        pretrain_gpt.main()

    return run


def test_what_we_refuse_is_said_without_a_traceback(launch, caplog):
    with pytest.raises(SystemExit) as leaving:
        launch(refuse)
    assert leaving.value.code == 2
    assert "error: start_window=9 is above" in caplog.text


def test_a_refusal_of_one_rank_alone_is_said_by_it_in_time(launch, caplog, monkeypatch):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(SystemExit) as leaving:
        launch(refuse, "3")
    assert leaving.value.code == 2
    assert waited == [ending.GRACE_SECONDS]  # in which the launcher ends it, if rank 0 refused too
    assert "error on rank 3: start_window=9 is above" in caplog.text


@pytest.mark.parametrize("local", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_the_first_rank_of_a_node_says_it_before_the_others_there(launch, monkeypatch, local):
    """A launcher elsewhere may not hear of rank 0; the node's own ends the others meanwhile."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for rank in range(16, 24):
        monkeypatch.setenv(local, str(rank - 16))
        with pytest.raises(SystemExit):
            launch(refuse, str(rank))
    first, *others = waited
    assert first == ending.GRACE_SECONDS
    assert others == [ending.GRACE_SECONDS + ending.NODE_SECONDS] * 7


def test_the_traceback_on_request(launch, monkeypatch):
    monkeypatch.setenv("SKYLADDER_TRACEBACK", "1")
    with pytest.raises(UsageError, match="is above the final window"):
        launch(refuse)


def test_another_megatron_is_a_refusal(launch, monkeypatch, caplog):
    monkeypatch.setattr(releases, "_folder_of", lambda part: None)
    monkeypatch.setattr(releases, "installed", INSTALLED)
    with pytest.raises(SystemExit) as leaving:
        launch(lambda: None)
    assert leaving.value.code == 2
    assert "error: no Megatron is installed" in caplog.text


@pytest.mark.parametrize("rank", ["0", "3"])
@pytest.mark.parametrize("fail", [fail_elsewhere, fail_in_ours])
def test_other_errors_keep_their_traceback_and_name_the_rank(launch, caplog, fail, rank):
    """Whoever raises them, and wherever: only the type tells."""
    with pytest.raises(ValueError, match=r"invalid literal|steps count from 0") as failure:
        launch(fail, rank)
    assert not isinstance(failure.value, UsageError)
    assert f"rank {rank} failed with ValueError: {failure.value}" in caplog.text


@requires_megatron
def test_the_flags_are_printed_without_a_gpu():
    """Megatron's help texts have percent signs that argparse cannot format."""
    result = subprocess.run(
        [sys.executable, "-m", "megatron_skyladder.pretrain_gpt", "--help"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "SKYLADDER_DEVICE": "", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "--num-layers" in result.stdout and "--skyladder-start-window" in result.stdout


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("up to 5%) of it", "up to 5%) of it"),
        ("100% of %(dest)s, 5%% more", "100% of dest, 5% more"),
        ("plain", "plain"),
    ],
)
@requires_megatron
def test_percent_signs_in_help_texts(text, printed):
    from megatron_skyladder.megatron_lm.launch import with_printable_help

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--flag", dest="dest").help = text
    parser.add_argument("--hidden", help=argparse.SUPPRESS)
    assert printed in with_printable_help(parser).format_help()


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


def test_every_error_of_the_flags_is_a_refusal():
    """Wrong numbers, wrong names, too early, too late: never a plain ValueError."""
    for flags, _ in REFUSED:
        with pytest.raises(UsageError):
            config_from_args(parse(flags))


@requires_megatron
def test_a_forks_own_mask_of_documents_is_refused_beside_ours(monkeypatch):
    from megatron_skyladder.megatron_lm import hooks
    from megatron_skyladder.megatron_lm import launch as megatrons

    words = ["--skyladder-start-window", "8", "--skyladder-intra-document"]
    options = patch_calls.add_arguments(argparse.ArgumentParser()).parse_args(words)
    vars(options).update(seq_length=64, global_batch_size=8, train_iters=100, load=None)
    given = {}
    monkeypatch.setattr(hooks, "install_guards", lambda: None)
    monkeypatch.setattr(megatrons, "launch", lambda *_, **names: given.update(names))
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *words, "--intra-doc-masking"])
    pretrain_gpt._launch()
    with pytest.raises(UsageError, match="--intra-doc-masking cannot be combined"):
        given["on_arguments"](options)
