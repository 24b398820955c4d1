"""The folder appears whole, an export that was stopped goes on, and memory holds two layers."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from random_models import LLAMA, all_weights, assert_same_model, write_model
from trained import VOCAB_SIZE, Runs

from megatron_skyladder.evaluation import run
from megatron_skyladder.hugging_face import exporting, output
from megatron_skyladder.hugging_face.architecture import Architecture
from megatron_skyladder.hugging_face.checkpoints import open_checkpoint
from megatron_skyladder.hugging_face.exporting import export
from megatron_skyladder.hugging_face.importing import import_model
from megatron_skyladder.hugging_face.output import InUseError, Staging
from megatron_skyladder.hugging_face.pickles import Foreign
from megatron_skyladder.testing import requires_megatron

PLAIN = {"without_tokenizer": True, "vocab_size": VOCAB_SIZE}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "hf", LLAMA)


@pytest.fixture
def checkpoint(source: Path, tmp_path: Path) -> Path:
    return import_model(source, tmp_path / "megatron").folder


class Stop(Exception):
    """What stops an export."""


def stop_after(parts: int):
    def on_part(done: int, total: int) -> None:
        if done == parts:
            raise Stop

    return on_part


def test_a_stopped_export_goes_on(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(Stop):
        export(checkpoint, out, **PLAIN, on_part=stop_after(3))
    assert not out.exists()
    before = {p.name: p.stat().st_mtime_ns for p in partial.glob("*.safetensors")}
    assert len(before) == 3
    (partial / ".model-00004-of-00006.safetensors.1.partial").write_bytes(b"half a shard")
    done = export(checkpoint, out, **PLAIN)
    assert done.is_new
    after = {p.name: p.stat().st_mtime_ns for p in out.glob("*.safetensors")}
    assert len(after) == 6
    assert before.items() <= after.items()  # not written again
    assert not partial.exists()
    assert not list(out.glob("*.partial")) + list(out.glob(".lock"))
    assert_same_model(out, source)


def test_a_finished_export_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(checkpoint, out, **PLAIN)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert not export(checkpoint, out, **PLAIN).is_new
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(ValueError, match=r"with other settings: config.*dtype was float32 and"):
        export(checkpoint, out, **PLAIN, dtype="bfloat16")


def test_another_export_does_not_go_on_in_its_place(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        export(checkpoint, out, **PLAIN, on_part=stop_after(2))
    with pytest.raises(
        ValueError, match=r"other settings: config.*dtype was float32 and is float16"
    ):
        export(checkpoint, out, **PLAIN, dtype="float16")
    (checkpoint / "release" / "metadata.json").touch()  # another checkpoint in its place
    with pytest.raises(ValueError, match="other settings: checkpoint was"):
        export(checkpoint, out, **PLAIN)
    assert not out.exists()


def test_two_at_once_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with (
        Staging(tmp_path / "out", {}),
        pytest.raises(ValueError, match="another command is writing it"),
        Staging(tmp_path / "out", {}),
    ):
        pass


def test_an_evaluation_waits_for_anothers_export(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the tasks of a job array do; the second one finds the finished folder."""
    monkeypatch.setattr(run, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(exporting, "export", functools.partial(export, **PLAIN))
    busy, said = threading.Event(), []
    go_on = threading.Event()

    def on_part(done: int, total: int) -> None:
        busy.set()
        go_on.wait(60)

    first = threading.Thread(
        target=export,
        args=(checkpoint, tmp_path / "exported"),
        kwargs={**PLAIN, "on_part": on_part},
    )

    def report(text: str) -> None:
        said.append(text)
        go_on.set()

    first.start()
    busy.wait(60)
    found = run.exported(checkpoint, tmp_path, report)
    first.join()
    assert found == tmp_path / "exported" and len(said) == 1
    assert "waiting for another process" in said[0]
    assert not (tmp_path / "exported.partial").exists()


def test_nobody_begins_in_a_folder_that_is_about_to_get_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    def another(folder: Path) -> None:
        with pytest.raises(InUseError), Staging(tmp_path / "out", {}):
            pass
        refused.append(folder.name)

    with Staging(tmp_path / "out", {}) as folder:
        (folder / "a").write_text("whole")
        monkeypatch.setattr(output, "sync_folder", another)
    assert refused == ["out.partial", tmp_path.name]  # before and after the folder has its name
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").glob(".lock"))


def test_a_folder_that_was_finished_meanwhile_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InUseError), Staging(tmp_path / "out", {}):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_import_that_fails_leaves_nothing_in_its_place(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_skyladder.hugging_face import importing

    def fail(*args: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(importing.weights, "layer_to_megatron", fail)
        with pytest.raises(Stop):
            import_model(source, tmp_path / "megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    import_model(source, tmp_path / "megatron")


def test_what_the_folder_holds(checkpoint: Path, tmp_path: Path) -> None:
    out = export(checkpoint, tmp_path / "out", **PLAIN).folder
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = all_weights(out)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert {path.name for path in out.iterdir()} == {
        *(f"model-{i:05d}-of-00006.safetensors" for i in range(1, 7)),
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "README.md",
        "skyladder_export.json",
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_can_be_rounded(checkpoint: Path, source: Path, tmp_path: Path, dtype: str) -> None:
    out = export(checkpoint, tmp_path / "out", **PLAIN, dtype=dtype).folder
    wanted = getattr(torch, dtype)
    for name, tensor in all_weights(source).items():
        assert torch.equal(all_weights(out)[name], tensor.to(wanted))


@requires_megatron
def test_the_card_says_where_it_comes_from(runs: Runs, tmp_path: Path) -> None:
    done = export(runs.checkpoint("llama"), tmp_path / "out", without_tokenizer=True)
    card = (done.folder / "README.md").read_text()
    assert "| checkpoint | iteration 3 (torch_dist) |" in card
    assert "| training tokens | 768 |" in card  # 3 steps of 4 sequences of 64
    assert "linear 8 -> 64, fraction 0.5 of 3 steps" in card
    assert "| window at this checkpoint | 64 of 64 tokens |" in card
    assert done.notes == []


@requires_megatron
def test_a_window_that_has_not_reached_its_end_is_noted(runs: Runs, tmp_path: Path) -> None:
    """Such a model has never seen its length."""
    source = open_checkpoint(runs.checkpoint("llama"))
    plain = {k: v for k, v in vars(source.args).items() if not isinstance(v, Foreign)}
    args = Namespace(**plain)
    args.consumed_train_samples = 4  # step 1 of 3, half of which grow
    args.train_iters = 100
    common = tmp_path / "run" / "iter_0000001"
    common.mkdir(parents=True)
    for path in source.folder.iterdir():
        (common / path.name).symlink_to(path)
    torch.save({"args": args, "iteration": 1}, common / "common.pt")
    done = export(tmp_path / "run", tmp_path / "out", without_tokenizer=True)
    assert len(done.notes) == 1
    assert "stands at a window of 9 of 64 tokens" in done.notes[0]
    assert "stands at a window of 9 of 64 tokens" in (done.folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda args: vars(args).update(num_layers=5), "holds 4 layers, but its arguments say 5"),
        (lambda args: vars(args).update(ffn_hidden_size=81), r"make it \[162, 32\]"),
        (lambda args: vars(args).update(add_qkv_bias=True), r"a layer lacks .*linear_qkv.bias"),
        (
            lambda args: vars(args).update(
                untie_embeddings_and_output_weights=False, hidden_size=16
            ),
            r"hidden size of 16",
        ),
    ],
)
def test_weights_have_to_be_what_the_arguments_say(
    checkpoint: Path, tmp_path: Path, damage, message: str
) -> None:
    path = checkpoint / "release" / "common.pt"
    state = torch.load(path, weights_only=False)
    damage(state["args"])
    torch.save(state, path)
    with pytest.raises(ValueError, match=message):
        export(checkpoint, tmp_path / "out", **PLAIN)
    assert not (tmp_path / "out").exists()


def test_what_is_no_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "nothing", "is not a folder"),
        (tmp_path / "hf", r"has no checkpoints \(iter_\*\)"),
    ):
        with pytest.raises(ValueError, match=message):
            open_checkpoint(path)
    with pytest.raises(ValueError, match=r"has no iter_0000007. It has: none"):
        open_checkpoint(checkpoint, iteration=7)
    with pytest.raises(ValueError, match="is one iteration already, not --iteration=7"):
        open_checkpoint(checkpoint / "release", iteration=7)
    with pytest.raises(ValueError, match="tokenizer has 600 tokens"):
        export(checkpoint, tmp_path / "out", without_tokenizer=True, vocab_size=600)
    (checkpoint / "release" / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"neither .metadata .* nor mp_rank_\*"):
        open_checkpoint(checkpoint)


