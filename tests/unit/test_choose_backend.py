"""Which backend a name stands for, with what is installed here; tests/te has the other packages."""

from __future__ import annotations

import sys
import types

import pytest

torch = pytest.importorskip("torch")

from megatron_skyladder.attention import backends  # noqa: E402
from megatron_skyladder.attention.backends import choose_backend  # noqa: E402
from megatron_skyladder.cpu import engine as cpu_engine  # noqa: E402


@pytest.fixture(autouse=True)
def no_cpu_engine(monkeypatch):
    """As on a GPU; packages that are not there, whatever is installed."""
    monkeypatch.setattr(cpu_engine, "is_installed", lambda: False)
    monkeypatch.setattr(cpu_engine, "is_requested", lambda: False)
    for name in ("transformer_engine", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, None)
    backends._best_backend.cache_clear()
    yield
    backends._best_backend.cache_clear()


def flash_attn(function):
    return types.SimpleNamespace(flash_attn_varlen_func=function)


def test_auto_says_what_it_passed_over():
    name, reason = choose_backend("auto")
    assert name == "varlen"
    assert reason.startswith("no transformer-engine (ModuleNotFoundError: ")
    assert "; no flash-attn 2.4 or later (ModuleNotFoundError: " in reason
    assert reason.endswith("; varlen is installed")


def test_auto_takes_flash_attention_before_torchs_own(monkeypatch):
    def function(q, window_size, deterministic):
        raise NotImplementedError

    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn(function))
    assert choose_backend("auto")[0] == "flash"


def test_auto_takes_sdpa_in_float32_and_on_the_cpu(monkeypatch):
    assert choose_backend("auto", torch.float32) == (
        "sdpa",
        "the model is float32, the others take float16 and bfloat16",
    )
    monkeypatch.setattr(cpu_engine, "is_requested", lambda: True)
    assert choose_backend("auto") == ("sdpa", "the CPU engine runs, the others need a GPU")


def test_a_package_that_breaks_on_import_is_not_there(monkeypatch, tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.syspath_prepend(tmp_path)
    assert "later (OSError: undefined symbol); varlen" in choose_backend("auto")[1]


def test_what_was_named_has_to_be_there(monkeypatch):
    with pytest.raises(ValueError, match=r"backend=te needs transformer-engine .*Install it, or"):
        choose_backend("te")

    def of_an_old_release(q):
        raise NotImplementedError

    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn(of_an_old_release))
    with pytest.raises(ValueError, match=r"2.4 or later .*does not take window_size, determ"):
        choose_backend("flash")
    assert choose_backend("varlen") == ("varlen", "as --skyladder-attention-backend says")
