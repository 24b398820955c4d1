"""From an example file to a job script and a run folder: what is written, what is refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_skyladder.cli import main
from megatron_skyladder.planning.examples import example
from megatron_skyladder.slurm import masking, script
from megatron_skyladder.slurm.settings import Environment, Settings, from_file

EXAMPLES_FOLDER = Path(__file__).resolve().parents[2] / "examples" / "slurm"
EXAMPLES = sorted(EXAMPLES_FOLDER.glob("*.ini"))
OWN_MODELS = sorted(EXAMPLES_FOLDER.glob("own-model/*.ini"))
DIRECTIVE = re.compile(r"^#SBATCH --([a-z-]+)(?:=(.*))?$")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    flags = tuple(example("1b-8k", "skyladder").words)
    return Settings(str(tmp_path / "run"), flags, "entry", 2, 8, 8, {"time": "1:00"}, Environment())


def directives(text: str) -> dict[str, str | None]:
    """Return the directives; Slurm says nothing of those that it does not see."""
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    found: dict[str, str | None] = {}
    in_head = True
    for line in lines[1:]:
        if line.strip() and not line.startswith("#"):
            in_head = False
        if re.match(r"\s*#\s*SBATCH", line):
            match = DIRECTIVE.match(line)
            assert in_head, f"after the first command, Slurm ignores it: {line}"
            assert match, f"Slurm ignores it, or takes it for something else: {line}"
            assert match[1] not in found, f"twice: {line}"
            found[match[1]] = match[2]
    return found


@pytest.mark.parametrize(
    "line", ["echo\n#SBATCH --nodes=1", "# SBATCH --nodes=1", "#SBATCH nodes=1", "  #SBATCH --a=1"]
)
def test_misplaced_directives_are_noticed(line: str) -> None:
    with pytest.raises(AssertionError):
        directives(f"#!/bin/bash\n{line}\n")


# --- the script -----------------------------------------------------------------------------------


def test_directives_by_hand(settings: Settings) -> None:
    found = directives(script.job_script(settings))
    assert found == {
        "job-name": "run",
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "8",
        "time": "1:00",
        "output": f"{settings.folder}/slurm-%j.out",
        "open-mode": "append",
        "requeue": None,
        "signal": "B:USR1@600",
        "dependency": "singleton",
    }


def test_a_chain_and_an_array_do_not_requeue_themselves(settings: Settings) -> None:
    assert "\nAFTER=requeue\n" in script.job_script(settings)
    chain = script.job_script(settings, jobs=4)
    assert "\nAFTER=next\n" in chain
    assert directives(chain)["dependency"] == "singleton"
    array = script.job_script(settings, jobs=4, array=True)
    found = directives(array)
    assert "\nAFTER=next\n" in array
    assert (found["array"], found["output"]) == ("1-4%1", f"{settings.folder}/slurm-%A_%a.out")
    assert found["dependency"] == "singleton"  # a job of the run may be at work


def test_no_gpus_and_further_options(settings: Settings) -> None:
    options = {"exclusive": "", "partition": "a100", "gres": "gpu:a100:8"}
    found = directives(script.job_script(replace(settings, gpus_per_node=0, sbatch=options)))
    assert "gpus-per-node" not in found
    assert (found["exclusive"], found["partition"]) == (None, "a100")


def test_options_that_the_script_relies_on_are_refused(settings: Settings) -> None:
    for name in ("signal", "output", "requeue", "array", "ntasks", "chdir"):
        with pytest.raises(ValueError, match=rf"^{name} in \[slurm\] is set by the job script"):
            script.job_script(replace(settings, sbatch={name: "1"}))
    with pytest.raises(ValueError, match=r"gres and gpus-per-node .* both ask for GPUs"):
        script.job_script(replace(settings, sbatch={"gres": "gpu:8"}))


def as_sbatch_reads(line: str) -> str:
    """Return the first word behind #SBATCH by the rules of Slurm's src/sbatch/opt.c."""
    word, quote, escaped = "", "", False
    for character in line.removeprefix("#SBATCH "):
        if escaped:
            word, escaped = word + character, False
        elif character == "\\":
            escaped = True
        elif quote:
            word, quote = (word, "") if character == quote else (word + character, quote)
        elif character in "'\"":
            quote = character
        elif character == "#" or character.isspace():
            break
        else:
            word += character
    return word


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("first try", "first try"),
        ("ticket#42", "ticket#42"),
        ("it's", "it's"),
        ('the "first" one', 'the "first" one'),
        ('"first try"', "first try"),  # in quotes already, as it had to be
        (r'"the \"first\" one"', 'the "first" one'),
        (r"a\#b", "a#b"),
        (r"a\\b c", r"a\b c"),
        ("\n  n[1-3]  ", "n[1-3]"),  # a value on the line below its key
        ("n1,n2", "n1,n2"),
    ],
)
def test_values_arrive_whole(settings: Settings, given: str, meant: str) -> None:
    """In the script, of which sbatch drops what follows a blank or #, and on its command line."""
    settings = replace(settings, sbatch={"comment": given, "time": "7"})
    text = script.job_script(settings)
    assert directives(text)["signal"] == "B:USR1@600"
    read = [as_sbatch_reads(line) for line in text.splitlines() if line.startswith("#SBATCH")]
    assert f"--comment={meant}" in read and "--time=7" in read
    assert read == script.on_command_line(script.job_options(settings))