def test_an_incomplete_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    reader = open_checkpoint(checkpoint).reader
    entry = reader.tensors["decoder.layers.mlp.linear_fc2.weight"]
    entry.chunks[:] = [chunk for chunk in entry.chunks if chunk.offsets[0] != 2]
    reader.read_layer(1)
    with pytest.raises(ValueError, match=r"holds only 0 of the 2,560 values of .*linear_fc2"):
        reader.read_layer(2)


MEASURE = """
import argparse, json, sys, threading, time
from pathlib import Path
from megatron_skyladder.hugging_face import legacy
from megatron_skyladder.hugging_face.checkpoints import open_checkpoint
from megatron_skyladder.hugging_face.exporting import export
from megatron_skyladder.hugging_face.importing import import_model
import torch
torch.set_num_threads(1)

class Watch:
    '''The largest private memory (RssAnon: without pages of files) of a block, in bytes.'''
    def __enter__(self):
        self.before, self.peak, self.over = self.now(), 0, False
        self.thread = threading.Thread(target=self.run); self.thread.start()
        return self
    def __exit__(self, *_):
        self.over = True; self.thread.join()
    def run(self):
        while not self.over:
            self.peak = max(self.peak, self.now()); time.sleep(0.0002)
    def now(self):
        status = Path("/proc/self/status").read_text()
        return next(int(l.split()[1]) << 10 for l in status.splitlines() if l.startswith("RssAnon"))

source, folder, vocab = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
import_model("%s" % (folder / "small"), folder / "warm-up")  # lazy imports
export(folder / "warm-up", folder / "warm-up-hf", without_tokenizer=True, vocab_size=330)
used = {}
with Watch() as watch:
    import_model(source, folder / "megatron")
used["import"] = watch.peak - watch.before
with Watch() as watch:
    export(folder / "megatron", folder / "out", without_tokenizer=True, vocab_size=vocab)
used["export"] = watch.peak - watch.before

source = open_checkpoint(folder / "megatron")
model = {name: source.reader.read(name) for name in source.reader.outside_layers()}
for index in range(source.args.num_layers):
    layer = source.reader.read_layer(index)
    model |= {f"decoder.layers.{index}.{name}": tensor for name, tensor in layer.items()}
for rank in range(2):  # one whole model, cut nowhere but in two
    path = folder / "legacy" / "iter_0000001" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    cut = {name: legacy._CUT.get(name.split(".", 3)[-1], legacy._CUT.get(name)) for name in model}
    part = {n: t if cut[n] is None else t.chunk(2, cut[n])[rank].clone() for n, t in model.items()}
    args = argparse.Namespace(**{**vars(source.args), "tensor_model_parallel_size": 2})
    torch.save({"args": args, "checkpoint_version": 3.0, "model": part}, path)
    del part
del model, layer
with Watch() as watch:
    export(folder / "legacy", folder / "legacy-hf", without_tokenizer=True, vocab_size=vocab)
used["export of format torch"] = watch.peak - watch.before
print(json.dumps(used))
"""


def test_memory_holds_two_layers_and_the_embedding(tmp_path: Path) -> None:
    """Measured from outside: what the process has of its own, while a 0.4 GB model passes."""
    shape = {"hidden_size": 768, "ffn_hidden_size": 3072, "head_dim": 96, "num_heads": 8}
    shape |= {"num_groups": 4, "num_layers": 10, "vocab_size": 12_000}
    model = Architecture(**{**vars(LLAMA), **shape})
    source = write_model(tmp_path / "hf", model)
    write_model(tmp_path / "small", LLAMA)
    script = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), str(tmp_path), "12000"],
        # every tensor is a mapping of its own, which goes back at once
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert script.returncode == 0, script.stderr
    used = json.loads(script.stdout.splitlines()[-1])
    layer = 4 * (768 * (8 + 8) * 96 + 768 * 768 + 3 * 768 * 3072)
    embedding = 4 * 12_000 * 768
    whole = 10 * layer + 2 * embedding
    print({name: f"{size / 2**20:.0f} MiB" for name, size in used.items()}, end=" ")
    print(f"layer {layer / 2**20:.0f}, embedding {embedding / 2**20:.0f}, all {whole / 2**20:.0f}")
    assert max(used.values()) < 2 * layer + embedding < whole / 3
