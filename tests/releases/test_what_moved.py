"""`tools/what_moved.py` finds what a newer Megatron changed under us."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import test_checkouts
from launches import REPOSITORY, require

from megatron_skyladder.megatron_lm import releases
from megatron_skyladder.testing import requires_megatron

sys.path.insert(0, str(REPOSITORY / "tools"))
import what_moved

pytestmark = requires_megatron

TRAINING = "megatron.training.training"


def test_every_hooked_function_is_found_in_the_installed_one() -> None:
    folder = releases.installed().folder
    hooked = what_moved.hooked()
    assert (TRAINING, "train_step") in hooked and (TRAINING, "load_checkpoint") in hooked
    assert ("megatron.core.models.hybrid.hybrid_model", "HybridModel.__init__") in hooked
    for module, name in hooked:
        assert what_moved.parameters(folder, module, name) is not None, name


def test_a_function_that_moved_is_named(tmp_path: Path) -> None:
    folder = releases.installed().folder
    for name in ("training", "core/models", "core/ssm"):
        shutil.copytree(folder / "megatron" / name, tmp_path / "megatron" / name)
    (tmp_path / "megatron" / "core" / "transformer").mkdir()
    for name in ("transformer/multi_token_prediction.py", "optimizer_param_scheduler.py"):
        shutil.copy(folder / "megatron" / "core" / name, tmp_path / "megatron" / "core" / name)
    assert what_moved._hooks(tmp_path, folder) == []
    training = tmp_path / "megatron" / "training" / "training.py"
    text = training.read_text()
    training.write_text(
        text.replace("def evaluate(", "def evaluate_all(").replace(
            "def train_step(forward_step_func,", "def train_step(forward, later,"
        )
    )
    assert training.read_text() != text
    assert what_moved._hooks(tmp_path, folder) == [
        f"{TRAINING}.train_step: +forward +later -forward_step_func",
        f"{TRAINING}.evaluate is gone",
    ]


def test_the_last_row_is_as_known() -> None:
    checkout = require(test_checkouts.VARIABLE, "main", "a folder with Megatron-LM checkouts")
    moved = what_moved.compare(checkout)
    assert moved["patch"] == moved["flags"] == moved["stock script"] == []


def test_what_is_no_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["what_moved.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="give one Megatron-LM checkout"):
        what_moved.main()
