"""What reaches the console of which rank: no warning a thousand times, and none never."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.config import TrainingRun, make_config
from megatron_skyladder.megatron_lm import flag_rules
from megatron_skyladder.runtime import console
from megatron_skyladder.runtime.console import log_to_console


@pytest.fixture
def said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[str, Callable[[], object]], str]]:
    """Return what a rank's console shows while something is done."""
    package = logging.getLogger("megatron_skyladder")
    before = package.handlers[:], package.propagate, package.level

    def by_rank(rank: str, do: Callable[[], object]) -> str:
        monkeypatch.setenv("RANK", rank)
        package.handlers.clear()
        log_to_console()
        do()
        return capsys.readouterr().err

    yield by_rank
    package.handlers[:], package.propagate, package.level = before


def test_what_one_rank_alone_knows_is_seen(said: Callable[..., str]) -> None:
    def warn() -> None:
        logging.getLogger("megatron_skyladder.runtime.probe").warning("not finite here")

    assert said("0", warn) == said("3", warn) == "SkyLadder: WARNING: not finite here\n"


def test_ranks_that_srun_alone_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bridge may be started without torchrun; its processes have Slurm's number alone."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    assert console.rank() == 0
    monkeypatch.setenv("SLURM_PROCID", "5")
    assert console.rank() == 5 and not console.is_first_rank()
    monkeypatch.setenv("RANK", "0")  # torchrun, of a job of Slurm's
    assert console.is_first_rank()


def flags() -> None:
    flag_rules.check({"attention_dropout": 0.0, "softmax_type": "learnable"})


def preset() -> None:
    make_config(TrainingRun(64, 8, 800), {"schedule": "constant", "alpha": "1"})


@pytest.mark.parametrize(
    ("follow", "text"),
    [(flags, "attends with a sink"), (preset, "alpha has no effect with schedule=constant")],
)
def test_what_follows_from_the_flags_is_said_by_the_first_rank(
    said: Callable[..., str], follow: Callable[[], None], text: str
) -> None:
    assert text in said("0", follow)
    assert said("3", follow) == ""


def test_errors_are_not_warnings(said: Callable[..., str]) -> None:
    with pytest.raises(UsageError):
        said("3", lambda: flag_rules.check({"attention_dropout": 0.1}))
