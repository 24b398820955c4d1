"""An import is made once: several at once, again, with other settings, on a full disk."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from random_models import LLAMA, assert_same_model, write_model
from safetensors import SafetensorError
from torch.distributed.checkpoint.filesystem import FileSystem
from trained import VOCAB_SIZE

from megatron_skyladder.cli import main
from megatron_skyladder.hugging_face import exporting, importing, output, torch_dist
from megatron_skyladder.hugging_face.exporting import export
from megatron_skyladder.hugging_face.importing import RECORD, Imported, import_model
from megatron_skyladder.hugging_face.output import Staging

PLAIN = {"without_tokenizer": True, "vocab_size": VOCAB_SIZE}
PATIENCE = 20  # seconds; only a fault waits for them


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "hf", LLAMA)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "megatron"


class Stop(Exception):
    """What stops an import."""


def times(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("first_fails", [False, True])
def test_of_two_at_once_one_writes(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, first_fails: bool
) -> None:
    """The second takes over where the first one fails."""
    convert = importing.weights.layer_to_megatron
    busy, go_on = threading.Event(), threading.Event()
    writers: set[str] = set()
    done: dict[str, Imported] = {}

    def hold(*args):
        name = threading.current_thread().name
        writers.add(name)
        if name == "first":
            busy.set()
            assert go_on.wait(PATIENCE), "nobody waited"
            if first_fails:
                raise Stop
        return convert(*args)

    def wait(seconds: float) -> None:
        """Be there while the other one is in the middle of its files."""
        assert list(out.with_name("megatron.partial").rglob("*.distcp"))
        go_on.set()
        first.join(PATIENCE)

    def run() -> None:
        try:
            done["first"] = import_model(source, out)
        except Stop:
            assert first_fails

    monkeypatch.setattr(importing.weights, "layer_to_megatron", hold)
    first = threading.Thread(target=run, name="first")
    first.start()
    assert busy.wait(PATIENCE)
    # torch would sleep for nobody: the module's own name alone is replaced
    monkeypatch.setattr(importing, "time", type("Clock", (), {"sleep": staticmethod(wait)}))
    second = import_model(source, out)
    first.join(PATIENCE)
    if first_fails:
        assert second.is_new and not done
        assert writers == {"first", threading.current_thread().name}
    else:
        assert done["first"].is_new and not second.is_new
        assert writers == {"first"}
        assert second.flags == done["first"].flags
    assert {path.name for path in out.parent.iterdir()} == {"hf", "megatron"}
    assert {path.name for path in out.iterdir()} == {
        "release",
        "latest_checkpointed_iteration.txt",
        RECORD,
    }
    assert_same_model(export(out, out.parent / "back", **PLAIN).folder, source)


def test_waiting_is_said_once(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks = []

    def look(seconds: float) -> None:
        assert (out.with_name("megatron.partial") / "of another").read_text() == "half"
        looks.append(seconds)
        if len(looks) == 3:
            raise Stop

    monkeypatch.setattr(importing, "time", type("Clock", (), {"sleep": staticmethod(look)}))
    with Staging(out, {}, record=RECORD, resumes=False) as folder:
        (folder / "of another").write_text("half")
        with caplog.at_level("INFO", importing.__name__), pytest.raises(Stop):
            import_model(source, out)
    said = [record.message for record in caplog.records if record.name == importing.__name__]
    assert len(said) == 1 and "waiting for another process" in said[0]


def test_given_again_it_prints_the_same_flags(
    source: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["import-hf", str(source), str(out)]
    assert main(command) == 0
    first = capsys.readouterr()
    before = times(out)
    assert main(command) == 0
    second = capsys.readouterr()
    assert second.out == first.out
    assert second.err == f"{out}: made by an earlier command\n{first.err}"
    # the same weights: how they are trained on is in the flags alone
    assert main([*command, "--seq-length", "256"]) == 0
    longer = capsys.readouterr().out.splitlines()
    assert "--seq-length 256" in longer and f"--load {out}" in longer
    assert times(out) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype was float32 and is bfloat16"),
        ({"tensor_parallel": 2}, "tensor_model_parallel_size was 1 and is 2"),
        ({"divisible_by": 64}, "make_vocab_size_divisible_by was 128 and is 64"),
    ],
)
def test_other_settings_are_refused(source: Path, out: Path, changed: dict, message: str) -> None:
    import_model(source, out)
    before = times(out)
    with pytest.raises(ValueError, match=f"with other settings: {message}. Give what it was made"):
        import_model(source, out, **changed)
    assert times(out) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_another_source_is_refused(source: Path, out: Path, name: str) -> None:
    import_model(source, out)
    os.utime(source / name, ns=(0, 0))
    with pytest.raises(ValueError, match=r"made from something else .* the source is another"):
        import_model(source, out)


def test_a_moved_source_is_the_same(source: Path, out: Path) -> None:
    import_model(source, out)
    moved = source.rename(source.with_name("moved"))
    again = import_model(moved, out)
    assert not again.is_new
    assert f"--tokenizer-model {moved}" in again.flags


def test_a_folder_without_a_record_is_refused(source: Path, out: Path) -> None:
    """Of an earlier version, say: what it was made from is unknown."""
    import_model(source, out)
    (out / RECORD).unlink()
    with pytest.raises(ValueError, match=r"exists already. Delete it, or give another name"):
        import_model(source, out)


def test_a_folder_that_was_trained_in_is_refused(source: Path, out: Path) -> None:
    """--load --finetune would begin anew from what the run has saved."""
    import_model(source, out)
    (out / "latest_checkpointed_iteration.txt").write_text("200\n")
    with pytest.raises(ValueError, match="since the import a run has saved iteration 200 in"):
        import_model(source, out)


def test_what_a_killed_import_left_is_not_used(source: Path, out: Path) -> None:
    """Whatever its settings were; earlier versions left no record and no lock."""
    left = out.with_name("megatron.partial")
    (left / "release").mkdir(parents=True)
    (left / "release" / "__0_7.distcp").write_text("half")
    (left / "link").symlink_to(source, target_is_directory=True)
    (left / RECORD).write_text(json.dumps({"dtype": "float16"}))
    assert import_model(source, out).is_new
    assert not (out / "release" / "__0_7.distcp").exists() and not (out / "link").is_symlink()
    assert not left.exists() and (source / "config.json").is_file()
    assert not import_model(source, out).is_new


@contextmanager
def full(*args: object) -> Iterator[object]:
    """A file on a full disk, instead of the one that is asked for.

    On a real one the buffer is empty when the file is closed, and nothing but torch's own error is
    left: a RuntimeError about positions.
    """
    file = open("/dev/full", "wb")  # noqa: SIM115
    try:
        yield file
    finally:
        with suppress(OSError):
            file.close()


@contextmanager
def full_path(path: Path) -> Iterator[Path]:
    yield Path("/dev/full")


def no_file(*args: object) -> None:
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


@pytest.mark.parametrize(
    ("where", "name", "instead", "reason"),
    [
        (FileSystem, "create_stream", full, "No space left on device"),  # torch's zip writer
        (torch_dist, "whole", full_path, "No space left on device"),  # common.pt
        (torch_dist, "write_text", no_file, "Disk quota exceeded"),
        (output.files, "write_text", no_file, "Disk quota exceeded"),  # before anything else
        (output, "sync_folder", no_file, "Disk quota exceeded"),  # after everything else
    ],
)
def test_an_import_to_a_full_disk(
    source: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    where: object,
    name: str,
    instead: object,
    reason: str,
) -> None:
    """A message, and nothing that takes room: none of it would be used again."""
    with monkeypatch.context() as patch:
        patch.setattr(where, name, instead)
        assert main(["import-hf", str(source), str(out)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        f"skyladder import-hf: could not write {out}.partial: {reason}. Make room there and "
        "give the same command again; it begins anew.\n"
    )
    assert [path.name for path in out.parent.iterdir()] == ["hf"]
    assert main(["import-hf", str(source), str(out)]) == 0


@pytest.mark.parametrize(
    "text",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",
        'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "..." })',
    ],
)
def test_an_export_to_a_full_disk_goes_on(
    source: Path,
    out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
) -> None:
    checkpoint = import_model(source, out).folder
    back = tmp_path / "back"
    save, saved = exporting.save_file, []

    def save_three(tensors: dict, path: Path, **more: object) -> None:
        if len(saved) == 3:
            Path(path).write_bytes(b"half a shard")
            raise SafetensorError(text)
        saved.append(path)
        save(tensors, path, **more)

    command = ["export-hf", str(checkpoint), str(back)]
    command += ["--without-tokenizer", "--vocab-size", str(VOCAB_SIZE)]
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "save_file", save_three)
        assert main(command) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"skyladder export-hf: could not write {back}.partial: No space left on device. Make "
        "room there and give the same command again; it goes on after the last whole file."
    )
    partial = tmp_path / "back.partial"
    before = times(partial)
    assert sum(name.endswith(".safetensors") for name in before) == 3
    assert not list(partial.glob("*.partial"))  # the half of a shard takes no room
    assert main(command) == 0
    shards = {name: time for name, time in before.items() if name.endswith(".safetensors")}
    assert shards.items() <= times(back).items()
    assert_same_model(back, source)


def test_other_errors_of_safetensors_are_no_full_disk(
    source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **more: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)")

    checkpoint = import_model(source, out).folder
    monkeypatch.setattr(exporting, "save_file", fail)
    with pytest.raises(SafetensorError, match="os error 5"):
        export(checkpoint, tmp_path / "back", **PLAIN)


def test_a_file_system_without_locks_is_named(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And another command's files stay: without a lock nobody knows whose they are."""

    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    partial = out.with_name("megatron.partial")
    partial.mkdir()
    (partial / "of another").write_text("half")
    monkeypatch.setattr(output.fcntl, "flock", no_locks)
    with pytest.raises(ValueError, match=r"cannot lock .* Function not implemented. Give a"):
        import_model(source, out)
    assert (partial / "of another").read_text() == "half"