def test_folders_that_differ_behind_a_hash_have_names_of_their_own(tmp_path: Path) -> None:
    """Else Slurm's singleton runs them one after the other."""
    settings = read(tmp_path, "[run]\nfolder = /x/try#2\n")
    lines = [as_sbatch_reads(line) for line in script.job_script(settings).splitlines()]
    assert "--job-name=try#2" in lines and "--output=/x/try#2/slurm-%j.out" in lines


def test_an_option_on_several_lines_is_refused(tmp_path: Path) -> None:
    settings = read(tmp_path, "[run]\nfolder = /x\n[slurm]\nexclude =\n    n3\n    n4\ntime = 1\n")
    with pytest.raises(ValueError, match=r"exclude has 2 lines \(n3, n4\).* exclude = n3,n4\."):
        script.job_script(settings)


def array_words(text: str, name: str) -> list[str]:
    """Return the elements of a shell array, as bash reads them."""
    (line,) = re.findall(rf"^{name}=\(.*\)$", text, flags=re.MULTILINE)
    shown = f'{line}; for word in "${{{name}[@]}}"; do printf \'%s\\0\' "$word"; done'
    out = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=True).stdout
    return out.split("\0")[:-1]


def test_containers(settings: Settings) -> None:
    mounts = ("/data", "/a b:/c")
    folder = settings.folder
    bare = script.job_script(settings)
    assert array_words(bare, "SRUN_OPTIONS") == array_words(bare, "PREFIX") == []
    pyxis = Environment("pyxis", "nvcr.io#x/y:1", mounts)
    text = script.job_script(replace(settings, environment=pyxis))
    assert array_words(text, "SRUN_OPTIONS") == [
        "--container-image=nvcr.io#x/y:1",
        f"--container-mounts={folder}:{folder},/data:/data,/a b:/c",
    ]
    assert array_words(text, "PREFIX") == []
    apptainer = Environment("apptainer", "it's.sif", mounts)
    text = script.job_script(replace(settings, environment=apptainer))
    assert array_words(text, "PREFIX") == [
        *("apptainer", "exec", "--nv", "--bind", f"{folder}:{folder}"),
        *("--bind", "/data:/data", "--bind", "/a b:/c", "it's.sif"),
    ]
    text = script.job_script(replace(settings, environment=apptainer, gpus_per_node=0))
    assert "--nv" not in array_words(text, "PREFIX")


def test_environment(settings: Settings) -> None:
    environment = Environment(
        setup="module load x\nsource 'my venv'", python="python3", variables={"A": "b c"}
    )
    text = script.job_script(replace(settings, environment=environment))
    assert f"SETUP={shlex.quote(environment.setup)}" in text
    assert "\nPYTHON=python3\n" in text
    assert "\nexport A='b c'\n" in text


def test_fsdp_gets_more_than_one_hardware_queue(settings: Settings) -> None:
    """Megatron: FSDP requires CUDA_DEVICE_MAX_CONNECTIONS > 1 or unset."""
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    assert f"\nexport {name}=8\n" not in script.job_script(settings)
    fsdp = replace(settings, flags=(*settings.flags, "--use-megatron-fsdp"))
    assert f"\nexport {name}=8\n" in script.job_script(fsdp)
    chosen = replace(fsdp, environment=Environment(variables={name: "32"}))
    assert f"\nexport {name}=32\n" in script.job_script(chosen)


@pytest.mark.parametrize("path", [*EXAMPLES, *OWN_MODELS], ids=lambda path: path.stem)
@pytest.mark.parametrize("jobs", [None, 4])
def test_the_scripts_of_the_examples(path: Path, jobs: int | None, tmp_path: Path) -> None:
    """Whether sbatch and shellcheck take them is tested in tests/slurm."""
    settings = from_file(path, {("run", "folder"): str(tmp_path / "run")}, [])
    text = script.job_script(settings, jobs=jobs)
    found = directives(text)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    # the two ways to ask for GPUs do not go together, and one of them is needed
    assert ("gres" in found) != ("gpus-per-node" in found)
    # Slurm makes no folder for the output: without it a job fails and leaves no trace
    script.write_run_folder(settings, text)
    assert Path(found["output"] or "").parent.is_dir()


# --- example files --------------------------------------------------------------------------------


def test_there_is_an_example_for_each_kind_of_environment() -> None:
    kinds = {from_file(path, {("run", "folder"): "/x"}, []).environment.kind for path in EXAMPLES}
    assert kinds == {"bare", "pyxis", "apptainer"}


