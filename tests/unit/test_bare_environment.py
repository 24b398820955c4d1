"""The commands where the base install is all there is: a laptop, a login node, the first hour."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import venv
from pathlib import Path

import flag_cases
import numpy as np
import pytest
from report_logs import write_log
from test_patching import write_tree

from megatron_skyladder.cli import COMMANDS
from megatron_skyladder.ladder.flags import add_arguments
from megatron_skyladder.ladder.schedules import WindowSchedule

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = ("numpy", "numpy.libs", "argcomplete", "rich", "markdown_it", "mdurl", "pygments")
LAUNCH = "--seq-length 128 --global-batch-size 8 --train-iters 100 --attention-dropout 0"


class Bare:
    """An environment with the base install alone, made of links to this one's packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "venv", symlinks=True)
        packages = Path(np.__file__).parents[1]
        (target,) = (folder / "venv").glob("lib/python*/site-packages")
        for name in BASE:
            if (packages / name).exists():
                (target / name).symlink_to(packages / name)

    def run(self, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.python("-m", "megatron_skyladder", *command.split(), **environment)

    def python(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {"PATH": os.environ["PATH"], "HOME": str(self.folder)}
        return subprocess.run(
            [str(self.folder / "venv/bin/python"), *words],
            env={**inherited, "PYTHONPATH": str(REPOSITORY), **environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
        )


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Bare:
    bare = Bare(tmp_path_factory.mktemp("bare"))
    (bare.folder / "d.jsonl").write_text('{"text": "1 2 3"}\n')
    write_log(bare.folder / "run" / "train.log", WindowSchedule("linear", 32, 8192, alpha=1))
    return bare


NULL = "--tokenizer-type NullTokenizer --vocab-size 10"
# command -> its exit code there
ENDS = {
    "doctor": 1,
    f"doctor {LAUNCH} --skyladder-start-window 8": 1,
    "plan --preset 1b-8k --json": 0,
    f"plan torchrun --nproc-per-node 8 pretrain_gpt.py {LAUNCH}": 0,
    f"plan --from-script {REPOSITORY}/tests/data/launches/train_llama_8b.sh": 0,
    f"plan {LAUNCH} --hiden-size 8": 1,
    f"doctor torchrun --nproc-per-node 8 pretrain_gpt.py {LAUNCH}": 1,
    "flags": 0,
    "flags round": 0,
    "flags --megatron": 0,
    "compare 1b-8k 1b-32k": 0,
    "compare --preset 1b-8k --alpha 1/8 1/100 --evidence": 0,
    "example 1b-8k": 0,
    f"slurm {REPOSITORY}/examples/slurm/1b-8k.ini": None,  # 1 where an sbatch has no cluster
    f"prepare --input d.jsonl --output-prefix d --workers 1 {NULL}": 0,
    "prepare --input d.jsonl --output-prefix e --tokenizer-type Llama2Tokenizer "
    "--tokenizer-model d.jsonl": 1,
    "inspect d_text_document": 0,
    "report run --json": 0,
    "report run": 1,
    "patch check run": 1,
    "demo": 1,
    "study --status": 1,
    f"study {REPOSITORY}/examples/study.ini --status": 0,
    f"study {REPOSITORY}/examples/study.ini --run": 1,
    "export-hf run out --tokenizer-model d.jsonl": 1,
    "import-hf run out": 1,
    "evaluate run --data d --out out": 1,
    "evaluate --prepare d --tasks none": 1,
    "check-gpu": 1,
    "check-gpu --toy": 1,
    "completion bash": 0,
    "completion fish": 0,
    "completion tcsh": 2,
    "--version": 0,
}


@pytest.mark.parametrize("command", ENDS)
def test_no_command_ends_in_a_traceback(bare: Bare, command: str) -> None:
    done = bare.run(command)
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    assert ENDS[command] in (done.returncode, None), done.stderr


def test_flags_are_printed_group_by_group(bare: Bare) -> None:
    """All that training has, and nothing is loaded for it that is not here."""
    shown = bare.run("flags").stdout
    parser = add_arguments(argparse.ArgumentParser(add_help=False))
    for action in parser._actions:
        assert action.option_strings[0] in shown
    titles = [line for line in shown.splitlines() if line.startswith("SkyLadder: ")]
    assert len(titles) == 3 and max(map(len, shown.splitlines())) <= 100
    some = bare.run("flags round").stdout
    assert "--skyladder-round-to" in some and "--skyladder-alpha" not in some
    assert "no flag has xyz" in bare.run("flags xyz").stderr


def test_megatrons_flags_that_matter_are_printed(bare: Bare) -> None:
    shown = bare.run("flags --megatron").stdout
    assert all(f"\n  {flag}\n" in shown for flag in flag_cases.CASES)
    assert shown.startswith("Refused: it asks for what SkyLadder cannot do\n")
    assert max(map(len, shown.splitlines())) <= 100
    some = bare.run("flags --megatron dropout").stdout
    assert "Set --attention-dropout 0." in some and "--qk-clip" not in some


def test_every_command_is_tried() -> None:
    assert {command.split()[0] for command in ENDS} == {*COMMANDS, "--version"}


def test_the_doctor_says_what_is_missing(bare: Bare) -> None:
    done = bare.run(f"doctor --json {LAUNCH} --skyladder-start-window 8", WORLD_SIZE="2", RANK="0")
    report = json.loads(done.stdout)
    assert report["installed"]["torch"] == "not installed"
    assert report["run"]["attention backend"] == "unknown without torch"
    assert report["run"]["schedule"].startswith("linear 8 -> 128")
    torch, megatron = report["problems"]
    assert "pip install torch" in torch and "no Megatron is installed" in megatron


@pytest.mark.parametrize("failure", ["OSError('libcudart.so.12: cannot open')", "KeyError('x')"])
def test_the_doctor_where_parts_are_broken(bare: Bare, tmp_path: Path, failure: str) -> None:
    """Each in its way; what is whole is shown all the same."""
    (tmp_path / "torch.py").write_text(f"raise {failure}\n")
    (tmp_path / "transformer_engine.py").write_text("import torch\n")
    tree = write_tree(tmp_path)
    path = f"{REPOSITORY}{os.pathsep}{tree}{os.pathsep}{tmp_path}"
    report = json.loads(bare.run("doctor --json", PYTHONPATH=path).stdout)
    assert "does not import" in report["installed"]["torch"]
    assert "checkout in" in report["installed"]["megatron"]
    assert "skyladder patch apply" in report["integrations"]["patch"]
    assert any("torch is installed but does not import" in text for text in report["problems"])
    (tree / "pretrain_gpt.py").write_bytes(b"\xff\xfe not a script")
    done = bare.run("doctor --json", PYTHONPATH=path)
    assert "Traceback" not in done.stderr and json.loads(done.stdout)["problems"]


def test_a_missing_package_is_named(bare: Bare) -> None:
    """Also one that a command asks for in mid-work."""
    assert (
        "needs torch, megatron, tokenizers, matplotlib, bokeh, jinja2 too"
        in bare.run("demo").stderr
    )
    text = "import argparse\n\ndef add_parser(s, h): return s.add_parser('demo')\n"
    text += "def run(args): import torch.distributed\n"
    (bare.folder / "late.py").write_text(text)
    call = "import sys, late; sys.modules['megatron_skyladder.cli.demo'] = late; "
    call += "from megatron_skyladder.cli import main; sys.exit(main(['demo']))"
    (bare.folder / "call.py").write_text(call)
    done = bare.python("call.py")
    assert done.returncode == 1
    assert "skyladder demo: this needs the package torch, which is not installed" in done.stderr
