"""What the doctor says, and that it says it where something is broken."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_compat import write_megatron
from test_patching import write_tree

from megatron_skyladder.cli import main
from megatron_skyladder.cli.doctor import add_parser
from megatron_skyladder.planning import doctor
from megatron_skyladder.planning.doctor import Report
from megatron_skyladder.planning.pasted import Pasted
from megatron_skyladder.runtime.same_settings import disagreements

REPOSITORY = Path(__file__).parents[2]
LAUNCH = ["--seq-length", "128", "--global-batch-size", "8", "--train-iters", "100"]
LAUNCH += ["--attention-dropout", "0"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SKYLADDER_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SKYLADDER_DEVICE", "cpu")


@pytest.fixture
def megatron(tmp_path, monkeypatch):
    """A function that makes a folder the Megatron that Python finds."""

    def use(found):
        monkeypatch.setattr(doctor.releases, "installed", lambda: found)

    return use


def ask(capsys, *words):
    """Run ``skyladder doctor --json`` and return its exit code and report."""
    code = main(["doctor", "--json", *words])
    return code, json.loads(capsys.readouterr().out)


# --- one process -------------------------------------------------------------------------------


def test_a_wheel(tmp_path, megatron, capsys):
    megatron(doctor.releases.megatron_in(write_megatron(tmp_path)))
    code, report = ask(capsys)
    assert code == 0 and report["problems"] == []
    assert report["installed"]["megatron"].startswith(f"0.19.2, wheel in {tmp_path}")
    assert report["run"]["release"] == "0.19, tested with 0.19.2"
    assert report["run"]["integration"] == "the entry point"
    assert report["run"]["schedule"].startswith("off")
    assert "for checkouts" in report["integrations"]["patch"]


def test_kernels_on_a_gpu(tmp_path, megatron, capsys, monkeypatch):
    """Compute capability, cuDNN, the FlashAttentions, and what Transformer Engine would take."""
    import torch

    from megatron_skyladder.attention.backends import facts

    megatron(doctor.releases.megatron_in(write_megatron(tmp_path)))
    _, report = ask(capsys)
    assert {"cudnn", "flash-attn", "flash_attn_3", "flash-attn-4"} <= set(report["installed"])
    assert "compute capability" not in report["run"]
    monkeypatch.delenv("SKYLADDER_DEVICE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    asked = {}

    def te_sub_backends(**changes):
        asked.update(changes)
        return {"batched": "cuDNN (FusedAttention)", "packed": facts.UNFUSED}

    monkeypatch.setattr(facts, "te_sub_backends", te_sub_backends)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    code, report = ask(capsys, *LAUNCH, "--fp16", "--deterministic-mode")
    assert code == 0 and asked == {"qkv_dtype": torch.float16, "deterministic": True}
    assert report["installed"]["cudnn"] == "9.10.2"
    assert report["run"]["device"] == "2 x NVIDIA H100"
    assert report["run"]["compute capability"] == "9.0"
    assert report["run"]["Transformer Engine, batched"] == "cuDNN (FusedAttention)"
    (note,) = [note for note in report["notes"] if "unfused for packed calls" in note]
    assert "pip install 'megatron-skyladder[gpu]'" in note
    # with sinks TE has cuDNN alone, and installing FlashAttention would not change that
    _, report = ask(capsys, *LAUNCH, "--fp16", "--softmax-type=learnable")
    assert asked["softmax_type"] == "learnable"
    assert not [note for note in report["notes"] if "unfused" in note]
    chosen = report["run"]["attention backend"]
    assert "no fa3 with a softmax sink" in chosen or "no FlashAttention 3" in chosen


MLA = ["--multi-latent-attention", "--qk-head-dim=256", "--qk-pos-emb-head-dim=64"]


@pytest.mark.parametrize(
    ("flags", "channels"),
    [
        (["--hidden-size=2560", "--num-attention-heads=8"], (320, 320)),
        (["--hidden-size=2560", "--num-attention-heads=8", "--kv-channels=64"], (64, 64)),
        (MLA, (320, 128)),
        ([*MLA, "--v-head-dim=256", "--kv-channels=64"], (320, 256)),
        (["--multi-latent-attention"], (192, 128)),
        (["--hidden-size=2560"], None),
    ],
)
def test_heads_of_the_launch_decide_too(tmp_path, megatron, capsys, monkeypatch, flags, channels):
    """FlashAttention 2, in torch and alone, has heads of up to 256 channels, of one size."""
    from megatron_skyladder.attention.backends import facts

    megatron(doctor.releases.megatron_in(write_megatron(tmp_path)))
    code, report = ask(capsys, *LAUNCH, *flags, "--skyladder-attention-backend=varlen")
    problems = " ".join(report["problems"])
    if channels is None or max(channels) <= 256:
        assert code == 0 and report["run"]["attention backend"].startswith("varlen")
    else:
        assert (
            code == 1 and f"keys of {channels[0]} channels and values of {channels[1]}" in problems
        )

    asked = {}
    monkeypatch.setattr(facts, "te_sub_backends", lambda **given: asked.update(given))
    monkeypatch.delenv("SKYLADDER_DEVICE")
    gpu = {"is_available": True, "device_count": 1, "get_device_name": "NVIDIA H100"}
    gpu["get_device_capability"] = (9, 0)
    for name, value in gpu.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, value=value: value)
    ask(capsys, *LAUNCH, *flags)
    asked_for = (asked["head_dim_qk"], asked["head_dim_v"]) if "head_dim_v" in asked else None
    assert asked_for == channels


def test_what_was_measured_is_said(tmp_path, megatron, capsys, monkeypatch):
    from megatron_skyladder.attention.backends import choose
    from megatron_skyladder.cpu import engine
    from megatron_skyladder.ladder.kernels import Call
    from megatron_skyladder.ladder.measured import Measured

    megatron(doctor.releases.megatron_in(write_megatron(tmp_path)))
    times = {Call.WINDOWS: {"sdpa": 1.5}, Call.PACKED: {"sdpa": 2.0}}
    monkeypatch.setattr(choose, "_measured", lambda: Measured("GPU", "2026-11-29", times))
    monkeypatch.setattr(engine, "is_installed", lambda: False)
    monkeypatch.setattr(engine, "is_requested", lambda: False)
    choose._choose.cache_clear()
    _, report = ask(capsys)
    choose._choose.cache_clear()
    found = report["run"]["attention backend"]
    assert "sdpa for windows: measured here on 2026-11-29: sdpa 1.5 ms" in found


def test_a_checkout_before_and_after_the_patch(tmp_path, megatron, capsys):
    tree = write_tree(tmp_path)
    found = doctor.releases.megatron_in(tree)
    megatron(found)
    code, report = ask(capsys)
    assert code == 0 and "checkout in" in report["installed"]["megatron"]
    assert report["integrations"]["patch"] == f"fits, not applied: skyladder patch apply {tree}"
    assert "--spec megatron_skyladder.layer_specs skyladder" in report["integrations"]["spec"]
    main(["patch", "apply", str(tree)])
    capsys.readouterr()
    code, report = ask(capsys)
    assert code == 0 and report["integrations"]["patch"].startswith("applied: torchrun")
    assert report["run"]["integration"].startswith("the patched pretrain_gpt.py")


def test_a_checkout_that_is_patched_in_part_or_does_not_fit(tmp_path, megatron, capsys):
    tree = write_tree(tmp_path)
    megatron(doctor.releases.megatron_in(tree))
    main(["patch", "apply", str(tree)])
    script = tree / "pretrain_gpt.py"
    script.write_text("".join(script.read_text().splitlines(keepends=True)[:-3]))
    (tree / "megatron/training/training.py").write_text("x = 1\n")
    capsys.readouterr()
    _, report = ask(capsys)
    assert "does not fit: " in report["integrations"]["patch"]
    write_tree(tmp_path, arguments=(tree / "megatron/training/arguments.py").read_text())
    code, report = ask(capsys)
    assert code == 1 and "patched in part. Complete it: skyladder patch" in report["problems"][0]


def test_our_flags_for_a_script_that_is_not_patched(tmp_path, megatron, capsys):
    tree = write_tree(tmp_path)
    megatron(doctor.releases.megatron_in(tree))
    words = [f"{tree}/pretrain_gpt.py", *LAUNCH]
    assert ask(capsys, *words)[0] == 0
    code, report = ask(capsys, *words, "--skyladder-start-window", "8")
    assert code == 1 and "flags only in a patched checkout" in report["problems"][0]
    main(["patch", "apply", str(tree)])
    capsys.readouterr()
    assert ask(capsys, *words, "--skyladder-start-window", "8")[0] == 0


def test_bridge_is_a_way_of_its_own(tmp_path, megatron, capsys, monkeypatch):
    megatron(doctor.releases.megatron_in(write_megatron(tmp_path)))
    _, report = ask(capsys)
    assert report["installed"]["megatron-bridge"] == "not installed"
    assert "bridge" not in report["integrations"]
    monkeypatch.setattr(doctor.bridge_releases, "installed", lambda: "0.6.2")
    code, report = ask(capsys)
    assert code == 0 and "-m megatron_skyladder.megatron_bridge" in report["integrations"]["bridge"]
    monkeypatch.setattr(doctor.bridge_releases, "installed", lambda: "0.9.0")
    code, report = ask(capsys)
    assert code == 0 and "Bridge 0.9.0 is not among the tested" in report["integrations"]["bridge"]
    assert "SKYLADDER_ALLOW_UNTESTED_MEGATRON=1" in report["integrations"]["bridge"]


def test_an_untested_megatron(tmp_path, megatron, capsys):
    megatron(doctor.releases.megatron_in(write_megatron(tmp_path, "0.9.0")))
    code, report = ask(capsys)
    assert code == 1 and "0.9.0" in report["problems"][0]
    assert "SKYLADDER_ALLOW_UNTESTED_MEGATRON=1" in report["problems"][0]


def test_another_megatron_that_is_hidden_or_lies_here(tmp_path, megatron, monkeypatch, capsys):
    first = write_megatron(tmp_path / "first")
    second = write_megatron(tmp_path / "second", "0.18.2")
    third = write_megatron(tmp_path / "third", "0.20.0")
    monkeypatch.setattr(sys, "path", [str(first), str(second), *sys.path])
    monkeypatch.chdir(third)
    megatron(doctor.releases.megatron_in(first))
    _, report = ask(capsys)
    text = report["installed"]["megatron"]
    assert f"it hides 0.18.2 in {second}" in text
    assert "scripts in this folder import its own 0.20.0: ask with PYTHONPATH=." in text


def test_dataset_helpers_that_cannot_be_built(tmp_path, megatron, monkeypatch, capsys):
    tree = write_tree(tmp_path)
    datasets = tree / "megatron/core/datasets"
    datasets.mkdir()
    (datasets / "Makefile").write_text("")
    megatron(doctor.releases.megatron_in(tree))
    find_spec = doctor.importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util,
        "find_spec",
        lambda name: None if name == "pybind11" else find_spec(name),
    )
    code, report = ask(capsys)
    assert code == 1 and "pip install pybind11" in report["problems"][0]
    (datasets / "helpers_cpp.cpython-312.so").write_text("")
    assert ask(capsys)[0] == 0


def test_a_package_that_is_installed_but_broken(tmp_path, megatron, monkeypatch, capsys):
    megatron(doctor.releases.megatron_in(write_megatron(tmp_path / "megatron")))
    (tmp_path / "flash_attn.py").write_text("raise OSError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    code, report = ask(capsys)
    assert code == 1
    assert report["installed"]["flash-attn"].endswith("does not import")
    assert "(undefined symbol: _ZN3c10)" in report["problems"][0]


def test_no_gpu(tmp_path, megatron, monkeypatch, capsys):
    import torch

    megatron(doctor.releases.megatron_in(write_megatron(tmp_path)))
    monkeypatch.delenv("SKYLADDER_DEVICE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, report = ask(capsys)
    assert code == 1 and "SKYLADDER_DEVICE=cpu" in report["problems"][0]
    assert report["run"]["device"] == "none"


def test_a_device_that_is_unknown_is_one_problem(tmp_path, megatron, monkeypatch, capsys):
    megatron(doctor.releases.megatron_in(write_megatron(tmp_path)))
    monkeypatch.setenv("SKYLADDER_DEVICE", "gpu")
    code, report = ask(capsys)
    assert code == 1
    assert report["problems"] == ["SKYLADDER_DEVICE=gpu is unknown. Set it to cpu or cuda."]


def test_gpus_are_counted(monkeypatch, tmp_path, megatron, capsys):
    import torch

    megatron(doctor.releases.megatron_in(write_megatron(tmp_path)))
    monkeypatch.delenv("SKYLADDER_DEVICE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "AAB"[index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert ask(capsys)[1]["run"]["device"] == "2 x A, 1 x B"


def test_a_backend_that_is_not_there(tmp_path, megatron, capsys):
    megatron(doctor.releases.megatron_in(write_megatron(tmp_path)))
    words = [*LAUNCH, "--skyladder-attention-backend", "te"]
    code, report = ask(capsys, *words)
    assert code == 1 and "--skyladder-attention-backend=te needs" in report["problems"][0]


def test_the_schedule_of_a_launch(tmp_path, megatron, capsys):
    megatron(doctor.releases.megatron_in(write_megatron(tmp_path)))
    words = [*LAUNCH, "--lr", "1e-3", "--skyladder-start-window", "8"]
    code, report = ask(capsys, *words)
    assert code == 0 and report["run"]["flags"] == " ".join(words)
    assert report["run"]["schedule"].startswith("linear 8 -> 128, fraction 0.64 of 100 steps")
    code, report = ask(capsys, *LAUNCH, "--skyladder-start-window", "256")
    assert code == 1 and "--skyladder-start-window=256 is above" in report["problems"][0]
    code, report = ask(capsys, "--skyladder-start-window", "8")
    assert code == 1 and "--seq-length and --global-batch-size is missing" in report["problems"][0]


def test_the_schedule_of_a_launch_whose_batch_grows(tmp_path, megatron, capsys):
    megatron(doctor.releases.megatron_in(write_megatron(tmp_path)))
    grows = ["--step-batch-size-schedule", "0:4 1280:8", "--skyladder-start-window", "8"]
    words = ["--seq-length", "128", "--train-iters", "100", "--attention-dropout", "0"]
    code, report = ask(capsys, *words, *grows)
    assert code == 0 and "step of 8 samples" in report["run"]["schedule"]


def test_stages_whose_batches_this_release_cannot_make(tmp_path, megatron, capsys):
    stages = "--skyladder-schedule staged --skyladder-stages 32:0.5,batch=4 final:0.5,batch=8"
    words = f"--seq-length 128 --train-samples 64 --attention-dropout 0 {stages}".split()
    batch = ["--global-batch-size", "4"]
    grows = ["--step-batch-size-schedule", "0:4 4096:8"]
    megatron(doctor.releases.megatron_in(write_megatron(tmp_path / "new")))
    code, report = ask(capsys, *words, *batch)
    flag = "Give --step-batch-size-schedule '0:4 4096:8', without --global-batch-size"
    assert code == 1 and flag in report["problems"][0]
    assert ask(capsys, *words, *grows)[0] == 0
    megatron(doctor.releases.megatron_in(write_megatron(tmp_path / "old", "0.17.1")))
    code, report = ask(capsys, *words, *batch)
    assert code == 1 and "and Megatron 0.17.1 has no such flag" in report["problems"][0]
    code, report = ask(capsys, *words, *grows)
    assert code == 1
    assert "Megatron 0.17.1 has no --step-batch-size-schedule" in report["problems"][0]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--reset-attention-mask", "--reset-attention-mask cannot be combined with SkyLadder: "),
        ("--window-size 128,1", "--window-size=128,1 cannot be combined with SkyLadder: "),
        ("--cuda-graph-impl local", "a CUDA graph of attention would replay the window"),
        ("--attention-dropout 0.2", "--attention-dropout=0.2 cannot be combined"),
    ],
)
def test_a_flag_that_cannot_be_combined(tmp_path, megatron, capsys, flags, problem):
    megatron(doctor.releases.megatron_in(write_megatron(tmp_path)))
    words = [*LAUNCH, *flags.split()]
    assert ask(capsys, *words)[0] == 0  # without a ladder it is Megatron's own affair
    code, report = ask(capsys, *words, "--skyladder-start-window", "8")
    assert code == 1 and report["run"]["schedule"].startswith("linear")
    assert len(report["problems"]) == 1 and problem in report["problems"][0]


@pytest.mark.parametrize(("flags", "code"), [((), 0), (("--qk-clip",), 1)])
def test_a_launch_that_has_to_change_before_skyladder_fits(tmp_path, megatron, capsys, flags, code):
    megatron(doctor.releases.megatron_in(write_megatron(tmp_path)))
    found, report = ask(capsys, "torchrun", "pretrain_gpt.py", *LAUNCH, *flags)
    first = "Change: --qk-clip cannot stay" if flags else "Fits: add these flags"
    assert report["verdict"][0].startswith(first) and report["problems"] == []
    assert found == code


def test_attention_dropout_is_on_where_it_is_not_given(tmp_path, megatron, capsys):
    megatron(doctor.releases.megatron_in(write_megatron(tmp_path)))
    code, report = ask(capsys, *LAUNCH[:-2], "--skyladder-start-window", "8")
    assert code == 1
    assert report["problems"] == [
        "--attention-dropout=0.1 (Megatron's default) cannot be combined with SkyLadder: its "
        "kernels have no dropout. Set --attention-dropout 0."
    ]


def test_the_schedule_of_a_launch_with_spec(tmp_path, megatron, monkeypatch, capsys):
    megatron(doctor.releases.megatron_in(write_megatron(tmp_path)))
    monkeypatch.setenv("SKYLADDER_START_WINDOW", "16")
    spec = ["--spec", "megatron_skyladder.layer_specs", "skyladder"]
    code, report = ask(capsys, *LAUNCH, *spec)
    assert code == 0 and report["run"]["integration"].startswith("spec")
    assert report["run"]["schedule"].startswith("linear 16 -> 128")


def test_a_misspelt_flag_of_ours_is_refused(capsys):
    assert main(["doctor", "--skyladder-strt-window=8"]) == 1
    said = capsys.readouterr().err
    assert "--skyladder-strt-window is no flag of SkyLadder. Did you mean" in said
    assert "--skyladder-start-window?" in said


def test_a_misspelt_flag_of_megatron_is_a_problem(capsys):
    code, report = ask(capsys, *LAUNCH, "--hiden-size", "8")
    (problem,) = report["problems"]
    assert code == 1 and "Did you mean --hidden-size?" in problem


def test_the_page(tmp_path, megatron, capsys):
    megatron(doctor.releases.megatron_in(write_megatron(tmp_path)))
    assert main(["doctor"]) == 0
    short = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in short] == ["Fits", "Runs", "Next"]
    assert main(["doctor", "-v"]) == 0
    page = capsys.readouterr().out
    titles = [line for line in page.splitlines()[3:] if line and line[0] != " "]
    assert titles == ["Installed", "A run here", "Integrations"]
    megatron(doctor.releases.megatron_in(write_megatron(tmp_path / "old", "0.9.0")))
    assert main(["doctor"]) == 1
    page = capsys.readouterr().out
    assert page.startswith("Change: 1 problem, see below\n")
    assert "Problems\n  1  Megatron 0.9.0" in page
    assert max(map(len, page.splitlines()[3:])) <= 100 + len(str(tmp_path))


# --- several ranks -----------------------------------------------------------------------------


def test_ranks_that_agree():
    facts = {"torch": "2.15", "schedule": "linear"}
    assert disagreements([("a", facts), ("b", dict(facts))]) == []


def test_every_difference_is_named_with_its_ranks():
    ranks = [("a", {"torch": "2.15", "$NVTE_X": "1"})] * 5 + [("b", {"torch": "2.14"})]
    torch, variable = disagreements(ranks)
    assert torch == (
        "the ranks disagree on torch: '2.15' on rank 0 (a), 1 (a), 2 (a), 3 (a) and more; '2.14' "
        "on rank 5 (b). Make them the same."
    )
    assert "$NVTE_X" in variable and "'unset' on rank 5 (b)" in variable


def test_variables_that_decide_a_run_are_compared(monkeypatch):
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    monkeypatch.setenv("HOME", "/elsewhere")
    facts = doctor.fingerprint_of_rank(Report(installed={"torch": "2"}, run={"schedule": "s"}))
    assert facts["$NVTE_FLASH_ATTN"] == "0" and "$HOME" not in facts
    assert facts["torch"] == "2" and facts["schedule"] == "s"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_that_nobody_started_are_not_waited_for(
    rank, tmp_path, megatron, capsys, monkeypatch
):
    """Pods of a PyTorchJob and Azure ML set WORLD_SIZE for whatever runs in them."""
    megatron(doctor.releases.megatron_in(write_megatron(tmp_path)))
    monkeypatch.setattr(doctor, "compare_ranks", lambda report: pytest.fail("waits for ranks"))
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    ranks = {"RANK": rank, "WORLD_SIZE": "4", "MASTER_ADDR": "job-master", "MASTER_PORT": "2"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    code, report = ask(capsys)
    assert code == 0 and "ranks" not in report["run"]
    (note,) = [note for note in report["notes"] if "WORLD_SIZE=4 is set, but neither" in note]
    assert "torchrun ... -m megatron_skyladder doctor" in note
    monkeypatch.setenv("SLURM_PROCID", "0")  # a shell in an allocation, a step of one task
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert ask(capsys)[0] == 0


@pytest.mark.parametrize(
    "sign",
    [{"TORCHELASTIC_RUN_ID": "none"}, {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}],
)
def test_ranks_that_were_started_are_compared(sign, tmp_path, megatron, capsys, monkeypatch):
    megatron(doctor.releases.megatron_in(write_megatron(tmp_path)))
    monkeypatch.setattr(doctor, "compare_ranks", lambda report: ["another torch on rank 3"])
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", **sign}.items():
        monkeypatch.setenv(name, value)
    assert main(["doctor"]) == 1 and capsys.readouterr().out == ""  # rank 0 prints


def test_under_torchrun_all_ranks_compare(tmp_path):
    """Two ranks with schedules of their own: both fail, one prints."""
    write_megatron(tmp_path / "megatron")
    program = tmp_path / "ask.py"
    program.write_text(
        "import os, sys\n"
        "from megatron_skyladder.cli import main\n"
        "steps = '10' + os.environ['RANK']\n"
        f"launch = {LAUNCH!r} + ['--train-iters', steps, '--skyladder-start-window', '8']\n"
        "code = main(['doctor', '--json', *launch])\n"
        f"with open({str(tmp_path / 'code')!r} + os.environ['RANK'], 'w') as file:\n"
        "    file.write(str(code))\n"
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(tmp_path / "megatron"), str(REPOSITORY)])
    result = subprocess.run(
        [sys.executable, *torchrun, str(program)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(result.stdout)
    flags, schedule = report["problems"]
    assert "the ranks disagree on flags: '--seq-length 128" in flags
    assert "the ranks disagree on schedule: 'linear 8 -> 128" in schedule
    assert report["run"]["ranks"] == "disagree"
    assert [(tmp_path / f"code{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


def test_what_one_part_raises_does_not_hide_the_others(tmp_path, megatron, monkeypatch):
    def broken():
        raise doctor.MegatronMismatchError("no Megatron is installed")

    monkeypatch.setattr(doctor.releases, "installed", broken)
    parser = add_parser(argparse.ArgumentParser().add_subparsers(), "")
    report = doctor.examine(parser.parse_args([]), Pasted())
    assert report.problems == ["no Megatron is installed"]
    assert "attention backend" in report.run and report.installed["megatron"] == "none"
