"""Evaluation behind a run under SLURM: the section [evaluate], its script, what is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from test_slurm import directives, fake_sbatch, read

from megatron_skyladder.cli import main
from megatron_skyladder.slurm import evaluation, script
from megatron_skyladder.slurm.settings import Evaluation, Settings

RUN = """\
[run]
example = 1b-8k
folder = /runs/ladder
flags = --data-path d --tokenizer-model t
[slurm]
partition = a100
time = 24:00:00
exclusive =
mem = 0
[environment]
kind = apptainer
image = /images/megatron.sif
setup = source .venv/bin/activate
"""
EVALUATE = """\
[evaluate]
data = /data/eval
checkpoints = 0020000 latest
tasks = standard niah_multikey_2,niah_multikey_3 mdqa
length = 32768
full = yes
time = 2:00:00
"""


def assignments(text: str) -> dict[str, str]:
    """What the settings in a script assign, as bash reads them."""
    inside = text.partition(script.BEGIN)[2].partition(script.END)[0]
    names = ("NAME", "DATA", "OUT", "CHECKPOINTS", "TASKS", "OPTIONS", "PREFIX", "ONLY_FINISHED")
    printed = "".join(f'\nprintf "%s\\n" "{name}=${{{name}[*]}}"' for name in names)
    done = subprocess.run(["bash", "-uc", inside + printed], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def test_the_section_by_hand(tmp_path: Path) -> None:
    settings = read(tmp_path, RUN + EVALUATE)
    assert settings.evaluation == Evaluation(
        data="/data/eval",
        out="/runs/ladder/evaluation",
        name="ladder",
        checkpoints=("20000", "latest"),
        groups=("standard", "niah_multikey_2,niah_multikey_3", "mdqa"),
        options=("--length", "32768", "--full", "--device", "cuda"),
        time="2:00:00",
    )
    assert settings.evaluation.num_jobs == 6
    (tmp_path / "settings.json").write_text(settings.to_json())
    assert Settings.read(tmp_path) == settings
    assert read(tmp_path, RUN).evaluation is None


def test_the_script_by_hand(tmp_path: Path) -> None:
    settings = read(tmp_path, RUN + EVALUATE)
    text = evaluation.job_script(settings, only_finished=True)
    assert directives(text) == {
        "job-name": "ladder-evaluation",
        "nodes": "1",
        "ntasks": "1",
        "gpus-per-node": "1",
        "partition": "a100",
        "time": "2:00:00",
        "output": "/runs/ladder/evaluation/slurm-%A_%a.out",
        "open-mode": "append",
        "requeue": None,
        "array": "0-5",
    }
    found = assignments(text)
    assert found["CHECKPOINTS"] == "20000 latest"
    assert found["TASKS"] == "standard niah_multikey_2,niah_multikey_3 mdqa"
    assert found["OPTIONS"] == "--length 32768 --full --device cuda"
    assert "--nv --bind /runs/ladder:/runs/ladder --bind /data/eval:/data/eval" in found["PREFIX"]
    assert found["ONLY_FINISHED"] == "yes"
    by_hand = assignments(evaluation.job_script(settings, only_finished=False))
    assert by_hand["ONLY_FINISHED"] == ""


# what training asks whole nodes with, and what says where a user may run
WHOLE_NODES = """\
[slurm]
cpus-per-task = 64
gpus = 16
nodelist = node[1-2]
mem-per-cpu = 4G
time-min = 12:00:00
threads-per-core = 1
account = me
constraint = a100
exclude = node7
"""


def asked_for(folder: Path, slurm: str, evaluate: str = "") -> dict[str, str | None]:
    run = RUN.partition("[slurm]")[0]
    settings = read(folder, f"{run}{slurm}\n[evaluate]\ndata = /data/eval\n{evaluate}\n")
    found = directives(evaluation.job_script(settings, only_finished=True))
    ours = ("job-name", "nodes", "ntasks", "time", "output", "open-mode", "requeue", "array")
    return {name: value for name, value in found.items() if name not in ours}


@pytest.mark.parametrize(
    ("evaluate", "found"),
    [
        ("", {"gpus-per-node": "1", "cpus-per-task": "8"}),  # of 64 for 8 GPUs
        ("gpus = 2", {"gpus-per-node": "2", "cpus-per-task": "16"}),
        ("cpus = 12", {"gpus-per-node": "1", "cpus-per-task": "12"}),
        ("gpus = 0", {"cpus-per-task": "64"}),
        ("gpus = 0\ncpus = 4", {"cpus-per-task": "4"}),
        ("gpus = 16", {"gpus-per-node": "16", "cpus-per-task": "64"}),
    ],
)
def test_a_job_asks_for_what_it_needs(
    tmp_path: Path, evaluate: str, found: dict[str, str | None]
) -> None:
    where = {"account": "me", "constraint": "a100", "exclude": "node7"}
    assert asked_for(tmp_path, WHOLE_NODES, evaluate) == where | found


def test_what_is_counted_by_gpu_stays_where_there_is_one(tmp_path: Path) -> None:
    slurm = "[slurm]\nmem-per-gpu = 100G\ncpus-per-gpu = 6\n"
    by_gpu = {"mem-per-gpu": "100G", "cpus-per-gpu": "6", "gpus-per-node": "1"}
    assert asked_for(tmp_path, slurm) == by_gpu
    assert asked_for(tmp_path, slurm, "gpus = 0") == {}
    del by_gpu["cpus-per-gpu"]  # sbatch takes one of the two
    assert asked_for(tmp_path, slurm, "cpus = 8") == by_gpu | {"cpus-per-task": "8"}


def test_gres_in_place_of_gpus_per_node(tmp_path: Path) -> None:
    slurm = "[slurm]\ngres = gpu:4\ngpus-per-node = 0\nranks-per-node = 4\ncpus-per-task = 32\n"
    assert asked_for(tmp_path, slurm) == {"gpus-per-node": "1", "cpus-per-task": "8"}


@pytest.mark.parametrize(
    ("task", "model", "words"),
    [
        (0, "/runs/ladder/checkpoints/iter_0020000", "--name ladder-20000 --tasks standard"),
        (2, "/runs/ladder/checkpoints/iter_0020000", "--name ladder-20000 --tasks mdqa"),
        (3, "/runs/ladder/checkpoints", "--name ladder --tasks standard"),
        (5, "/runs/ladder/checkpoints", "--name ladder --tasks mdqa"),
    ],
)
def test_which_task_asks_what(tmp_path: Path, task: int, model: str, words: str) -> None:
    """The script itself under bash, with an srun that prints its words."""
    text = evaluation.job_script(read(tmp_path, RUN + EVALUATE), only_finished=False)
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s " "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", text],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": str(task)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    command = done.stdout.partition("-m megatron_skyladder evaluate ")[2].split()
    assert command[0] == model
    given = dict(zip(command[1::2], command[2::2], strict=False))
    assert f"--name {given['--name']} --tasks {given['--tasks']}" == words


def test_an_unfinished_run_is_not_evaluated(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    text = RUN.replace("/runs/ladder", str(folder)) + EVALUATE
    script_text = evaluation.job_script(read(tmp_path, text), only_finished=True)
    done = subprocess.run(
        ["bash", "-c", script_text],
        env={"PATH": "/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "the run is not finished" in done.stdout


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("tasks = standard\n", r"names no data in \[evaluate\]"),
        ("data = /d\ncheckpoints = newest\n", "checkpoints = newest in .* give iterations"),
        ("data = /d\ncheckpoint = 1\n", r"has checkpoint in \[evaluate\]. Known there are: data"),
        ("data = /d\ntasks =\n", r"tasks in \[evaluate\] is empty"),
        ("data = /d\nlength = long\n", "length = long .* whole number"),
        ("data = /d\ncpus = 0\n", "cpus = 0 .* whole number from 1"),
        ("data = /d\nname = SkyLadder 1B\n", "has name = SkyLadder 1B: .* Give a name"),
        ("data = /d\nname = a#b\n", "has name = a#b: results go into a folder of that name"),
        ("data = /d\nname = 50%\n", "has name = 50%"),
        ("data = /d\nname = a/b\n", "has name = a/b"),
        ("data = /d\nname = .a\n", "has name = .a"),
        ("data = /d\nname = -a\n", "has name = -a"),
        ("data = /d\nname =\n", "has name = : "),
        ("data = /d\nout = /scores/50%\n", r"out = /scores/50% in \[evaluate\] has a character"),
        ("data = /d\ngpus = two\n", "gpus = two .* whole number from 0"),
        ("data\n", r"has data in \[evaluate\] without a value"),
    ],
)
def test_mistakes_in_the_section(tmp_path: Path, section: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, f"{RUN}[evaluate]\n{section}")


def test_a_run_folder_that_gives_no_name(tmp_path: Path) -> None:
    text = RUN.replace("/runs/ladder", "/runs/.ladder")
    assert read(tmp_path, text).evaluation is None
    with pytest.raises(ValueError, match=r"has no name, and the run folder is \.ladder"):
        read(tmp_path, text + EVALUATE)
    assert read(tmp_path, f"{text}{EVALUATE}name = ladder\n").evaluation is not None


def test_results_may_go_where_a_blank_is(tmp_path: Path) -> None:
    settings = read(tmp_path, f"{RUN}{EVALUATE}out = /my scores\n")
    text = evaluation.job_script(settings, only_finished=True)
    assert directives(text)["output"] == '"/my scores/slurm-%A_%a.out"'
    assert "--output=/my scores/slurm-%A_%a.out" in script.on_command_line(
        evaluation.job_options(settings)
    )


@pytest.mark.parametrize(
    ("evaluate", "found"),
    [("", "h100:1"), ("gpus = 2", "h100:2"), ("gpus = a100:1", "a100:1"), ("gpus = 0", None)],
)
def test_gpus_of_a_type_behind_training(tmp_path: Path, evaluate: str, found: str | None) -> None:
    asked = asked_for(tmp_path, "[slurm]\ngpus-per-node = h100:4\n", evaluate)
    assert asked.get("gpus-per-node") == found


def with_data(folder: Path) -> Path:
    """Write an example file with [evaluate] whose data is there."""
    path = folder / "run.ini"
    (folder / "data").mkdir()
    text = RUN.replace("/runs/ladder", str(folder / "run")) + EVALUATE
    path.write_text(text.replace("/data/eval", str(folder / "data")))
    return path


def test_the_array_is_checked_before_training_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuses = 'case "$*" in *--job-name=ladder-evaluation*) echo "no such qos" >&2; exit 1; esac'
    fake_sbatch(tmp_path, monkeypatch, refuses.replace("ladder", "run") + "; echo 7")
    words = ["slurm", str(with_data(tmp_path)), "--submit"]
    assert main(words) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "no such qos This is the evaluation behind training; nothing is submitted" in error
    assert not (tmp_path / "run").exists()


def test_what_no_check_is_possible_of_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With all nodes down, sbatch queues jobs, and --test-only refuses them."""
    down = 'case "$*" in *--test-only*) echo "not available" >&2; exit 1; esac; echo 7'
    fake_sbatch(tmp_path, monkeypatch, down)
    assert main(["slurm", str(with_data(tmp_path)), "--submit"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "submitted 7",
        "evaluation after it: 7, 6 jobs",
    ]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("echo limit >&2; exit 1", "sbatch refuses the job: limit Training is submitted (7)."),
        ("echo sent; exit 0", "but: sent Look with squeue --name=run-evaluation whether the array"),
    ],
)
def test_an_array_that_is_refused_behind_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: str,
    message: str,
) -> None:
    refuses = f'case "$*" in *--parsable*--dependency=afterany:7*) {answer};; esac; echo 7'
    fake_sbatch(tmp_path, monkeypatch, refuses)
    assert main(["slurm", str(with_data(tmp_path)), "--submit"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "To evaluate it, give --evaluate --submit once it is finished" in error
    assert (tmp_path / "run" / "job.sbatch").exists()


def test_the_array_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its options are on the command line, and what a site prints beside the id is no job."""
    body = f'echo "$@" > {tmp_path}/call; env > {tmp_path}/got; echo "Welcome"; echo 7'
    fake_sbatch(tmp_path, monkeypatch, body)
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "400")
    assert main(["slurm", str(with_data(tmp_path)), "--evaluate", "--submit"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "submitted 7"
    assert "--partition=a100 --time=2:00:00" in (tmp_path / "call").read_text()
    assert "SLURM_MEM_PER_NODE" not in (tmp_path / "got").read_text()


def test_what_is_missing_is_said_before_anything_queues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.ini"
    path.write_text(RUN.replace("/runs/ladder", str(tmp_path / "run")))
    assert main(["slurm", str(path), "--evaluate"]) == 1
    assert "has no section [evaluate]" in capsys.readouterr().err
    path.write_text(path.read_text() + EVALUATE)
    assert main(["slurm", str(path), "--submit"]) == 1
    assert "data = /data/eval in [evaluate] is not there" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_dry_run_names_the_array(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.ini"
    path.write_text(RUN + EVALUATE)
    main(["slurm", str(path)])
    assert "evaluation after it: an array of 6 jobs; --evaluate shows it" in capsys.readouterr().err
    main(["slurm", str(path), "--evaluate"])
    printed = capsys.readouterr()
    assert "#SBATCH --array=0-5" in printed.out and "evaluation after it" not in printed.err