def test_examples_of_ones_own_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flags alone, checked like any others: a mixture of experts and a dense model."""
    fake_sbatch(tmp_path, monkeypatch, "echo fine >&2")
    setups = []
    for path in OWN_MODELS:
        settings = from_file(path, {}, [])
        assert "example" not in path.read_text().split("[slurm]")[0].split("\n[run]")[1]
        setups.append(settings.environment.setup)
        assert main(["slurm", str(path), "--run-dir", str(tmp_path / "run")]) == 0
        assert "Did you mean" not in capsys.readouterr().err
        bad = ["--", "--hiden-size", "8"]
        assert main(["slurm", str(path), "--run-dir", str(tmp_path / "run"), *bad]) == 1
        assert "--hidden-size" in capsys.readouterr().err
    conda, modules = setups
    assert "conda activate" in conda and "module load" in modules


def write(folder: Path, text: str) -> Path:
    path = folder / "example.ini"
    path.write_text(text)
    return path


def read(folder: Path, text: str) -> Settings:
    return from_file(write(folder, text), {}, [])


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = EXAMPLES[0]
    marked = tmp_path / path.name
    marked.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert from_file(marked, {}, []).flags == from_file(path, {}, []).flags


def test_an_example_file_by_hand(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """\
[run]
example = 3b-8k
variant = constant
gpu = h100
folder = /x/y
flags =
    --data-path 0.5 "/a b" 0.5 /c
    --lr 1e-3
[slurm]
nodes = 4
gpus-per-node = 4
time = 1:00   # a comment
mem = 0 # another one
[environment]
kind = pyxis
image = some#image
mounts = /data /x:/y
setup =
    one
    two
[survival]
signal-seconds = 30
max-tries = 5
[variables]
NCCL_SOCKET_IFNAME = ib0 # the network
""",
    )
    expected = Settings(
        folder="/x/y",
        flags=(
            *example("3b-8k", "constant", gpu="h100").words,
            *("--data-path", "0.5", "/a b", "0.5", "/c", "--lr", "1e-3", "--seed", "1"),
        ),
        entry="megatron_skyladder.pretrain_gpt",
        nodes=4,
        ranks_per_node=4,
        gpus_per_node=4,
        sbatch={"time": "1:00", "mem": "0"},
        environment=Environment(
            *("pyxis", "some#image", ("/data", "/x:/y"), "one\ntwo", "python"),
            {"NCCL_SOCKET_IFNAME": "ib0"},
        ),
        signal_seconds=30,
        max_tries=5,
    )
    assert from_file(path, {}, ["--seed", "1"]) == expected
    overridden = from_file(path, {("slurm", "nodes"): "2", ("run", "folder"): None}, [])
    assert (overridden.nodes, overridden.folder, overridden.num_ranks) == (2, "/x/y", 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\nfolder=/x\n[slrum]\n", r"section \[slrum\]. Known are: run, slurm"),
        ("[run]\nfolder=/x\nexampel=1\n", r"has exampel in \[run\]. Known there are: example"),
        ("[run]\nfolder\n", r"has folder in \[run\] without a value: give folder = ..."),
        ("[environment]\nkinds=1\n[run]\nfolder=/x", r"has kinds in \[environment\]"),
        ("folder=/x\n", "cannot be read: File contains no section headers"),
        ("[run]\nexample=1b-8k\n", r"names no folder in \[run\]"),
        ("[run]\nfolder=/a b\n", "has a character that job scripts or containers stumble over"),
        ("[run]\nfolder=/x\nvariant=constant\n", "but no example they belong to"),
        ("[run]\nfolder=/x\nexample=1b\n", "1b is no run of the paper"),
        ("[run]\nfolder=/x\nexample=1b-8k\nshrink=maybe\n", "shrink = maybe .* give yes or no"),
        ("[run]\nfolder=/x\n[slurm]\nnodes=two\n", "nodes = two .* whole number from 1"),
        ("[run]\nfolder=/x\n[slurm]\nnodes=0\n", "nodes = 0 .* whole number from 1"),
        ("[run]\nfolder=/x\n[slurm]\ngpus-per-node=0\n", "ranks-per-node = 0 .* from 1"),
        ("[run]\nfolder=/x\n[environment]\nkind=docker\n", "docker .* is unknown. Choose: bare"),
        ("[run]\nfolder=/x\n[environment]\nkind=pyxis\n", "kind = pyxis .* needs an image"),
        ("[run]\nfolder=/x\n[environment]\nimage=x\n", "kind = bare .* takes no image"),
        ("[run]\nfolder=/x\n[survival]\nmax-tries=0\n", "max-tries = 0 .* whole number from 1"),
    ],
)
def test_mistakes_in_example_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\nflags = --data-cache-path $SCRATCH/c\n", r"flags in \[run\] has \$SCRATCH, which"),
        ("[run]\nentry = ${HOME}/pretrain.py\n", r"entry in \[run\] has \$\{HOME\}, which nothing"),
        ("[environment]\npython = $VIRTUAL_ENV/bin/python\n", r"has \$VIRTUAL_ENV, .* Write out"),
        ("[environment]\nkind = pyxis\nimage = ${A:-b}\n", r"image in .* has \$\{A:-b\}"),
        ("[environment]\nmounts = /a $B\n", r"mounts in \[environment\] has \$B"),
        ("[evaluate]\ndata = $B/data\n", r"data in \[evaluate\] has \$B"),
        (
            "[variables]\nLD_LIBRARY_PATH = /nccl/lib:$LD_LIBRARY_PATH\n",
            r"has \$LD_LIBRARY_PATH, which nothing expands\. Let setup in \[environment\] do it: "
            r"export LD_LIBRARY_PATH=/nccl/lib:\$LD_LIBRARY_PATH",
        ),
        (
            "[variables]\nWANDB_API_KEY = $KEY\n",
            "To take WANDB_API_KEY from the shell .* without =",
        ),
        ("[variables]\nHF_HOME = ${HF_HOME}\n", "To take HF_HOME from the shell that submits"),
    ],
)
def test_variables_where_no_shell_expands_them(tmp_path: Path, text: str, message: str) -> None:
    text = text if text.startswith("[run]") else f"[run]\n{text}"
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text.replace("[run]\n", "[run]\nfolder = /x\n"))


def test_other_dollars_are_taken_as_they_are(tmp_path: Path) -> None:
    flags = "dataset.length=${model.seq_length} 'x$' 5$"
    variables = "A_PASSWORD = pa$word\nCOST = 5$\n"
    settings = read(tmp_path, f"[run]\nfolder = /x\nflags = {flags}\n[variables]\n{variables}")
    assert settings.flags == ("dataset.length=${model.seq_length}", "x$", "5$")
    assert settings.secrets == {"A_PASSWORD": "pa$word"}
    assert settings.environment.variables == {"COST": "5$"}


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell has it, where none reads the file: at the start of a path alone."""
    monkeypatch.setenv("HOME", "/home/me")
    settings = read(
        tmp_path,
        """\
[run]
folder = ~/run
flags = --data-path ~/a 1 ~/b --save-to=~/c ~model.key d~/e
[environment]
kind = apptainer
image = ~/x.sif
mounts = ~/data:/data ~ /a~b
python = ~/venv/bin/python
[variables]
PATHS = /a:~/b
HF_HOME = ~/hf
URL = http://x/~/y
""",
    )
    assert settings.folder == "/home/me/run"
    assert settings.flags == (
        *("--data-path", "/home/me/a", "1", "/home/me/b", "--save-to=/home/me/c"),
        *("~model.key", "d~/e"),
    )
    environment = settings.environment
    assert (environment.image, environment.python) == (
        "/home/me/x.sif",
        "/home/me/venv/bin/python",
    )
    assert environment.mounts == ("/home/me/data:/data", "/home/me", "/a~b")
    assert environment.variables == {
        "PATHS": "/a:/home/me/b",
        "HF_HOME": "/home/me/hf",
        "URL": "http://x/~/y",
    }


