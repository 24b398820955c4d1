"""One node's torchrun and its ranks, without Slurm: logs, errors, the end, and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_skyladder.slurm import node
from megatron_skyladder.slurm.attempts import RunFolder
from megatron_skyladder.slurm.settings import Environment, Settings
from megatron_skyladder.testing import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 120
# Saves for half a second once asked to leave. Listens late, as Megatron does.
PATIENT = """\
import atexit, os, pathlib, signal, sys, time
rank, asked = os.environ["RANK"], []
here = pathlib.Path(os.environ["SKYLADDER_RUN_DIR"])
print("rank", rank, "prints")
(here / f"up.{rank}").touch()
while not (here / "listen").exists():
    time.sleep(0.05)
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
(here / f"listening.{rank}").touch()
while not asked:
    time.sleep(0.05)
time.sleep(0.5)
(here / f"saved.{rank}").touch()
handler = here / f"handler.{rank}"
atexit.register(lambda: handler.write_text(repr(signal.getsignal(signal.SIGTERM))))
sys.exit(0)
"""


class Ranks:
    """Starts things as a job does, in a run folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.run = RunFolder(folder / "run")
        self.attempt = self.run.attempt_folder(1)
        self.attempt.mkdir(parents=True)
        self.script = folder / "entry.py"
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "SKYLADDER_RUN_DIR": str(self.run.path),
            "SKYLADDER_ATTEMPT_DIR": str(self.attempt),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "0",
            "RANK": "0",
        }

    def start(self, module: str, *words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"megatron_skyladder.slurm.{module}", *words]
        return subprocess.Popen(command, env=self.environment, start_new_session=True)

    def rank(self, text: str, entry: str | None = None) -> int:
        """Run some Python as a rank and return its exit code."""
        self.script.write_text(text)
        return self.start("rank", entry or str(self.script), "--lr", "1").wait(SECONDS)

    def node(self, text: str, ranks: int = 2) -> subprocess.Popen[bytes]:
        """Start a node with some Python as its ranks."""
        self.script.write_text(text)
        settings = Settings(
            str(self.run.path), ("--lr", "1"), str(self.script), 1, ranks, 0, {}, Environment()
        )
        (self.run.path / "settings.json").write_text(settings.to_json())
        self.environment["MASTER_PORT"] = str(free_port())
        return self.start("node", str(self.run.path))

    def log(self, rank: int = 0) -> str:
        return (self.attempt / f"rank.{rank:04}.log").read_text()

    def error(self, rank: int = 0) -> str:
        report = json.loads((self.attempt / f"error.{rank:04}.json").read_text())
        assert report["rank"] == rank and abs(report["time"] - time.time()) < SECONDS
        return report["message"]

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not all((self.run.path / name).exists() for name in names):
            assert time.monotonic() < deadline, names
            time.sleep(0.05)

    @property
    def has_error(self) -> bool:
        return any(self.attempt.glob("error.*"))


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    return Ranks(tmp_path)


# --- a rank ---------------------------------------------------------------------------------------


def test_a_rank_that_comes_to_the_end(ranks: Ranks) -> None:
    text = "import sys, os\nprint('out', sys.argv[1:])\nos.system('echo a child >&2')\n"
    assert ranks.rank(text) == 0
    assert "out ['--lr', '1']" in ranks.log() and "a child" in ranks.log()
    assert ranks.run.is_finished
    assert not ranks.has_error


def test_only_rank_0_says_that_training_has_ended(ranks: Ranks) -> None:
    ranks.environment["RANK"] = "3"
    assert ranks.rank("print('done')") == 0
    assert "done" in ranks.log(3)
    assert not ranks.run.is_finished


def test_leaving_early_is_no_end_and_no_error(ranks: Ranks) -> None:
    assert ranks.rank("import sys; sys.exit(0)") == 0
    assert not ranks.run.is_finished
    assert not ranks.has_error


def test_errors_are_reported(ranks: Ranks) -> None:
    assert ranks.rank("raise MemoryError('none left')") == 1
    assert ranks.error() == "MemoryError: none left"
    assert "Traceback" in ranks.log()
    assert not ranks.run.is_finished


