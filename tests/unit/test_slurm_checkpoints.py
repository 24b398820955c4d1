"""Which checkpoints are complete: made by torch, then broken in every way a cluster breaks them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_skyladder.slurm.attempts import RunFolder
from megatron_skyladder.slurm.checkpoints import (
    TRACKER,
    Found,
    find,
    folders,
    newest_local,
    settle,
    why_incomplete,
)
from megatron_skyladder.slurm.settings import Environment, Settings

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


class Index:
    """What an index is to us: attributes, of any class."""

    def __init__(self, **attributes: object) -> None:
        self.__dict__ |= attributes


def replace_index(content: object) -> Callable[[Path], None]:
    return lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(content)) and None  # type: ignore[return-value]


BREAKAGES = {
    "has no .metadata": remove(".metadata"),
    "has no metadata.json, which is written last": remove("metadata.json"),
    "metadata.json is cut off": cut("metadata.json"),
    "__0_0.distcp is missing": remove("__0_0.distcp"),
    "__0_0.distcp has": cut("__0_0.distcp"),
    ".metadata cannot be read": cut(".metadata"),
    "cannot be read (it names no files)": replace_index(Index(storage_data={})),
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


# --- every format that Megatron writes ------------------------------------------------------------


def save_dcp(folder: Path, **state: object) -> None:
    """Save with the call with which Megatron writes torch_dcp and fsdp_dtensor."""
    from torch.distributed import checkpoint

    writer = checkpoint.FileSystemWriter(folder)
    checkpoint.save({"model": {"w": torch.ones(8)}, **state}, storage_writer=writer, no_dist=True)


def save_torch(folder: Path, *, tensor_ranks: int = 2) -> None:
    for rank in range(tensor_ranks):
        (folder / f"mp_rank_{rank:02}").mkdir(parents=True)
        for name in ("model_optim_rng.pt", "distrib_optim.pt"):
            torch.save({"w": torch.ones(1000)}, folder / f"mp_rank_{rank:02}" / name)


def save_zarr(folder: Path) -> None:
    (folder / "model.w").mkdir(parents=True)
    (folder / "common.pt").write_bytes(b"")
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')


FORMATS: dict[str, Callable[[Path], None]] = {
    "torch_dcp, fsdp_dtensor": lambda folder: save_dcp(folder, iteration=20),
    "torch": save_torch,
    "zarr": save_zarr,
    "something new": lambda folder: (folder / "shards").mkdir(parents=True),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_good_checkpoint_of_any_format_is_the_one_to_begin_from(
    tmp_path: Path, name: str
) -> None:
    for iteration in (10, 20):
        FORMATS[name](tmp_path / f"iter_{iteration:07}")
    (tmp_path / TRACKER).write_text("20")
    assert settle(tmp_path) == Found(20, (), "20")
    assert {path.name for path in tmp_path.iterdir()} == {"iter_0000010", "iter_0000020", TRACKER}


@pytest.mark.parametrize("damage", ["__0_0.distcp is missing", "__0_0.distcp has", ".metadata can"])
def test_damage_in_the_dcp_formats_is_found(tmp_path: Path, damage: str) -> None:
    for iteration in (10, 20):
        save_dcp(tmp_path / f"iter_{iteration:07}", iteration=iteration)
    BREAKAGES.get(damage, cut(".metadata"))(tmp_path / "iter_0000020")
    found = settle(tmp_path)
    assert found.newest == 10
    assert damage in found.incomplete[0].reason


def test_half_of_an_asynchronous_save(tmp_path: Path) -> None:
    """The writers are at work in the background: shards, and at the end a .metadata.tmp."""
    save_dcp(tmp_path / "iter_0000010", iteration=10)
    (tmp_path / TRACKER).write_text("10")
    for iteration, names in ((20, ["__0_0.distcp"]), (30, ["common.pt"]), (40, []), (50, ["tmp"])):
        folder = tmp_path / f"iter_{iteration:07}"
        folder.mkdir()
        for name in names:
            (folder / name.replace("tmp", ".metadata.tmp")).write_bytes(b"12345")
    found = settle(tmp_path)
    assert (found.newest, len(found.incomplete), found.unknown) == (10, 4, ())


@pytest.mark.parametrize("mark", ["common.pt", "/shard_"])
def test_a_torch_dist_checkpoint_without_its_mark_is_not_taken_for_another_format(
    tmp_path: Path, mark: str
) -> None:
    """Megatron 0.16 to 0.18 leave common.pt, all of them sharded objects (or either is absent)."""
    folder = tmp_path / "iter_0000010"
    if mark == "common.pt":
        save_dcp(folder)
        (folder / mark).write_bytes(b"1")
    else:
        save_dcp(folder, **{"rng_state/shard_0.0_1.1": {"seed": torch.ones(1)}})
    assert "metadata.json" in str(why_incomplete(folder, named_by_tracker=True))


def test_where_the_files_do_not_tell_the_runs_format_does(tmp_path: Path) -> None:
    for iteration in (10, 20):
        save_dcp(tmp_path / f"iter_{iteration:07}", iteration=iteration)
    assert find(tmp_path).newest == 20  # nothing tells: not touched
    assert find(tmp_path, "fsdp_dtensor").newest == 20
    assert find(tmp_path, "torch_dist").incomplete[0].reason.startswith("it has no metadata.json")
    (tmp_path / "iter_0000010" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    assert find(tmp_path).newest == 10  # written alike, the newer one lacks its last file
    assert find(tmp_path, "torch_dcp").newest == 20  # or the run has another format by now


UNKNOWN = [Index(files={}), Index(storage_data=None), Index(storage_data=[1]), {}, 7, Runs()]


@pytest.mark.parametrize("index", UNKNOWN)
def test_an_index_of_unknown_layout_is_believed(
    save: Callable[..., Path], tmp_path: Path, index: object
) -> None:
    """What is unknown is never renamed; nor is it run."""
    save(10)
    replace_index(index)(save(20))
    assert settle(tmp_path) == Found(20, (), "20")
    assert not Path("/tmp/skyladder-must-not-exist").exists()


def test_an_index_of_another_torch_is_believed(tmp_path: Path) -> None:
    save_dcp(tmp_path / "iter_0000010", iteration=10)
    index = tmp_path / "iter_0000010" / ".metadata"
    index.write_bytes(index.read_bytes().replace(b"relative_path", b"relative_name"))
    assert settle(tmp_path).newest == 10


def test_integrity_manifest(save: Callable[..., Path], tmp_path: Path) -> None:
    """With --verify-integrity a checkpoint without the manifest cannot be loaded."""
    (save(10) / "integrity.json").write_text("{}")
    save(20, noted=False)
    found = settle(tmp_path)
    assert (found.newest, found.incomplete[0].reason[:24]) == (10, "it has no integrity.json")


def test_old_format_with_a_file_that_is_cut_off(tmp_path: Path) -> None:
    for iteration in (10, 20):
        save_torch(tmp_path / f"iter_{iteration:07}")
    (tmp_path / TRACKER).write_text("20")
    cut("mp_rank_01/distrib_optim.pt")(tmp_path / "iter_0000020")
    found = settle(tmp_path)
    assert (found.newest, (tmp_path / TRACKER).read_text()) == (10, "10")
    assert found.incomplete[0].reason == "mp_rank_01/distrib_optim.pt is cut off"


def test_old_format_with_a_torn_note(tmp_path: Path) -> None:
    """Megatron writes the note after all ranks have saved, in place: a torn one is the newest's."""
    for iteration in (10, 20):
        save_torch(tmp_path / f"iter_{iteration:07}")
    (tmp_path / TRACKER).write_text("")
    assert settle(tmp_path).newest == 20
    assert (tmp_path / TRACKER).read_text() == "20"