@pytest.mark.parametrize("name", ["export WANDB_API_KEY", "export A = 1", "NCCL-IB = 1", "2A = x"])
def test_what_is_no_name_of_a_variable_is_refused(tmp_path: Path, name: str) -> None:
    """It would end the job script, or be a word too many in its list of names."""
    with pytest.raises(ValueError, match=r"\[variables\] has .* no name of a variable"):
        read(tmp_path, f"[run]\nfolder = /x\n[variables]\n{name}\n")


def test_gpus_of_a_type(tmp_path: Path) -> None:
    settings = read(tmp_path, "[run]\nfolder = /x\n[slurm]\ngpus-per-node = h100:4\nnodes = 2\n")
    assert (settings.gpu_type, settings.gpus_per_node, settings.num_ranks) == ("h100", 4, 8)
    assert directives(script.job_script(settings))["gpus-per-node"] == "h100:4"
    (tmp_path / "settings.json").write_text(settings.to_json())
    assert Settings.read(tmp_path) == settings
    for wrong in ("h100", "h100:", "a100:2,h100:2"):
        with pytest.raises(ValueError, match=f"gpus-per-node = {wrong} .* such as h100:8.* gres"):
            read(tmp_path, f"[run]\nfolder = /x\n[slurm]\ngpus-per-node = {wrong}\n")


def test_a_relative_folder_is_below_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read(tmp_path, "[run]\nfolder = runs/a\n").folder == f"{tmp_path}/runs/a"


# --- the run folder -------------------------------------------------------------------------------


def test_a_run_folder_has_what_a_job_needs(settings: Settings) -> None:
    script.write_run_folder(settings, "text")
    folder = Path(settings.folder)
    assert Settings.read(folder) == settings
    assert (folder / "job.sbatch").read_text() == "text"
    assert (folder / "checkpoints").is_dir()  # and with it where the job's output goes
    before = (folder / "submitted").stat().st_mtime
    time.sleep(0.01)
    script.write_run_folder(replace(settings, nodes=4), "other")  # nodes may change
    assert Settings.read(folder).nodes == 4
    assert (folder / "submitted").stat().st_mtime > before


