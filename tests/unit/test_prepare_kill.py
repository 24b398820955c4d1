"""SIGKILL at random moments: the next run goes on, and the files end up the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import prepare_inputs as tiny
import pytest

# small batches, a commit after each, and work that takes a moment
PROGRAM = """
import sys, time
from megatron_skyladder.cli import main
from megatron_skyladder.data import output, sources
sources.BATCH_BYTES, output.COMMIT_SECONDS = 2000, 0.02
add = output.ResumableOutput.add
output.ResumableOutput.add = lambda *args, **counts: (time.sleep(0.01), add(*args, **counts))
sys.exit(main(sys.argv[1:]))
"""
# more by hand: SKYLADDER_KILLS=100
NUM_KILLS = int(os.environ.get("SKYLADDER_KILLS", "4"))


def start(prefix: Path, path: Path) -> subprocess.Popen:
    tokenizer = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "1000"]
    flags = ["--input", str(path), "--output-prefix", str(prefix), "--workers", "2", *tokenizer]
    return subprocess.Popen([sys.executable, "-c", PROGRAM, "prepare", *flags])


def children(pid: int) -> list[int]:
    """Return the process's children, as far as this system tells."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def is_running(pid: int) -> bool:
    """Whether the process is there and is no zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_at_random_and_resumed(tmp_path: Path) -> None:
    texts = [" ".join(str((i + j) % 999) for j in range(60)) for i in range(225 * NUM_KILLS)]
    path = tiny.write_json_lines(tmp_path / "a.jsonl", texts)
    assert start(tmp_path / "straight", path).wait() == 0
    chance = random.Random(NUM_KILLS)
    journal, kills, workers = tmp_path / "out.prepare.journal", 0, []
    while True:
        process = start(tmp_path / "out", path)
        before = journal.stat().st_size if journal.exists() else 0
        while process.poll() is None and kills < NUM_KILLS:
            grown = journal.stat().st_size - before if journal.exists() else 0
            if grown > 0:  # it has got somewhere: now, or in a moment
                time.sleep(chance.random() * 0.1)
                workers += children(process.pid)
                process.kill()
                kills += 1
                break
            time.sleep(0.005)
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert kills > NUM_KILLS // 2  # a busy machine may finish before the last one
    for part in ("bin", "idx"):
        out, straight = (tmp_path / f"{name}_text_document.{part}" for name in ("out", "straight"))
        assert out.read_bytes() == straight.read_bytes()
    assert not list(tmp_path.glob("*.partial")) and not journal.exists()
    deadline = time.monotonic() + 10
    while any(is_running(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(worker) for worker in workers), "workers outlive a killed run"