def test_old_format_without_a_note_is_left_alone(tmp_path: Path) -> None:
    save_torch(tmp_path / "iter_0000010")
    found = settle(tmp_path)
    assert (found.newest, found.incomplete) == (0, ())
    assert "write 10 into it to begin from there" in found.unknown[0].reason
    assert (tmp_path / "iter_0000010").is_dir()


def test_state_of_a_data_loader_does_not_make_it_the_old_format(
    save: Callable[..., Path], tmp_path: Path
) -> None:
    """--dataloader-save writes mp_rank_00/train_dataloader_dprank000.pt beside the shards."""
    state = save(10, noted=False) / "mp_rank_00"
    state.mkdir()
    torch.save({}, state / "train_dataloader_dprank000.pt")
    assert settle(tmp_path).newest == 10


def test_an_unknown_folder_that_is_not_noted_is_named_and_left_alone(
    save: Callable[..., Path], tmp_path: Path
) -> None:
    save(10)
    FORMATS["something new"](tmp_path / "iter_0000020")
    found = settle(tmp_path)
    assert (found.newest, found.incomplete) == (10, ())
    assert "the files of no format that is known here" in found.unknown[0].reason
    assert (tmp_path / "iter_0000020").is_dir()


# --- Megatron Bridge's own tracker file -----------------------------------------------------------

