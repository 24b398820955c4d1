"""skyladder check-gpu at toy size on the CPU: every phase by the code that runs on a GPU."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from megatron_skyladder.attention import sdpa  # noqa: E402
from megatron_skyladder.attention.backends import facts  # noqa: E402
from megatron_skyladder.attention.backends.sdpa import SdpaBackend  # noqa: E402
from megatron_skyladder.cli import check_gpu, main  # noqa: E402
from megatron_skyladder.gpu_check import bench as benches  # noqa: E402
from megatron_skyladder.gpu_check import costs, kernels, page, phases, training  # noqa: E402
from megatron_skyladder.gpu_check.bench import Bench  # noqa: E402
from megatron_skyladder.gpu_check.kernels import Result  # noqa: E402
from megatron_skyladder.ladder import measured  # noqa: E402
from megatron_skyladder.ladder.kernels import Call  # noqa: E402


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(toy=True)


def command(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_skyladder", "check-gpu", *words],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_all_of_it_end_to_end(tmp_path: Path) -> None:
    """Passes, leaves figures, a page and a table that is read; a second call has nothing to do."""
    done = command(tmp_path, "--toy", "--output", "out", SKYLADDER_MEASURED=str(tmp_path / "none"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "check.json").read_text())
    assert list(report["phases"]) == list(phases.PHASES)
    assert not (tmp_path / "none").exists()  # a toy's times are not for training
    table = measured.read("CPU (toy)", tmp_path / "out" / "attention.json")
    assert table is not None and table.order(Call.WINDOWS) == ("sdpa",)
    runs = report["phases"]["megatron"]["figures"]
    assert set(runs) == {"stock", "window 8", "window 64", "documents"}
    assert all(figures["ms"] > 0 for figures in runs.values())
    assert runs["window 64"]["loss"] == pytest.approx(runs["stock"]["loss"], abs=1e-4)
    assert runs["window 8"]["loss"] != runs["stock"]["loss"]
    text = (tmp_path / "out" / "check.html").read_text()
    assert all(f"<h2>{name}: " in text for name in phases.PHASES)
    assert "data:image/png" in text and "passed" in text
    again = command(tmp_path, "--toy", "--output", "out")
    assert again.returncode == 0 and again.stdout.count("done before") == len(phases.PHASES)


def test_without_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("here is one")
    done = command(tmp_path)
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert len(done.stderr.strip().splitlines()) == 1
    assert "torch sees no CUDA device" in done.stderr and "--toy" in done.stderr


def test_wrong_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong usage ends with 2, as the help says and as other commands do; a lack with 1."""
    for words, message in (
        (["--phase", "timing"], "argument --phase: invalid choice: 'timing' (choose from"),
        (["--backends", "sdpa,fa9"], "argument --backends: 'fa9' is none of te, "),
        (["--backends", ""], "argument --backends: '' is none of te, "),
        (["--tou"], "unrecognized arguments: --tou. Did you mean --toy?"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["check-gpu", "--output", str(tmp_path), *words])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert tuple(phases.PHASES) == check_gpu.PHASES
    done = command(tmp_path, "--toy", "--backends", "fa3")
    assert done.returncode == 1 and "--backends fa3 needs FlashAttention 3" in done.stderr
    assert not list(tmp_path.iterdir())


def test_what_a_run_would_not_take_is_left_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that does not fit a kind of call here is tried in the others."""

    def unfit(name: str, call: Call, *, deterministic: bool) -> str | None:
        return "too large" if call is Call.PACKED or deterministic else None

    monkeypatch.setattr(benches.choose, "unfit", unfit)
    found = costs.timings(bench).figures["rows"]
    assert {row["kind"] for row in found} == {"FULL", "WINDOWS"}
    assert costs.memory(bench).figures["sdpa"].keys() == {"full", "window 8", "window 32"}
    chance = kernels.determinism(bench)
    assert chance.figures == {"sdpa": "tried"} and bench.missing["sdpa, PACKED"] == "too large"
    bench.missing.clear()


def test_a_wrong_window_fails_the_numerics(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = sdpa.attend_grid

    def off_by_one(query: Any, key: Any, value: Any, window_len: int, *rest: Any) -> Any:
        return grid(query, key, value, min(window_len + 1, query.shape[0]), *rest)

    monkeypatch.setattr(sdpa, "attend_grid", off_by_one)
    found = kernels.numerics(bench)
    assert any("window 8" in text and "times that of plain" in text for text in found.failures)
    assert any("an output moves where a hidden token" in text for text in found.failures)
    assert not any("full" in text for text in found.failures)


def test_a_value_that_leaks_from_another_segment(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times zero it is nothing, but for an Inf."""
    attend_grid = sdpa.attend_grid

    def leaking(query: Any, key: Any, value: Any, window_len: int, *rest: Any) -> Any:
        return attend_grid(query, key, value, window_len, *rest) + 0.0 * value.sum()

    monkeypatch.setattr(sdpa, "attend_grid", leaking)
    found = kernels.numerics(bench)
    assert found.failures
    assert all("another segment has an Inf" in text for text in found.failures)


def test_chance_fails_the_determinism(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = SdpaBackend.forward

    def noisy(self: SdpaBackend, *arguments: Any) -> Any:
        return forward(self, *arguments) + 1e-2 * torch.rand(())

    monkeypatch.setattr(SdpaBackend, "forward", noisy)
    found = kernels.determinism(bench)
    assert found.failures and all("two passes differ" in text for text in found.failures)


def test_keys_from_the_wrong_place_fail_the_exchange(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = SdpaBackend.forward

    def shifted(self: SdpaBackend, query: Any, key: Any, value: Any, segments: Any) -> Any:
        if segments.cu_seqlens_k is not segments.cu_seqlens_q:
            value = value.roll(1, 0)
        return forward(self, query, key, value, segments)

    monkeypatch.setattr(SdpaBackend, "forward", shifted)
    found = kernels.exchange(bench)
    assert any("4 ranks, layout by zigzag: an output" in text for text in found.failures)
    assert any("2 ranks, layout by sequence: an output" in text for text in found.failures)


def test_a_gradient_that_is_lost_fails_the_exchange(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of keys before the queries; outputs are right."""
    forward = SdpaBackend.forward

    def losing(self: SdpaBackend, query: Any, key: Any, value: Any, segments: Any) -> Any:
        if segments.cu_seqlens_k is not segments.cu_seqlens_q:
            key = key.detach() + 0 * key
        return forward(self, query, key, value, segments)

    monkeypatch.setattr(SdpaBackend, "forward", losing)
    found = kernels.exchange(bench)
    assert any("full, 2 ranks, layout by zigzag: a key's" in text for text in found.failures)
    assert all("a key's gradient" in text for text in found.failures)


def test_a_local_layer_without_its_window_fails_the_numerics(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the ladder's window is the longer one; in global layers nothing is wrong."""
    stock = SdpaBackend.attend_windows

    def ignoring(self: SdpaBackend, query: Any, key: Any, value: Any, segments: Any) -> Any:
        return stock(self, query, key, value, replace(segments, sliding_window=None))

    monkeypatch.setattr(SdpaBackend, "attend_windows", ignoring)
    found = kernels.numerics(bench)
    assert any("window 20, local layer of 8" in text for text in found.failures)
    assert all("local layer of 8" in text for text in found.failures)


def test_the_exchange_of_every_layout(bench: Bench) -> None:
    assert kernels.exchange(bench).failures == []


def test_what_is_slow_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times decide on a GPU: a window slower than the full one, calls that plan."""
    monkeypatch.setattr(benches, "TOY", replace(benches.TOY, judged=True))
    bench = Bench(toy=True)
    times = {"full": 1.0, "window 8": 1.2}
    monkeypatch.setattr(costs, "_time", lambda _, __, mask, *___: times.get(mask.name, 0.5))
    found = costs.timings(bench)
    assert len(found.failures) == 2  # of two micro-batches
    assert all("window 8, 128 tokens" in text for text in found.failures)
    monkeypatch.setattr(costs, "_again", lambda *_: 1e-9)
    assert ["as if it planned" in text for text in costs.churn(bench).failures] == [True]
    rows = found.figures["rows"]
    assert rows[1]["percent_of_full"] == pytest.approx(120)
    assert all("stock_ms" not in row for row in rows)  # nothing here makes stock's call
    by_mask = {row["mask"]: row.get("percent_of_pairs") for row in rows}
    # 16 windows of 8 tokens hold 36 pairs each, the whole sequence 128 * 129 / 2
    assert by_mask["window 8"] == pytest.approx(100 * 16 * 36 / 8256)
    assert by_mask["documents, window 8"] is None  # their pairs are fewer than the window's


def test_a_phase_that_breaks_is_reported_and_tried_again(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def sometimes(bench: Bench, folder: Path) -> Result:
        calls.append(folder)
        if len(calls) == 1:
            raise RuntimeError("CUDA error: an illegal memory access\nmore")
        return Result({"fine": 1})

    monkeypatch.setitem(phases.PHASES, "facts", phases.Phase("facts", "", sometimes, 1))
    report = phases.run(bench, tmp_path, ["facts"])
    assert phases.failures(report) == [
        "facts: the phase ended early: RuntimeError: CUDA error: an illegal memory access"
    ]
    assert "illegal" in (tmp_path / "facts.traceback.txt").read_text()
    assert "illegal memory" in page.write_page(report, tmp_path).read_text()
    for _ in range(2):
        report = phases.run(bench, tmp_path, ["facts"])
        assert phases.failures(report) == [] and len(calls) == 2
    phases.run(bench, tmp_path, ["facts"], fresh=True)
    assert len(calls) == 3
    (tmp_path / "check.json").write_text("{")  # cut off while it was written
    phases.run(bench, tmp_path, ["facts"])
    assert len(calls) == 4


def test_a_table_that_cannot_be_written_hides_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A home folder that is full or read-only, after half an hour of a GPU's time."""

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    found = phases.Phase("facts", "", lambda *_: Result({"fine": 1}), 1)
    monkeypatch.setattr(phases, "PHASES", {"facts": found})
    monkeypatch.setattr(measured, "write", refuse)
    monkeypatch.setattr("megatron_skyladder.cpu.engine.install", lambda: None)
    monkeypatch.setattr(phases, "table", lambda *_: object())
    out = tmp_path / "out"
    arguments = argparse.Namespace(
        toy=True, phase=["facts"], backends=None, output=str(out), fresh=False
    )
    assert check_gpu.run(arguments) == 1
    said = capsys.readouterr().out
    assert "FAILED the table of measured times could not be written: [Errno 30] Read-only" in said
    assert "SKYLADDER_MEASURED" in said and "1 failures" in said
    assert (out / "check.html").exists()


@pytest.mark.parametrize("upgraded", ["flash-attn", "transformer-engine", "cudnn"])
def test_upgraded_kernels_are_checked_anew(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upgraded: str
) -> None:
    """The device, torch and our version stay; only a kernel's package is another."""
    calls = []

    def timed(bench: Bench, folder: Path) -> Result:
        calls.append(folder)
        return Result({"ms": 1})

    monkeypatch.setitem(phases.PHASES, "facts", phases.Phase("facts", "", timed, 1))
    lines: list[str] = []
    for _ in range(2):
        phases.run(bench, tmp_path, ["facts"], tell=lines.append)
    assert len(calls) == 1 and lines[-1].endswith("done before")
    version, cudnn = facts.version, "9.99.0"
    monkeypatch.setattr(facts, "version", lambda x: "9.9.9" if x == upgraded else version(x))
    if upgraded == "cudnn":
        monkeypatch.setattr(facts, "cudnn_version", lambda: cudnn)
    report = phases.run(bench, tmp_path, ["facts"], tell=lines.append)
    assert len(calls) == 2 and report["kernels"][upgraded] in ("9.9.9", cudnn)
    assert f"with another kernels: {tmp_path / 'check.json'}" in lines[-3]


def test_a_wrong_kernel_is_not_in_the_table() -> None:
    def row(backend: str, kind: str, ms: float, **more: Any) -> dict[str, Any]:
        return {
            "backend": backend,
            "kind": kind,
            "ms": ms,
            "seq_length": 8,
            "micro_batch": 1,
        } | more

    rows = [
        row("te", "FULL", 1.0),
        row("fa4", "WINDOWS", 1.0),
        row("fa4", "WINDOWS", 3.0),
        row("flash", "WINDOWS", 1.5),
        row("flash", "PACKED", 2.5),
        row("flash", "PACKED", 99.0, micro_batch=2),
        row("flash", "PACKED", 99.0, seq_length=16),
    ]
    report: dict[str, Any] = {
        "device": "NVIDIA H100",
        "date": "2026-11-29",
        "phases": {
            "timings": {"figures": {"rows": rows}},
            "numerics": {"failures": []},
            "exchange": {"failures": []},
        },
    }
    found = phases.table(report, 8)
    assert found is not None
    assert found.milliseconds == {
        Call.WINDOWS: {"fa4": 2.0, "flash": 1.5},
        Call.PACKED: {"flash": 2.5},
    }
    report["phases"]["numerics"]["failures"] = ["flash, window 8, heads 4/2 of 16: wrong"]
    found = phases.table(report, 8)
    assert found is not None and found.order(Call.WINDOWS) == ("fa4",)
    report["phases"]["exchange"]["failures"] = ["fa4, documents, 2 ranks, layout by tokens: off"]
    assert phases.table(report, 8) is None
    report["phases"]["numerics"]["failures"] = []
    found = phases.table(report, 8)
    assert found is not None and found.order(Call.WINDOWS) == ("flash",)
    report["phases"]["exchange"]["error"] = "RuntimeError: "
    assert phases.table(report, 8) is None
    del report["phases"]["exchange"]
    assert phases.table(report, 8) is None


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_training_that_takes_too_long_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither itself nor what it started, which would be timed along with the next run."""
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    parent = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', sys.argv[1]]); "
        "print(child.pid, flush=True); child.wait()"
    )
    words, log = [sys.executable, "-c", parent, child], tmp_path / "log"
    assert training.call(words, dict(os.environ), log, seconds=2) == 124
    pid = int(log.read_text())
    assert not _is_alive(pid)
    # one that ends by itself, and leaves its child
    words[2] = parent.removesuffix("child.wait()") + "sys.exit(3)"
    assert training.call(words, dict(os.environ), log, seconds=60) == 3
    assert int(log.read_text()) != pid and not _is_alive(int(log.read_text()))


def test_the_trainer_is_in_the_session_that_is_ended(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun would start it in a session of its own, out of reach of a signal to the group."""
    given: list[Any] = []

    def call(*words: Any) -> int:
        given.extend(words)
        return 0

    monkeypatch.setattr(training, "call", call)
    assert training._train(bench, ["--seed", "1"], tmp_path / "a" / "log", 5) == 0
    trainer, environment, log, seconds = given
    assert trainer == [sys.executable, "-m", "megatron_skyladder.pretrain_gpt", "--seed", "1"]
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("0", "1")
    assert log.parent.is_dir() and seconds == 5


def test_training_that_fails_is_reported(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(bench: Bench, words: list[str], log: Path, seconds: float) -> int:
        log.parent.mkdir(parents=True, exist_ok=True)
        slow = "--skyladder-final-window" in words
        line = f" elapsed time per iteration (ms): {150 if slow else 100}.0 | lm loss: 1.0E+00\n"
        log.write_text("RuntimeError: out of memory\n" if "8" in words else line * 5)
        return int("8" in words)

    monkeypatch.setattr(training, "_train", train)
    found = training.megatron(bench, tmp_path)
    assert any("window 8: training ended with 1" in text for text in found.failures)
    assert any("window 64: no word of the mask probe" in text for text in found.failures)
    assert found.figures["window 64"]["times stock"] == pytest.approx(1.5)


def test_trainings_that_no_time_was_left_for_are_trained_by_the_next_call(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, trained = [0.0], []

    def train(bench: Bench, words: list[str], log: Path, seconds: float) -> int:
        trained.append((log.stem, seconds))
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(" elapsed time per iteration (ms): 1.0 | lm loss: 1.0E+00\n" * 5)
        clock[0] += min(200, seconds)
        return 0 if seconds >= 200 else 124

    monkeypatch.setattr(training, "_train", train)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    report = phases.run(bench, tmp_path, ["megatron"])
    # 540 seconds: two trainings, and 140 of the third's 200
    assert trained == [("stock", 540), ("window-8", 340), ("window-64", 140)]
    (failure,) = phases.failures(report)
    assert "9 minutes are over, and window 64 is not trained; what was trained is" in failure
    del trained[:]
    report = phases.run(bench, tmp_path, ["megatron"])
    assert [name for name, _ in trained] == ["window-64", "documents"]
    assert set(report["phases"]["megatron"]["figures"]) == {
        *("stock", "window 8", "window 64", "documents")
    }
    phases.run(bench, tmp_path, ["megatron"])
    assert len(trained) == 2
    del trained[:]
    phases.run(bench, tmp_path, ["megatron"], fresh=True)
    assert trained[0] == ("stock", 540)


def test_a_training_that_hangs_is_a_failure(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had all the time of the phase: to try it again would not end either."""

    def train(bench: Bench, words: list[str], log: Path, seconds: float) -> int:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("waiting for the other ranks\n")
        return 124

    monkeypatch.setattr(training, "_train", train)
    with pytest.raises(training.TimeIsOverError, match="window 8 is not trained"):
        training.megatron(bench, tmp_path)
    with pytest.raises(training.TimeIsOverError, match="window 64 is not trained"):
        training.megatron(bench, tmp_path)
    for _ in range(2):
        with contextlib.suppress(training.TimeIsOverError):
            found = training.megatron(bench, tmp_path)
    assert [text.partition(";")[0] for text in found.failures] == [
        f"{name}: training ended with 124"
        for name in ("stock", "window 8", "window 64", "documents")
    ]
