"""Checkpoints are unpickled with an allowlist: a file cannot run code by being read."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import types
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from random_models import LLAMA, write_model
from trained import VOCAB_SIZE

from megatron_skyladder.hugging_face import pickles
from megatron_skyladder.hugging_face.checkpoints import open_checkpoint
from megatron_skyladder.hugging_face.exporting import export
from megatron_skyladder.hugging_face.importing import import_model
from megatron_skyladder.ladder import schedules


class Harmful:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return import_model(write_model(tmp_path / "hf", LLAMA), tmp_path / "megatron").folder


def test_common_state_runs_no_code(checkpoint: Path, tmp_path: Path) -> None:
    common = checkpoint / "release" / "common.pt"
    state = torch.load(common, weights_only=False)
    state["args"].surprise = Harmful(tmp_path / "ran")
    torch.save(state, common)
    with pytest.raises(ValueError, match=r"common.pt holds .* posix.mkdir.*--trust-check"):
        open_checkpoint(checkpoint)
    assert not (tmp_path / "ran").exists()
    open_checkpoint(checkpoint, trust=True)
    assert (tmp_path / "ran").exists()


def test_metadata_runs_no_code(checkpoint: Path, tmp_path: Path) -> None:
    metadata = checkpoint / "release" / ".metadata"
    content = pickle.loads(metadata.read_bytes())
    content.planner_data = Harmful(tmp_path / "ran")
    metadata.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"metadata holds an object of type posix.mkdir"):
        export(checkpoint, tmp_path / "out", without_tokenizer=True, vocab_size=VOCAB_SIZE)
    assert not (tmp_path / "ran").exists()


def test_a_tensor_file_runs_no_code(checkpoint: Path, tmp_path: Path) -> None:
    folder = checkpoint / "release"
    info = open_checkpoint(checkpoint).reader
    name = "decoder.final_layernorm.weight"
    index = next(key for key in info._storage if key.fqn == name)
    place = info._storage[index]
    torch.save(Harmful(tmp_path / "ran"), tmp_path / "harmful.pt")
    harmful = (tmp_path / "harmful.pt").read_bytes()
    shutil.copy(tmp_path / "harmful.pt", folder / "other.distcp")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.storage_data[index] = type(place)("other.distcp", 0, len(harmful))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"other.distcp holds an object of type posix.mkdir"):
        open_checkpoint(checkpoint).reader.read(name)
    assert not (tmp_path / "ran").exists()


def make_legacy(folder: Path, **extra: object) -> Path:
    ranks = folder / "iter_0000002" / "mp_rank_00"
    ranks.mkdir(parents=True)
    args = Namespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, **extra)
    model = {"decoder.layers.0.input_layernorm.weight": torch.ones(4)}
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 2, "model": model}
    torch.save(state, ranks / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    return folder


def test_format_torch_runs_no_code(tmp_path: Path) -> None:
    folder = make_legacy(tmp_path / "run", surprise=Harmful(tmp_path / "ran"))
    with pytest.raises(ValueError, match=r"model_optim_rng.pt holds .*--trust-checkpoint"):
        open_checkpoint(folder)
    assert not (tmp_path / "ran").exists()
    assert open_checkpoint(folder, trust=True).iteration == 2
    assert (tmp_path / "ran").exists()


def test_stages_of_our_first_release_are_on_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lay in Megatron's arguments, under the module's name of then."""
    former = types.ModuleType("megatron_skyladder.schedules")

    class Stage:
        def __init__(self, window: int) -> None:
            self.window = window

    Stage.__module__, Stage.__qualname__ = former.__name__, "Stage"
    former.Stage = Stage  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, former.__name__, former)
        folder = make_legacy(tmp_path / "run", skyladder_stages=[Stage(128)])
    (stage,) = open_checkpoint(folder).args.skyladder_stages
    assert type(stage) is schedules.Stage and stage.window == 128


def test_what_megatron_puts_into_arguments_is_on_the_list(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    import datetime
    import signal
    from fractions import Fraction

    import numpy as np
    from megatron.core.transformer.enums import AttnBackend

    folder = make_legacy(
        tmp_path / "run",
        attention_backend=AttnBackend.auto,
        exit_signal=signal.SIGTERM,
        save=tmp_path,
        skyladder_alpha=Fraction(1, 8),
        params_dtype=torch.bfloat16,
        timeout=datetime.timedelta(minutes=1),
        rng=np.random.RandomState(1).get_state(),
        number=np.float64(0.5),
    )
    args = open_checkpoint(folder).args
    assert args.skyladder_alpha == Fraction(1, 8)
    assert args.params_dtype is torch.bfloat16
    assert isinstance(args.attention_backend, pickles.Foreign)  # Megatron was not imported for it


def test_members_of_enumerations_that_python_3_11_wrote(tmp_path: Path) -> None:
    """They are pickled as getattr(Class, name); getattr on anything else is refused."""
    good = b"cbuiltins\ngetattr\n(cmegatron.core.enums\nModelType\nVencoder_or_decoder\ntR."
    (tmp_path / "good").write_bytes(good)
    assert isinstance(pickles.load_pickle(tmp_path / "good", trust=False), pickles.Foreign)
    bad = b"cbuiltins\ngetattr\n(cargparse\nNamespace\nV__init__\ntR."
    (tmp_path / "bad").write_bytes(bad)
    with pytest.raises(ValueError, match=r"type Namespace.__init__,"):
        pickles.load_pickle(tmp_path / "bad", trust=False)


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    folder = make_legacy(tmp_path / "run")
    path = folder / "iter_0000002" / "mp_rank_00" / "model_optim_rng.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/constants.pkl", b"")
    with pytest.raises(ValueError, match="TorchScript"):
        open_checkpoint(folder, trust=True)
    path.write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="was not written by torch"):
        open_checkpoint(folder)
