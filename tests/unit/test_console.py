"""What reaches the console of which rank: no warning a thousand times, and none never."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_skyladder import megatron_lm
from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.config import TrainingRun, make_config
from megatron_skyladder.megatron_bridge import checkpoints
from megatron_skyladder.megatron_bridge import releases as bridges
from megatron_skyladder.megatron_lm import flag_rules, from_environment, releases
from megatron_skyladder.runtime import console
from megatron_skyladder.runtime.console import log_to_console
from megatron_skyladder.testing import requires_megatron


@pytest.fixture
def said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[str, Callable[[], object]], str]]:
    """Return what a rank's console shows while something is done."""
    package = logging.getLogger("megatron_skyladder")
    before = package.handlers[:], package.propagate, package.level

    def by_rank(rank: str, do: Callable[[], object]) -> str:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", str(int(rank) % 8))
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


def test_the_first_rank_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    assert console.is_first_of_node()  # nobody counts: rather said often than never
    monkeypatch.setenv("SLURM_LOCALID", "5")
    assert not console.is_first_of_node()
    monkeypatch.setenv("LOCAL_RANK", "0")  # torchrun, of a job of Slurm's
    assert console.is_first_of_node()


def flags() -> None:
    flag_rules.check({"attention_dropout": 0.0, "softmax_type": "learnable"})


def preset() -> None:
    make_config(TrainingRun(64, 8, 800), {"schedule": "constant", "alpha": "1"})


def misspelt() -> None:
    from_environment.flags({"SKYLADDER_STRAT_WINDOW": "8"})


def spec() -> None:
    run = {"seq_length": 128, "global_batch_size": 8, "train_iters": 100, "train_samples": None}
    hooks = SimpleNamespace(FINGERPRINT="skyladder_fingerprint", install=lambda *_: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "megatron_skyladder.megatron_lm.hooks", hooks)  # type: ignore
        patch.setattr(megatron_lm, "hooks", hooks, raising=False)
        from_environment.switch_on(Namespace(**run))


@pytest.mark.parametrize(
    ("follow", "text"),
    [
        (flags, "attends with a sink"),
        (preset, "alpha has no effect with schedule=constant"),
        (misspelt, "SKYLADDER_STRAT_WINDOW is set, but there is no such flag"),
        (spec, "documents are not masked: --spec brings the window alone"),
    ],
)
def test_what_follows_from_the_flags_is_said_by_the_first_rank(
    said: Callable[..., str], follow: Callable[[], None], text: str
) -> None:
    assert text in said("0", follow)
    assert said("3", follow) == ""


def test_errors_are_not_warnings(said: Callable[..., str]) -> None:
    with pytest.raises(UsageError):
        said("3", lambda: flag_rules.check({"attention_dropout": 0.1}))


def other_megatron() -> None:
    releases.release_of(releases.Megatron("0.23.0", Path("/opt/Megatron-LM")))


def other_bridge() -> None:
    bridges.check("0.7.0")


def nothing_to_guard() -> None:
    from megatron_skyladder.megatron_lm import hooks

    def miss(hook: object) -> None:
        raise releases.MegatronMismatchError("Megatron has no such function")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "_wrap", miss)
        patch.setattr(hooks, "GUARDS", hooks.GUARDS[:1])
        hooks.install_guards()


def nothing_to_end() -> None:
    from megatron_skyladder.megatron_lm import hooks

    def miss(hook: object) -> None:
        raise releases.MegatronMismatchError("another package has wrapped the function")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "_wrap", miss)
        patch.setattr(hooks, "GUARDS", ())
        patch.setattr(hooks, "ENDED", hooks.ENDED[:1])
        hooks.install_ended()


def unreadable() -> None:
    def damaged(state: object, consumed: int) -> None:
        raise FileNotFoundError("no run_config.yaml")

    trained = SimpleNamespace(step=3, consumed_train_samples=24)
    cfg = SimpleNamespace(checkpoint=SimpleNamespace(load="/run/checkpoints"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "_read", damaged)
        checkpoints.loaded(SimpleNamespace(train_state=trained, cfg=cfg), may_be_unknown=True)


@pytest.mark.parametrize(
    ("follow", "text"),
    [
        (other_megatron, "Megatron 0.23.0 is untested"),
        (other_bridge, "Megatron Bridge 0.7.0 is untested"),
        pytest.param(nothing_to_guard, "Megatron has no such function", marks=requires_megatron),
        pytest.param(nothing_to_end, "has wrapped the function", marks=requires_megatron),
        (unreadable, "the checkpoint in /run/checkpoints cannot be read"),
    ],
)
def test_what_follows_from_what_a_node_has_is_said_once_there(
    said: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    follow: Callable[[], None],
    text: str,
) -> None:
    """Another node may have other packages, or not see the files."""
    monkeypatch.setenv(releases.ALLOW_VARIABLE, "1")
    assert text in said("0", follow)
    assert text in said("8", follow)
    assert said("3", follow) == said("11", follow) == ""