def test_a_reported_error_has_no_secret(ranks: Ranks) -> None:
    """It gets into status.txt, which others read."""
    ranks.environment["WANDB_API_KEY"] = "0123456789abcdef"
    ranks.rank("import os; raise ValueError('API key ' + os.environ['WANDB_API_KEY'] + ' is bad')")
    assert ranks.error() == "ValueError: API key *** is bad"


def test_a_reported_error_is_text(ranks: Ranks) -> None:
    """The name of a file may be none, and status.txt is written in UTF-8."""
    ranks.rank("raise ValueError('no file a\\udcff.bin')")
    assert ranks.error() == "ValueError: no file a\\udcff.bin"


def test_exit_codes_are_reported(ranks: Ranks) -> None:
    assert ranks.rank("import sys; sys.exit(3)") == 3
    assert ranks.error() == "exit code 3"


@pytest.mark.parametrize(
    ("text", "code"), [("sys.exit(3)", 3), ("raise MemoryError('none left')", 1)]
)
def test_a_full_disk_neither_hides_an_error_nor_leaves_a_part_of_it(
    ranks: Ranks, text: str, code: int
) -> None:
    full = "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
    assert ranks.rank(full + text) == code
    assert not ranks.has_error


def test_a_report_that_cannot_be_written_is_not_the_last_word(ranks: Ranks) -> None:
    (ranks.attempt / "error.0000.json").mkdir()
    assert ranks.rank("raise MemoryError('none left')") == 1
    assert ranks.log().splitlines()[-1] == "MemoryError: none left"
    assert "IsADirectoryError" not in ranks.log()


def test_what_a_rank_leaves_with_is_reported(ranks: Ranks) -> None:
    assert ranks.rank("import sys; sys.exit('rank 0: the checkpoint is unreadable')") == 1
    assert ranks.error() == "the checkpoint is unreadable"


def test_what_the_user_can_mend_is_reported_as_such(ranks: Ranks) -> None:
    """`pretrain_gpt` exits with 2 and a message on the log; a rank needs the message."""
    pytest.importorskip("torch")
    ranks.environment["SKYLADDER_DEVICE"] = "tpu"
    assert ranks.rank("", entry="megatron_skyladder.pretrain_gpt") == 1
    assert ranks.error() == "UsageError: SKYLADDER_DEVICE=tpu is unknown. Set it to cpu or cuda."


def test_a_script_finds_its_neighbours(ranks: Ranks) -> None:
    """As a checkout's pretrain_gpt.py has to."""
    (ranks.script.parent / "neighbour.py").write_text("VALUE = 7\n")
    assert ranks.rank("import neighbour; assert neighbour.VALUE == 7") == 0


def test_a_rank_that_does_not_listen_yet_or_any_longer_is_not_killed(ranks: Ranks) -> None:
    ranks.script.write_text(PATIENT)
    rank = ranks.start("rank", str(ranks.script))
    ranks.wait_for("up.0")
    rank.send_signal(signal.SIGTERM)
    (ranks.run.path / "listen").touch()
    ranks.wait_for("listening.0")
    rank.send_signal(signal.SIGTERM)
    assert rank.wait(SECONDS) == 0
    assert (ranks.run.path / "saved.0").exists()
    assert "SIG_IGN" in (ranks.run.path / "handler.0").read_text()


# --- a node ---------------------------------------------------------------------------------------


def note(ranks: Ranks, process: subprocess.Popen[bytes]) -> None:
    (ranks.attempt / "signal").write_text("time limit\n")


def stop(ranks: Ranks, process: subprocess.Popen[bytes]) -> None:
    (ranks.run.path / "stop").touch()


def signal_all(ranks: Ranks, process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGTERM)


WAYS: dict[str, Callable[[Ranks, subprocess.Popen[bytes]], None]] = {
    "USR1, from the job script": lambda ranks, process: process.send_signal(signal.SIGUSR1),
    "TERM, to every process": signal_all,
    "the job script's note": note,
    "a stop file": stop,
}


@pytest.mark.parametrize("way", WAYS)
def test_ranks_are_asked_to_save(ranks: Ranks, way: str) -> None:
    """Before they listen; one that listens late is not forgotten."""
    pytest.importorskip("torch")
    running = ranks.node(PATIENT)
    ranks.wait_for("up.0", "up.1")
    WAYS[way](ranks, running)
    time.sleep(node.POLL_SECONDS + 0.5)
    (ranks.run.path / "listen").touch()
    assert running.wait(SECONDS) == 0
    ranks.wait_for("saved.0", "saved.1")
    assert not ranks.has_error and not ranks.run.is_finished
    assert "rank 1 prints" in ranks.log(1)
    assert (ranks.attempt / "node.0.log").exists()


