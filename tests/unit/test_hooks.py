"""Hooks: what is wrapped, once, and what is refused; tests/distributed has what they do."""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable
from typing import Any

import pytest

from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module in the place of Megatron's, with a function and a method to wrap."""
    import sys

    fake: Any = types.ModuleType("fake_megatron")

    class Model:
        def __init__(self, size: int) -> None:
            self.size = size

    def train(steps: int) -> int:
        return steps

    fake.Model, fake.train = Model, train
    monkeypatch.setitem(sys.modules, "fake_megatron", fake)
    return fake


def hook(name: str, wrap: Callable[..., Any]) -> Any:
    from megatron_skyladder.megatron_lm.hooks import Hook

    return Hook("fake_megatron", name, wrap, "to test it")


def doubling(original: Callable[[int], int]) -> Callable[[int], int]:
    return lambda steps: 2 * original(steps)


def test_every_hook_names_a_function_of_megatron_and_says_why() -> None:
    from megatron_skyladder.megatron_lm.hooks import GUARDS, HOOKS, STAGES

    places = [(each.module, each.name) for each in (*HOOKS, *GUARDS, *STAGES.values())]
    assert len(set(places)) == len(places)
    for each in (*HOOKS, *GUARDS, *STAGES.values()):
        owner: Any = importlib.import_module(each.module)
        for part in each.name.split("."):
            owner = getattr(owner, part)
        assert callable(owner) and each.reason.startswith("to ")


def test_a_function_is_wrapped_once(module: Any) -> None:
    from megatron_skyladder.megatron_lm import hooks

    for _ in range(2):  # as when a model is built twice in a process
        hooks._wrap(hook("train", doubling))
    assert module.train(3) == 6


def test_a_method_is_wrapped_where_it_is_looked_up(module: Any) -> None:
    from megatron_skyladder.megatron_lm import hooks

    def wrap(original: Callable[..., None]) -> Callable[..., None]:
        return lambda self, size: original(self, size + 1)

    hooks._wrap(hook("Model.__init__", wrap))
    assert module.Model(1).size == 2


def test_what_megatron_does_not_have_is_named(module: Any) -> None:
    from megatron_skyladder.megatron_lm import hooks
    from megatron_skyladder.megatron_lm.releases import MegatronMismatchError

    for name in ("evaluate", "Model.forward", "Other.__init__"):
        with pytest.raises(MegatronMismatchError, match=f"no fake_megatron.{name}, which .*to tes"):
            hooks._wrap(hook(name, doubling))


def test_somebody_elses_wrapper_is_refused_naming_both(module: Any) -> None:
    from megatron_skyladder.megatron_lm import hooks
    from megatron_skyladder.megatron_lm.releases import MegatronMismatchError

    original = module.train

    @functools.wraps(original)
    def theirs(steps: int) -> int:
        return original(steps)

    theirs.__module__ = "another_framework"
    module.train = theirs
    with pytest.raises(MegatronMismatchError, match="already wrapped by another_framework, and "):
        hooks._wrap(hook("train", doubling))
