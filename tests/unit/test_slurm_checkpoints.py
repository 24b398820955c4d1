"""Which checkpoints are complete: made by torch, then broken in every way a cluster breaks them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_skyladder.slurm.checkpoints import TRACKER, find, settle, why_incomplete

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Megatron's torch_dist format is: torch's sharded format and a file beside it."""
    from torch.distributed import checkpoint

    folder = tmp_path_factory.mktemp("made")
    state = {f"layer{i}": torch.arange(1000, dtype=torch.float32) for i in range(4)}
    state["args"] = {"lr": 0.1}  # not a tensor
    checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    assert {path.name for path in folder.iterdir()} == {
        *(".metadata", "metadata.json", "__0_0.distcp"),
    }
    return folder


@pytest.fixture
def save(made: Path, tmp_path: Path) -> Callable[..., Path]:
    """Save a complete checkpoint of an iteration."""

    def save_iteration(iteration: int, *, noted: bool = True) -> Path:
        folder = tmp_path / f"iter_{iteration:07}"
        shutil.copytree(made, folder)
        if noted:
            (tmp_path / TRACKER).write_text(str(iteration))
        return folder

    return save_iteration


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 1)


class Runs:
    """A pickle that would run something."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/skyladder-must-not-exist",)


def replace_index(content: object) -> Callable[[Path], None]:
    return lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(content)) and None


BREAKAGES = {
    "has no .metadata": remove(".metadata"),
    "has no metadata.json, which is written last": remove("metadata.json"),
    "metadata.json is cut off": cut("metadata.json"),
    "__0_0.distcp is missing": remove("__0_0.distcp"),
    "__0_0.distcp has": cut("__0_0.distcp"),
    ".metadata cannot be read": cut(".metadata"),
    "it names no files": replace_index({"storage_data": {}}),
    "cannot be read (it names no files)": replace_index(Runs()),
}


@pytest.mark.parametrize("reason", BREAKAGES)
def test_a_broken_checkpoint_is_skipped_and_named(
    save: Callable[..., Path], tmp_path: Path, reason: str
) -> None:
    save(10)
    broken = save(20)
    BREAKAGES[reason](broken)
    found = find(tmp_path)
    assert (found.newest, found.named) == (10, "20")
    (skipped,) = found.incomplete
    assert skipped.folder == broken
    assert reason in skipped.reason
    assert not Path("/tmp/skyladder-must-not-exist").exists()
    assert broken.exists()  # looking changes nothing

    assert settle(tmp_path) == found
    assert (tmp_path / TRACKER).read_text() == "10"
    assert not broken.exists()
    assert (tmp_path / "incomplete_iter_0000020.1").is_dir()
    assert find(tmp_path).incomplete == ()


def test_a_complete_one_is_complete(save: Callable[..., Path], tmp_path: Path) -> None:
    assert why_incomplete(save(10), named_by_tracker=True) is None
    found = settle(tmp_path)
    assert (found.newest, found.incomplete, found.named) == (10, (), "10")


def test_a_checkpoint_that_megatron_did_not_get_to_note_is_used(
    save: Callable[..., Path], tmp_path: Path
) -> None:
    save(10)
    save(20, noted=False)
    assert settle(tmp_path).newest == 20
    assert (tmp_path / TRACKER).read_text() == "20"


def test_a_torn_note_is_mended(save: Callable[..., Path], tmp_path: Path) -> None:
    save(10)
    (tmp_path / TRACKER).write_text("")
    settle(tmp_path)
    assert (tmp_path / TRACKER).read_text() == "10"


def test_all_are_broken(save: Callable[..., Path], tmp_path: Path) -> None:
    for iteration in (10, 20):
        (save(iteration) / ".metadata").unlink()
    found = settle(tmp_path)
    assert found.newest == 0
    assert [entry.folder.name for entry in found.incomplete] == ["iter_0000020", "iter_0000010"]
    assert not (tmp_path / TRACKER).exists()  # Megatron would exit on it


def test_the_same_iteration_may_break_twice(save: Callable[..., Path], tmp_path: Path) -> None:
    for number in (1, 2):
        (save(10) / ".metadata").unlink()
        settle(tmp_path)
        assert (tmp_path / f"incomplete_iter_0000010.{number}").is_dir()


def test_older_broken_ones_are_left_alone(save: Callable[..., Path], tmp_path: Path) -> None:
    (save(10) / ".metadata").unlink()
    save(20)
    assert settle(tmp_path).incomplete == ()
    assert (tmp_path / "iter_0000010").is_dir()


def test_nothing_there(tmp_path: Path) -> None:
    assert settle(tmp_path / "missing").newest == 0
    assert settle(tmp_path).newest == 0


def test_a_converted_checkpoint_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_text("release")
    assert settle(tmp_path).newest == 0
    assert (tmp_path / TRACKER).read_text() == "release"


def test_the_old_format_is_believed_where_megatron_noted_it(tmp_path: Path) -> None:
    for iteration in (10, 20):
        (tmp_path / f"iter_{iteration:07}" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / TRACKER).write_text("10")
    found = find(tmp_path)
    assert found.newest == 10
    assert "not noted it as saved" in found.incomplete[0].reason