WANDB = """\
import os, wandb
run = wandb.init(dir=os.environ["SKYLADDER_RUN_DIR"], name="n", project="p", config={})
print("W&B run", run.id, "resume", run.settings.resume)
run.log({"loss": 1.0}, 1)
run.finish()
"""


def test_attempts_are_one_run_of_weights_and_biases(ranks: Ranks) -> None:
    """With the call of Megatron's _set_wandb_writer, which names neither an id nor resume."""
    pytest.importorskip("torch")
    pytest.importorskip("wandb")
    ranks.environment["WANDB_MODE"] = "offline"
    assert ranks.node(WANDB, ranks=1).wait(SECONDS) == 0
    assert f"W&B run {ranks.run.wandb_id()} resume allow" in ranks.log()


def test_the_name_of_the_wandb_run_is_chosen_once(tmp_path: Path) -> None:
    folders = [RunFolder(tmp_path / name / "a#run") for name in ("one", "two")]
    for run in folders:
        run.path.mkdir(parents=True)
    first, again, other = (
        node.rank_environment(run, {"A": "b"}) for run in (folders[0], folders[0], folders[1])
    )
    assert first == again and first["A"] == "b" and first["WANDB_RESUME"] == "allow"
    assert first["WANDB_RUN_ID"].startswith("a-run-")
    assert first["WANDB_RUN_ID"] != other["WANDB_RUN_ID"]  # another run of the same name
    mine = {"WANDB_RUN_ID": "mine", "WANDB_RESUME": "must"}  # such as from [variables]
    assert node.rank_environment(folders[0], mine).items() >= mine.items()


def test_a_rank_that_fails_ends_the_node(ranks: Ranks) -> None:
    pytest.importorskip("torch")
    text = "import os, signal, time\nassert os.environ['RANK'] == '0', 'bad node'\n"
    # as torchrun sends it to the others; a rank that hangs it kills after 30 seconds
    text += "signal.signal(signal.SIGTERM, signal.SIG_DFL)\ntime.sleep(1000)\n"
    begun = time.monotonic()
    assert ranks.node(text).wait(SECONDS) == 1
    assert ranks.error(1) == "AssertionError: bad node"
    assert "exitcode" in (ranks.attempt / "node.0.log").read_text()
    assert time.monotonic() - begun < SECONDS


def test_the_command_line(tmp_path: Path) -> None:
    settings = Settings(
        *(str(tmp_path), ("--lr", "1", "--save", "elsewhere"), "entry", 4, 8, 8, {}),
        Environment(),
    )
    environment = {
        "SLURM_STEP_NUM_NODES": "4",
        "SLURM_NODEID": "2",
        "MASTER_ADDR": "alpha",
        "MASTER_PORT": "7",
    }
    words = " ".join(node.command(RunFolder(tmp_path), settings, environment))
    assert "--nnodes 4 --node-rank 2 --nproc-per-node 8 --master-addr alpha" in words
    assert "-m megatron_skyladder.slurm.rank entry --lr 1 --save elsewhere" in words
    # the run folder's checkpoints win: it is them that the next attempt begins from
    folder = tmp_path / "checkpoints"
    assert f"--save elsewhere --save {folder} --load {folder}" in words
    assert words.endswith("--exit-signal-handler")


def test_the_command_line_of_bridge(tmp_path: Path) -> None:
    flags = ("--recipe", "recipes.py:mine", "skyladder.start_window=8")
    settings = Settings(
        *(str(tmp_path), flags, "megatron_skyladder.megatron_bridge", 1, 8, 8, {}), Environment()
    )
    environment = {"MASTER_ADDR": "alpha", "MASTER_PORT": "7"}
    words = node.command(RunFolder(tmp_path), settings, environment)
    start = words.index("megatron_skyladder.megatron_bridge")
    assert words[start + 1 :] == [
        *flags,
        f"checkpoint.save={tmp_path / 'checkpoints'}",
        f"checkpoint.load={tmp_path / 'checkpoints'}",
        f"logger.tensorboard_dir={tmp_path / 'tensorboard'}",
        "train.exit_signal_handler=true",
    ]