def test_another_run_does_not_get_into_the_folder(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    script.write_run_folder(settings, "text")
    flags = (*settings.flags, "--lr", "1e-3", "--recompute-activations")
    other = replace(settings, flags=flags, entry="pretrain_gpt.py")
    with pytest.raises(ValueError, match="has a run with other settings") as refused:
        script.write_run_folder(other, "text")
    lines = [line.strip() for line in str(refused.value).splitlines()]
    assert lines[1:4] == [
        "entry: entry -> pretrain_gpt.py",
        "--lr: 0.0004 -> 1e-3",
        "--recompute-activations: absent ->",
    ]
    assert "--allow-changes" in lines[4]
    assert Settings.read(Path(settings.folder)) == settings
    script.write_run_folder(other, "text", allow_changes=True)
    assert Settings.read(Path(settings.folder)) == other
    assert "--lr: 0.0004 -> 1e-3" in caplog.text


def test_the_next_job_finds_another_environment(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """An image may be replaced, and the run goes on; but not without a word."""
    first = replace(settings.environment, variables={"NCCL_DEBUG": "INFO", "KEPT": "1"})
    script.write_run_folder(replace(settings, environment=first), "text")
    assert not caplog.messages
    environment = replace(
        first, kind="pyxis", image="b.sqsh", variables={"KEPT": "1", "OMP_NUM_THREADS": "2"}
    )
    script.write_run_folder(replace(settings, environment=environment), "text")
    assert Settings.read(Path(settings.folder)).environment == environment
    assert [text.partition(": ")[2] for text in caplog.messages] == [
        f"[environment] kind: {first.kind!r} -> 'pyxis'",
        f"[environment] image: {first.image!r} -> 'b.sqsh'",
        "[variables] NCCL_DEBUG: INFO -> absent",
        "[variables] OMP_NUM_THREADS: absent -> 2",
    ]


# --- the command ----------------------------------------------------------------------------------


SBATCH_LINE = re.compile(r"^#SBATCH --.*$", re.MULTILINE)


def job_of(run: Path) -> str:
    return (run / "job.sbatch").read_text()


def fake_sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    path = folder / "bin" / "sbatch"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")


def test_the_dry_run_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sbatch(tmp_path, monkeypatch, 'echo "$1 looks good" >&2')
    words = [str(EXAMPLES[1]), "--run-dir", str(tmp_path / "run"), "--nodes", "2"]
    assert main(["slurm", *words, "--time", "2:00", "--", "--seed", "1"]) == 0
    shown = capsys.readouterr()
    found = directives(shown.out)
    assert (found["nodes"], found["time"]) == ("2", "2:00")
    assert "# --test-only looks good" in shown.err
    assert "nothing was written or submitted: add --submit" in shown.err
    assert not (tmp_path / "run").exists()


def test_the_dry_run_shows_what_sbatch_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sbatch(tmp_path, monkeypatch, "echo no such partition >&2; exit 1")
    assert main(["slurm", str(EXAMPLES[0]), "--run-dir", str(tmp_path / "run")]) == 1
    shown = capsys.readouterr()
    assert directives(shown.out)
    assert "# sbatch refuses the job: no such partition" in shown.err


def test_submitting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sbatch(tmp_path, monkeypatch, f'echo "$@" >> {tmp_path}/calls; echo "7;cluster"')
    run = tmp_path / "run"
    words = ["slurm", str(EXAMPLES[1]), "--run-dir", str(run), "--submit"]
    assert main([*words, "--chain", "3", "--", "--seed", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "submitted 7, 7, 7"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [calls[0]] * 3
    # all that the script says: a variable SBATCH_PARTITION beats a script, and not these
    options = [option.removeprefix("#SBATCH ") for option in SBATCH_LINE.findall(job_of(run))]
    assert calls[0].split() == ["--parsable", *options, f"{run}/job.sbatch"]
    assert json.loads((run / "settings.json").read_text())["flags"][-2:] == ["--seed", "1"]
    assert main([*words, "--array", "3", "--", "--seed", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "submitted 7"
    assert main([*words, "--", "--seed", "2"]) == 1
    assert "--seed: 1 -> 2" in capsys.readouterr().err
    assert main([*words, "--allow-changes", "--", "--seed", "2"]) == 0


MOE = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --num-experts 8 --moe-router-topk 2
    --expert-model-parallel-size 4 --moe-grouped-gemm --seq-length 128 --max-position-embeddings 128
    --micro-batch-size 1 --global-batch-size 16 --train-iters 100 --lr 1e-4
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model /shared/tokenizer
    --attention-dropout 0 --skyladder-start-window 8
"""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", ""),
        ("--qk-clip", "--qk-clip cannot be combined with SkyLadder"),
        (
            "--skyladder-intra-document --intra-doc-masking",
            "--intra-doc-masking cannot be combined with SkyLadder",
        ),
        ("--attention-dropout 0.1", "--attention-dropout=0.1 cannot be combined"),
        ("--skyladder-alpha 1/1000", "takes 120,000 steps, but the run has 100"),
        ("--expert-model-parallel-size 3", "no multiple of expert TP x EP x PP = 3"),
        ("--global-batch-size 12", "--global-batch-size=12 is no multiple of"),
        ("--hiden-size 64", "Did you mean --hidden-size?"),
        ("--skyladder-start-windw 8", "Did you mean --skyladder-start-window?"),
    ],
)
def test_what_would_end_a_job_is_refused_before_it_queues(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: str,
    message: str,
) -> None:
    """A mixture of experts can be submitted: the model is Megatron's affair."""
    monkeypatch.setenv("PATH", "")  # no sbatch
    path = tmp_path / "moe.ini"
    path.write_text(
        f"[run]\nfolder = {tmp_path}/run\nflags = {MOE} {flags}\n"
        "[slurm]\nnodes = 1\ngpus-per-node = 8\n"
    )
    code = main(["slurm", str(path)])
    said = " ".join(capsys.readouterr().err.split())
    assert (code, message in said) == (1 if message else 0, True), said


def test_batches_that_megatron_is_not_given_are_refused_with_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """128 samples: from the 64th on, 8,192 tokens later, in batches twice as large."""
    monkeypatch.setenv("PATH", "")  # no sbatch
    path = tmp_path / "stages.ini"
    stages = "--skyladder-schedule staged --skyladder-stages 32:0.5,batch=16 final:0.5,batch=x2"
    model = MOE.replace("--train-iters 100", "--train-samples 128")
    model = model.replace("--skyladder-start-window 8", stages)
    flag = "--step-batch-size-schedule '0:16 8192:32'"
    for flags, code in (
        (model, 1),
        (model.replace("--global-batch-size 16", flag), 0),
    ):
        path.write_text(
            f"[run]\nfolder = {tmp_path}/run\nflags = {flags}\n"
            "[slurm]\nnodes = 1\ngpus-per-node = 8\n"
        )
        assert main(["slurm", str(path)]) == code
        said = " ".join(capsys.readouterr().err.split())
        assert (f"Give {flag}, without --global-batch-size" in said) == bool(code), said


def snapshot(folder: Path) -> dict[str, object]:
    """Return what is there: each file's content, and when it was submitted."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    } | {str(path): path.stat().st_mtime_ns for path in folder.rglob("submitted")}


REFUSALS = {
    "no sbatch": "there is no sbatch here",
    "echo 'Invalid account or partition' >&2; exit 1": "Invalid account or partition",
    "exit 2": "it ends with 2 and says nothing",
    "exec /no/such/program": "sbatch refuses the job",
}


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("body", REFUSALS)
def test_a_refused_submission_leaves_the_folder_as_it_was(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    body: str,
    earlier: bool,
) -> None:
    """So that the next try is free to change what it wants."""
    fake_sbatch(tmp_path, monkeypatch, "echo 7")
    folder = tmp_path / "runs"
    words = ["slurm", str(EXAMPLES[1]), "--run-dir", str(folder / "run"), "--submit"]
    if earlier:
        assert main([*words, "--", "--seed", "1"]) == 0
    before = snapshot(tmp_path / "runs")
    if body == "no sbatch":
        monkeypatch.setattr(script.shutil, "which", lambda name: None)
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/sh\n{body}\n")
    assert main([*words, "--allow-changes", "--chain", "2", "--", "--seed", "2"]) == 1
    assert REFUSALS[body] in capsys.readouterr().err
    assert snapshot(folder) == before
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 8\n")
    assert main([*words, "--", "--seed", "1" if earlier else "3"]) == 0


def test_a_chain_of_which_some_jobs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as by a limit on submitted jobs: those that were taken have what they need."""
    count = f"echo >> {tmp_path}/n; n=$(wc -l < {tmp_path}/n)"
    body = f"{count}; [ $n -lt 3 ] && echo $n || {{ echo limit >&2; false; }}"
    fake_sbatch(tmp_path, monkeypatch, body)
    words = ["slurm", str(EXAMPLES[1]), "--run-dir", str(tmp_path / "run"), "--submit"]
    assert main([*words, "--chain", "5"]) == 1
    error = capsys.readouterr().err
    assert "sbatch refuses the job: limit" in error
    assert "2 of 5 jobs are submitted (1, 2) and will train. Give the command again" in error
    assert (tmp_path / "run" / "settings.json").exists()


def test_a_submission_that_times_out_may_have_been_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sbatch(tmp_path, monkeypatch, "echo 'Socket timed out on send/recv' >&2; exit 1")
    words = ["slurm", str(EXAMPLES[1]), "--run-dir", str(tmp_path / "run"), "--submit"]
    assert main(words) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert f"Socket timed out on send/recv {LOOK}" in error
    assert (tmp_path / "run" / "settings.json").exists()


LOOK = (
    "Look with squeue --name=run whether the job is there before you submit again. If it is not: "
    "the run folder has the settings of this command, so give it again, or another one with "
    "--allow-changes."
)


@pytest.mark.parametrize("taken", [0, 2])
def test_a_submission_that_is_interrupted_may_have_been_taken(tmp_path: Path, taken: int) -> None:
    """Ctrl-C while sbatch waits for the controller, at the first job or at the third of a chain."""
    run, sbatch = tmp_path / "run", tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    count = f"echo >> {tmp_path}/n; n=$(wc -l < {tmp_path}/n)"
    interrupt = "kill -INT $PPID; exec sleep 60"
    sbatch.write_text(f"#!/bin/sh\n{count}; [ $n -gt {taken} ] || exec echo 7$n\n{interrupt}\n")
    sbatch.chmod(0o755)
    words = [str(EXAMPLES[1]), "--run-dir", str(run), "--submit", "--chain", "5"]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_skyladder", "slurm", *words],
        env={**os.environ, "PATH": f"{sbatch.parent}:/usr/bin:/bin"},
        # a shell that runs the tests in the background lets them ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    error = " ".join(done.stderr.split())
    assert "skyladder slurm: interrupted while sbatch was at work" in error
    if taken:
        assert (
            "2 of 5 jobs are submitted (71, 72) and will train. Look with squeue --name=run "
            "whether there is one more. Give the command again with the number that is missing"
            in error
        )
    else:
        assert error.endswith(LOOK)
    assert (run / "settings.json").exists() and (run / "submitted").exists()


def test_what_a_site_prints_beside_the_id_is_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does a message in another encoding make a submitted job a refused one."""
    banner = "printf '42 jobs are yours\\n7;cluster\\nBudget f\\374r M\\344rz: 8\\n'"
    fake_sbatch(tmp_path, monkeypatch, f"{banner}; printf '\\374\\n' >&2")
    words = ["slurm", str(EXAMPLES[1]), "--run-dir", str(tmp_path / "run"), "--submit"]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[0] == "submitted 7"
    assert (tmp_path / "run" / "settings.json").exists()


@pytest.mark.parametrize("answer", ["", "submitted: 7", "7 jobs"])
def test_an_answer_without_an_id_may_be_that_of_a_queued_job(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: str,
) -> None:
    fake_sbatch(tmp_path, monkeypatch, f"echo '{answer}'")
    words = ["slurm", str(EXAMPLES[1]), "--run-dir", str(tmp_path / "run"), "--submit"]
    assert main(words) == 1
    error = " ".join(capsys.readouterr().err.split())
    said = answer or "nothing"
    assert f"sbatch does not say which job it submitted, but: {said} {LOOK}" in error
    assert (tmp_path / "run" / "settings.json").exists()


@pytest.mark.parametrize("submitting", [True, False])
def test_a_job_gets_nothing_from_the_job_that_submits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, submitting: bool
) -> None:
    """Within salloc or a Jupyter job: srun takes these variables for its options."""
    fake_sbatch(tmp_path, monkeypatch, f"env > {tmp_path}/got; echo 7")
    for name in (
        *("SLURM_MEM_PER_NODE", "SLURM_CPUS_PER_TASK", "SLURM_JOB_ID", "SRUN_CPUS_PER_TASK"),
        *("SBATCH_ARRAY_INX", "SLURM_CONF", "SLURM_CLUSTERS", "SLURM_CPU_BIND", "SBATCH_QOS"),
    ):
        monkeypatch.setenv(name, "1")
    path = example_with(tmp_path, "SLURM_CPU_BIND\n")  # named by the file: meant
    assert main(["slurm", str(path), *["--submit"] * submitting]) == 0
    got = {line.partition("=")[0] for line in (tmp_path / "got").read_text().splitlines()}
    kept = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_CPU_BIND", "SBATCH_QOS"}
    assert {name for name in got if name.startswith(("SLURM_", "SRUN_", "SBATCH_"))} == kept


# --- secrets --------------------------------------------------------------------------------------

KEY = "a-secret-of-mine"


def example_with(folder: Path, variables: str, setup: str = "true", flags: str = "") -> Path:
    return write(
        folder,
        f"[run]\nexample = 1b-8k\nfolder = {folder}/run\nflags = {flags}\n[environment]\n"
        f"setup =\n    {setup}\n[variables]\n{variables}\n",
    )


@pytest.mark.parametrize("given", ["in the file", "in the shell", "in the shell, no ="])
def test_secrets_go_to_sbatch_and_nowhere_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: str,
) -> None:
    fake_sbatch(tmp_path, monkeypatch, f'echo "$WANDB_API_KEY" > {tmp_path}/got; echo 7')
    line = {"in the file": f"WANDB_API_KEY = {KEY}", "in the shell, no =": "WANDB_API_KEY"}
    path = example_with(tmp_path, f"{line.get(given, 'WANDB_API_KEY =')}\nNCCL_DEBUG = INFO")
    if given != "in the file":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert main(["slurm", str(path)]) == 0
    shown = capsys.readouterr()
    assert KEY not in shown.out + shown.err
    assert "export NCCL_DEBUG=INFO" in shown.out
    assert "# WANDB_API_KEY: handed to jobs by sbatch's environment" in shown.err
    assert array_words(shown.out, "PASSED") == ["WANDB_API_KEY"]
    assert main(["slurm", str(path), "--submit"]) == 0
    shown = capsys.readouterr()
    assert KEY not in shown.out + shown.err
    assert (tmp_path / "got").read_text() == f"{KEY}\n"
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or KEY not in file.read_text()
    assert Settings.read(tmp_path / "run").environment.passed == ("WANDB_API_KEY",)


def test_an_empty_variable_is_empty(tmp_path: Path) -> None:
    settings = from_file(example_with(tmp_path, "HOLD =\nFROM_THE_SHELL\nA_KEY ="), {}, [])
    assert settings.environment.variables == {"HOLD": ""}
    assert settings.environment.passed == ("FROM_THE_SHELL", "A_KEY")
    assert settings.secrets == {}


def test_a_variable_without_a_value_has_to_be_in_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sbatch(tmp_path, monkeypatch, "echo 7")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert main(["slurm", str(example_with(tmp_path, "HF_TOKEN =")), "--submit"]) == 1
    assert "HF_TOKEN in [variables] has no value, and is not set" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("chosen", "option"),
    [("", []), ("ALL,X=1", []), ("NONE", ["--export=A_KEY"]), ("X", ["--export=X,A_KEY"])],
)
def test_sites_where_sbatch_exports_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, chosen: str, option: list[str]
) -> None:
    monkeypatch.delenv("SBATCH_EXPORT", raising=False)
    passing = replace(settings, environment=Environment(passed=("A_KEY",)))
    with_option = replace(passing, sbatch={"export": chosen} if chosen else {})
    assert script.export_option(with_option) == option
    monkeypatch.setenv("SBATCH_EXPORT", chosen)
    assert script.export_option(passing) == option
    assert script.export_option(settings) == []
    monkeypatch.setenv("SBATCH_EXPORT", "Y")  # which sbatch's command line overrides
    assert script.export_option(with_option) == (option if chosen else ["--export=Y,A_KEY"])


NAMES = (
    "WANDB_API_KEY HF_TOKEN HUGGING_FACE_HUB_TOKEN AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID "
    "AWS_SESSION_TOKEN MLFLOW_TRACKING_PASSWORD COMET_APIKEY GITHUB_PAT PGPASSWORD SSHPASS db_pw"
)
ORDINARY = (
    "TOKENIZERS_PARALLELISM NCCL_SOCKET_IFNAME NCCL_IB_PKEY NVTE_FUSED_ATTN WANDB_PROJECT "
    "HF_HUB_OFFLINE OMP_NUM_THREADS PATH"
)


def test_names_and_values_of_secrets() -> None:
    assert [name for name in NAMES.split() if not masking.is_secret(name, "1")] == []
    assert [name for name in ORDINARY.split() if masking.is_secret(name, "1")] == []
    values = (f"hf_{'a' * 20}", f"ghp_{'a' * 20}", "http://me:pw@proxy:80", "0123456789" * 4)
    assert all(masking.is_secret("X", value) for value in values)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("setup", "export WANDB_API_KEY=abc"),
        ("setup", "module load x; HF_TOKEN='abc' huggingface-cli login"),
        ("setup", "wandb login 0123456789abcdef0123"),
        ("setup", "git clone https://me:pw@host/x"),
        ("setup", "env A=1,WANDB_API_KEY=abc true"),
        ("flags", "--hf-token abc"),
        ("flags", "--api-key=abc"),
    ],
)
def test_secrets_that_would_be_written_down_are_refused(
    tmp_path: Path, key: str, text: str
) -> None:
    path = example_with(tmp_path, "", **{key: text})
    with pytest.raises(ValueError, match=rf"{key} in \[.*spells out what looks like a secret"):
        from_file(path, {}, [])


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("setup", 'export WANDB_API_KEY="$(cat ~/.key)"'),
        ("setup", "huggingface-cli login --token $HF_TOKEN"),
        ("setup", "git checkout 0123456789012345678901234567890123456789"),
        ("flags", "--calculate-per-token-loss --moe-token-dispatcher-type alltoall"),
    ],
)
def test_what_spells_out_no_secret_is_taken(tmp_path: Path, key: str, text: str) -> None:
    assert from_file(example_with(tmp_path, "", **{key: text}), {}, [])


def test_options_of_sbatch_spell_out_no_secret_either(tmp_path: Path) -> None:
    text = "[run]\nfolder = /x\n[slurm]\nexport = ALL,WANDB_API_KEY=abc\n"
    with pytest.raises(ValueError, match=r"export in \[slurm\] spells out .*WANDB_API_KEY"):
        read(tmp_path, text)
    read(tmp_path, text.replace("=abc", ""))


def test_masking() -> None:
    environment = {"A_TOKEN": "token-of-a", "A_KEY": "short", "NAME": "ordinary name"}
    text = masking.mask("token-of-a, short, ordinary name, http://u:p@h", environment)
    assert text == "***, short, ordinary name, http***h"


def test_without_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    words = ["slurm", str(EXAMPLES[0]), "--run-dir", str(tmp_path / "run")]
    assert main(words) == 0
    assert "there is no sbatch here, so it has not checked the script" in capsys.readouterr().err
    assert main([*words, "--submit"]) == 1
    assert "there is no sbatch here. Submit on a login node" in capsys.readouterr().err


def test_bridge_saves_into_the_run_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = EXAMPLES_FOLDER.parent / "bridge" / "1b-8k.ini"
    words = ["slurm", str(path), "--run-dir", str(tmp_path / "run"), "--"]
    assert main([*words, "+checkpoint.save=/mine"]) == 1
    message = capsys.readouterr().err
    assert f"checkpoint.save=/mine in [run] would have no effect: checkpoints go to {tmp_path}" in (
        message
    )
    assert "give checkpoint.pretrained_checkpoint" in message


def test_a_layout_that_does_not_fit_is_refused_before_it_queues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["slurm", str(EXAMPLES[1]), "--run-dir", str(tmp_path / "run")]
    assert main([*words, "--gpus-per-node", "3"]) == 1
    assert "no multiple of micro-batch size x data-parallel size = 3" in capsys.readouterr().err
    assert main([*words, "--", "--tensor-model-parallel-size", "3"]) == 1
    assert "--gpus=8 is no multiple of TP x PP x CP = 3" in capsys.readouterr().err
    assert main([*words, "--chain", "0"]) == 1
    assert "--chain or --array 0: give at least 1" in capsys.readouterr().err