BRIDGES = "latest_train_state.pt"


def note_as_bridge(folder: Path) -> None:
    """Write what Bridge's train_state_finalize_fn writes once the shards are there."""
    step = int(folder.name.removeprefix("iter_"))
    torch.save({"step": torch.tensor(step)}, folder / "train_state.pt")
    shutil.copy(folder / "train_state.pt", folder.parent / BRIDGES)
    (folder.parent / TRACKER).write_text(str(step))


def bridge_begins_from(folder: Path) -> int:
    """What Bridge's _resolve_checkpoint_iteration finds: its own note, else Megatron-LM's."""
    if (folder / BRIDGES).exists():
        return int(torch.load(folder / BRIDGES)["step"])
    return int((folder / TRACKER).read_text())


@pytest.mark.parametrize(
    "damage",
    [remove(".metadata"), remove("__0_0.distcp"), remove("train_state.pt"), cut("train_state.pt")],
)
def test_bridge_goes_back_to_the_newest_complete_one_too(
    save: Callable[..., Path], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    for iteration in (1000, 2000):
        note_as_bridge(save(iteration))
    assert bridge_begins_from(tmp_path) == 2000
    assert settle(tmp_path) == Found(2000, (), "2000")
    (tmp_path / TRACKER).write_text("1000")  # it saves 2000, and does not come to the end of it
    damage(tmp_path / "iter_0002000")
    assert settle(tmp_path).newest == 1000
    assert bridge_begins_from(tmp_path) == 1000
    assert (tmp_path / BRIDGES).read_bytes() == (
        tmp_path / "iter_0001000" / "train_state.pt"
    ).read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_damage_behind_bridges_back(save: Callable[..., Path], tmp_path: Path) -> None:
    for iteration in (1000, 2000):
        note_as_bridge(save(iteration))
    remove("__0_0.distcp")(tmp_path / "iter_0002000")
    settle(tmp_path)
    assert bridge_begins_from(tmp_path) == 1000


def test_bridge_goes_on_with_what_megatron_lm_saved(
    save: Callable[..., Path], tmp_path: Path
) -> None:
    note_as_bridge(save(1000))
    save(2000)
    settle(tmp_path)
    assert bridge_begins_from(tmp_path) == 2000
    assert not (tmp_path / BRIDGES).exists()


def test_bridge_begins_anew_where_all_are_broken(save: Callable[..., Path], tmp_path: Path) -> None:
    note_as_bridge(save(1000))
    remove(".metadata")(tmp_path / "iter_0001000")
    settle(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["incomplete_iter_0001000.1"]


# --- non-persistent and local checkpoints ---------------------------------------------------------


def run_with(path: Path, *flags: str) -> RunFolder:
    path.mkdir(exist_ok=True)
    settings = Settings(str(path), flags, "entry", 1, 1, 0, {}, Environment())
    (path / "settings.json").write_text(settings.to_json())
    return RunFolder(path)


def test_non_persistent_checkpoints_count(made: Path, tmp_path: Path) -> None:
    flags = ("--non-persistent-ckpt-type=global", "--non-persistent-save-interval", "5")
    run = run_with(tmp_path / "run", *flags)
    below = run.checkpoints / "non_persistent"
    assert folders(run.checkpoints, run.flags) == [run.checkpoints, below]
    shutil.copytree(made, run.checkpoints / "iter_0000010")
    shutil.copytree(made, below / "iter_0000015")
    assert run.newest_checkpoint() == 15
    elsewhere = (*flags, "--non-persistent-global-ckpt-dir", f"{tmp_path}/other")
    run = run_with(tmp_path / "run", *elsewhere)
    shutil.copytree(made, tmp_path / "other" / "iter_0000020")
    assert run.newest_checkpoint() == 20
    assert run_with(tmp_path / "run").newest_checkpoint() == 10


def test_local_checkpoints_count_and_are_not_touched(tmp_path: Path) -> None:
    local = tmp_path / "ssd"
    flags = ("--non-persistent-ckpt-type", "local", "--non-persistent-local-ckpt-dir", f"{local}")
    run = run_with(tmp_path / "run", *flags)
    assert newest_local(run.flags) == 0
    (local / "0").mkdir(parents=True)
    for name in ("iter_0000020_0_local.pt", "iter_0000030_0_local.dirty.pt"):
        (local / "0" / name).write_bytes(b"1")
    assert run.newest_checkpoint() == 20
