"""A launch as people have it goes through plan and doctor: pasted, or in a script's text."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_skyladder.cli import main
from megatron_skyladder.planning.launch import Launch, from_script, from_words
from megatron_skyladder.testing import requires_megatron

LAUNCHES = Path(__file__).parents[1] / "data" / "launches"
DENSE, MOE = LAUNCHES / "train_llama_8b.sh", LAUNCHES / "train_moe.sh"
FLAGS = (
    "--num-layers 2 --hidden-size 128 --num-attention-heads 4 --seq-length 2048 --vocab-size 512 "
    "--position-embedding-type rope --micro-batch-size 1 --global-batch-size 16 --train-iters 2000 "
    "--attention-dropout 0"
)


def call(capsys: pytest.CaptureFixture[str], command: str) -> str:
    assert main(shlex.split(command)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def plan(capsys: pytest.CaptureFixture[str], words: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(call(capsys, f"plan --json {words}"))
    return result


def refused(capsys: pytest.CaptureFixture[str], command: str) -> str:
    assert main(shlex.split(command)) == 1
    return " ".join(capsys.readouterr().err.split())


# --- what starts it -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launcher", "entry", "num_gpus"),
    [
        ("torchrun --nproc-per-node 8 pretrain_gpt.py", "pretrain_gpt.py", 8),
        ("torchrun --nproc_per_node=8 --nnodes=4 x/pretrain_gpt.py", "x/pretrain_gpt.py", 32),
        ("torchrun --nnodes 2 pretrain_gpt.py", "pretrain_gpt.py", 2),
        ("torchrun --nproc-per-node gpu pretrain_gpt.py", "pretrain_gpt.py", None),
        ("torchrun --nproc-per-node 8 --nnodes 1:4 a.py", "a.py", None),
        ("A=1 B=2 torchrun --nproc-per-node 2 a.py", "a.py", 2),
        ("python -m torch.distributed.run --nproc-per-node 4 a.py", "a.py", 4),
        ("python3.12 -u -m torch.distributed.launch --nproc_per_node 4 a.py", "a.py", 4),
        (
            "torchrun --nproc-per-node 4 -m megatron_skyladder.pretrain_gpt",
            "megatron_skyladder.pretrain_gpt",
            4,
        ),
        ("srun -N 4 --ntasks-per-node 8 python a.py", "a.py", 32),
        ("srun --ntasks=16 python -u a.py", "a.py", 16),
        ("srun -N 2 torchrun --nproc-per-node 8 --nnodes 2 a.py", "a.py", 16),
        ("mpirun -np 8 python a.py", "a.py", 8),
        ("python a.py", "a.py", None),
        ("a.py", "a.py", None),
        ("srun -N4 --ntasks-per-node=8 python a.py", "a.py", 32),
        ("srun -n32 python a.py", "a.py", 32),
        ("srun -N4 --gpus-per-node=h100:8 torchrun --nproc-per-node=gpu a.py", "a.py", 32),
        ("srun -N4 -G32 torchrun --nproc-per-node=gpu --nnodes=4 a.py", "a.py", 32),
        ("srun -N4 -G h100:32 torchrun --nproc-per-node=gpu --nnodes=2 a.py", "a.py", 16),
        ("srun --gres=gpu:x torchrun --nproc-per-node=8 --nnodes=4 a.py", "a.py", 32),
        ("srun -N 1-4 torchrun --nproc-per-node=8 --nnodes=4 a.py", "a.py", 32),
        ("srun torchrun --nproc-per-node=8 --nnodes=$SLURM_NNODES a.py", "a.py", None),
        ("srun -N4 torchrun --nproc-per-node=8 --nnodes=$SLURM_NNODES a.py", "a.py", 32),
        ("srun docker run --gpus all x torchrun --nproc-per-node=8 a.py", "a.py", 8),
        ("accelerate launch --num_processes 16 --num_machines 2 a.py", "a.py", 16),
        ("deepspeed --num_gpus 8 --num_nodes 2 a.py", "a.py", 16),
        # options of what stands between are not the launcher's
        ("numactl -N 0 -m 0 torchrun --nproc-per-node=8 --nnodes=4 a.py", "a.py", 32),
        ("numactl -N 0 torchrun --nproc-per-node=8 a.py", "a.py", 8),
        ("nice -n 10 python a.py", "a.py", None),
        ("srun -n 16 nice -n 10 python -m x.y", "x.y", 16),
        ("srun -m cyclic -N2 --ntasks-per-node=8 python -u -m x.y", "x.y", 16),
        ("srun -n 8 uv run -m x.y", "x.y", 8),
    ],
)
def test_launchers(launcher: str, entry: str, num_gpus: int | None) -> None:
    found = from_words([*launcher.split(), "--lr", "1"])
    assert (found.entry, found.num_gpus, found.words) == (entry, num_gpus, ["--lr", "1"])


def test_flags_of_the_command_may_stand_on_both_sides() -> None:
    words = [
        "--device",
        "h100",
        "--json",
        "torchrun",
        "--nproc-per-node",
        "8",
        "a.py",
        "--lr",
        "1",
        "--at",
        "0",
    ]
    found = from_words(words, switches=["--json"])
    assert (
        found.words == ["--device", "h100", "--json", "--lr", "1", "--at", "0"]
        and found.num_gpus == 8
    )
    assert from_words(["--calibrate", "run.py", "--lr", "1"]).entry == ""  # a value


def test_a_pasted_launch_is_the_plan_of_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    pasted = plan(capsys, f"torchrun --nproc-per-node 8 pretrain_gpt.py {FLAGS} --device h100")
    flags = plan(capsys, f"{FLAGS} --device h100 --gpus 8")
    assert pasted["windows"] == flags["windows"] and pasted["time"] == flags["time"]


# --- scripts ------------------------------------------------------------------------------------


def test_a_typical_script(capsys: pytest.CaptureFixture[str]) -> None:
    found = from_script(str(DENSE), {})
    assert (found.entry, found.num_gpus) == ("pretrain_gpt.py", 256)
    assert found.environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    result = plan(capsys, f"--from-script {DENSE} --vocab-size 128256 --device h100")
    assert result["parameters"] == 8_030_261_248  # Llama 3 8B
    assert result["steps"] == 24_414_063 // 256
    assert result["time"]["gpus"] == 256 and result["context_parallel"]["size"] == 2
    assert result["verdict"]["fits"]


def test_a_script_of_a_mixture_of_experts(capsys: pytest.CaptureFixture[str]) -> None:
    found = from_script(str(MOE), {})
    assert (found.entry, found.num_gpus) == ("pretrain_gpt.py", 128)
    result = plan(capsys, f"--from-script {MOE} --vocab-size 32000 --device h100")
    assert result["parameters"] == 46_702_792_704  # Mixtral 8x7B
    assert result["active_parameters"] == 12_879_925_248
    assert result["verdict"]["fits"] and not any("WANDB" in note for note in result["notes"])


def test_values_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--fp8-format" not in from_script(str(DENSE), {}).words
    assert "--fp8-format" in from_script(str(DENSE), {"DTYPE": "fp8"}).words
    shared = from_script(str(MOE), {"VARIANT": "shared", "EXTRA_ARGS": "--seed 5"})
    assert "--moe-shared-expert-intermediate-size" in shared.words
    assert shared.words[-2:] == ["--seed", "5"]
    few = plan(capsys, f"--from-script {DENSE} --set NUM_NODES=4 --vocab-size 9 --tflops 1")
    assert few["time"]["gpus"] == 32 and few["tokens"] // 8192 == 24_414_063 // 32 * 32


TORCHRUN = "torchrun --nproc-per-node=8 --nnodes=$SLURM_NNODES"
ON_GPUS = "torchrun --nproc-per-node=gpu --nnodes=$SLURM_NNODES"


@pytest.mark.parametrize(
    ("job", "launcher", "num_gpus"),
    [
        ("-N4", f"srun {TORCHRUN}", 32),
        ("-N4|--gpus-per-node=8", f"srun {TORCHRUN}", 32),
        ("-N4 --ntasks-per-node=8 # all of them|--gpus-per-node=8", "srun python", 32),
        ("-N 4|-n 32", "srun python", 32),
        ("-n32", "srun python", 32),
        ("--nodes=4|--ntasks-per-node=1|--gpus-per-node=h100:8", f"srun {ON_GPUS}", 32),
        ("--nodes=4|--gres=gpu:8,nvme:1", f"srun {ON_GPUS}", 32),
        ("--nodes=4|--gres=nvme:1,gpu:h100:8(S:0,1)", f"srun {ON_GPUS}", 32),
        ("--nodes=4|--gres=gpu:h100", f"srun {ON_GPUS}", 4),
        ("--nodes=4|--gres=gpu:a100:4,gpu:h100:4", f"srun {ON_GPUS}", 32),
        ("--nodes=4|--gpus=32|--ntasks-per-node=1", f"srun {ON_GPUS}", 32),
        ("--nodes=4|-G32|--ntasks-per-node=1", f"srun {ON_GPUS}", 32),
        ("--gpus=32|--ntasks-per-node=1", f"srun {ON_GPUS}", 32),
        ("--nodes=4|--gpus=32", f"srun -N2 {ON_GPUS}", 16),
        ("--nodes=4", f"srun -G32 {ON_GPUS}", 32),
        ("--nodes=3|--gpus=8", f"srun {ON_GPUS}", 8),
        (
            "--nodes=4|--ntasks-per-node=1|--gpus-per-node=h100:8",
            "srun --gpus-per-node=h100:8 torchrun --nproc-per-node=8 --nnodes=4",
            32,
        ),
        ("--nodes=4|--gpus-per-node=8", "srun --ntasks-per-node=8 python", 32),
        ("--nodes=4|--ntasks-per-node=8", "srun -N2 python", 16),
        ("--nodes=4|--ntasks=32|--gpus-per-node=8", "srun -n 16 python", 16),
        ("--nodes=4|--gpus-per-node=8", "srun -n $RANKS python", 32),
        # what cannot be read is not guessed from something else, such as tasks
        ("--gpus-per-node=8", f"srun {TORCHRUN}", None),
        ("--nodes=4|--ntasks-per-node=1|--gpus-per-node=h100", f"srun {ON_GPUS}", None),
        ("--nodes=4|--ntasks-per-node=1|--gpus-per-node=h100", "srun python", None),
        ("--nodes=4|--ntasks-per-node=1", f"srun {ON_GPUS}", None),
        ("--nodes=2-4|--gpus-per-node=8", f"srun {TORCHRUN}", None),
        ("--nodes=4|--gres=gpu:$N", f"srun {ON_GPUS}", None),
        # and what does not decide does not matter
        ("--nodes=4|--gpus-per-node=$N|--ntasks=x", f"srun {TORCHRUN}", 32),
        ("--nodes=4|--gres=nvme:1|--ntasks-per-node=8", "srun python", 32),
        ("--comment=don't|--nodes=4", f"srun {TORCHRUN}", 32),
    ],
)
def test_gpus_of_a_job(tmp_path: Path, job: str, launcher: str, num_gpus: int | None) -> None:
    lines = "".join(f"#SBATCH {line}\n" for line in job.split("|"))
    path = script(tmp_path, f"#!/bin/bash\n{lines}{launcher} a.py --num-layers 2\n")
    assert from_script(path, {}).num_gpus == num_gpus


def test_a_value_for_the_nodes_counts(tmp_path: Path) -> None:
    path = script(tmp_path, f"#SBATCH --nodes=4\nsrun {TORCHRUN} a.py --num-layers 2\n")
    assert from_script(path, {"SLURM_NNODES": "2"}).num_gpus == 16


def test_what_stands_behind_the_script_wins(capsys: pytest.CaptureFixture[str]) -> None:
    result = plan(capsys, f"--from-script {DENSE} --vocab-size 9 --seq-length 4096")
    assert "linear 32 -> 4096" in result["schedule"]


def script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "train.sh"
    path.write_text(text)
    return str(path)


def test_a_script_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    text = "NODES=4\ntorchrun --nnodes=$NODES --nproc-per-node=8 a.py --num-layers 2\n"
    assert from_script(script(tmp_path, f"\ufeff{text}"), {}).num_gpus == 32


def test_what_has_no_value_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = FLAGS.replace("--global-batch-size 16", "--global-batch-size $GBS")
    path = script(tmp_path, f"N=$(nproc)\ntorchrun a.py {flags} \\\n  --train-samples $((N * 2))\n")
    message = refused(capsys, f"plan --from-script {path}")
    assert "--global-batch-size has no value: train.sh, line 2: $GBS has no value." in message
    assert "Give it: --set GBS=VALUE, or --global-batch-size VALUE." in message
    assert "--train-samples has no value: train.sh, line 1: $(nproc) would have to" in message
    path = script(tmp_path, f"torchrun a.py {flags}\n")
    assert plan(capsys, f"--from-script {path} --set GBS=8")["tokens"] == 2000 * 8 * 2048
    assert plan(capsys, f"--from-script {path} --global-batch-size 4")["tokens"] == 2000 * 4 * 2048


def test_what_does_not_matter_is_not_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = script(tmp_path, f"torchrun a.py {FLAGS} --save $CKPT/x --lr $(lr) $EXTRA\n")
    notes = plan(capsys, f"--from-script {path}")["notes"]
    assert not any("CKPT" in note or "lr)" in note for note in notes)


def test_a_part_of_the_launch_that_is_not_known_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = script(tmp_path, f"torchrun a.py {FLAGS} $EXTRA --swiglu ${{MORE[@]}}\n")
    notes = plan(capsys, f"--from-script {path}")["notes"]
    assert any("$EXTRA has no value: what $EXTRA would add is left out" in note for note in notes)
    assert any("what $MORE would add" in note and "--set MORE=" in note for note in notes)


def test_the_training_among_several_commands_is_found(tmp_path: Path) -> None:
    text = "python tools/preprocess.py --input x\ntorchrun a.py --num-layers 2\npython plot.py\n"
    assert from_script(script(tmp_path, text), {}).entry == "a.py"
    two = f"{text}torchrun b.py --num-layers 3\n"
    found = from_script(script(tmp_path, two), {})
    assert found.entry == "b.py" and "starts 2 trainings; read was the last" in found.notes[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo torchrun a.py\n", "train.sh starts no training that can be seen"),
        ("torchrun 'a.py\n", "cannot be read as a shell script: line 1: a quote ' is not closed"),
    ],
)
def test_scripts_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    assert message in refused(capsys, f"plan --from-script {script(tmp_path, text)}")


def test_mistakes_in_naming_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert "/no/such.sh: No such file" in refused(capsys, "plan --from-script /no/such.sh")
    assert f"--from-script {DENSE}." in refused(capsys, f"plan bash {DENSE}")
    assert "--set N: give a variable and its value" in refused(
        capsys, f"plan --from-script {DENSE} --set N"
    )
    assert "Name it: --from-script FILE" in refused(capsys, f"plan {FLAGS} --set N=1")


# --- the verdict --------------------------------------------------------------------------------


def verdict(capsys: pytest.CaptureFixture[str], words: str) -> list[str]:
    lines = call(capsys, f"plan {words}").splitlines()[:3]
    assert [line.split()[0].strip(":") for line in lines[1:]] == ["Saves", "Next"]
    return lines


def test_three_lines_for_a_launch(capsys: pytest.CaptureFixture[str]) -> None:
    fits, saves, after = verdict(
        capsys, f"torchrun --nproc-per-node 8 pretrain_gpt.py {FLAGS} --tflops 1 "
        "--price-per-gpu-hour 2.5",
    )  # fmt: skip
    assert fits == (
        "Fits: add these flags: --skyladder-start-window 32 --skyladder-expand-fraction 0.64; "
        "start -m megatron_skyladder.pretrain_gpt in place of pretrain_gpt.py (or: skyladder patch "
        "apply its folder)"
    )
    time = plan(capsys, f"{FLAGS} --tflops 1 --gpus 8")["time"]
    before, after_it = time["constant"]["hours"], time["ladder"]["hours"]
    low, high = time["saved_percent_range"]
    assert saves == (
        f"Saves {time['saved_percent']:.1f} % of the time ({low:.1f} to {high:.1f} %), "
        f"{before - after_it:.3g} of {before:.3g} hours on 8 GPUs, about "
        f"${(before - after_it) * 8 * 2.5:,.0f} at 2.50; predicted from 1 TFLOP/s per GPU"
    )
    assert after.startswith("Next: skyladder doctor with the same launch")


def test_a_launch_that_is_ours_already(capsys: pytest.CaptureFixture[str]) -> None:
    start = "torchrun --nproc-per-node 8 -m megatron_skyladder.pretrain_gpt"
    fits, *_ = verdict(capsys, f"{start} {FLAGS} --skyladder-start-window 8")
    assert fits == "Fits: no flag is to be added"


def test_dropout_is_on_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    fits, *_ = verdict(capsys, FLAGS.replace("--attention-dropout 0", ""))
    assert fits.startswith("Fits: add these flags: --attention-dropout 0 --skyladder-start-window")


def test_what_has_to_change_is_named_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = FLAGS.replace("--attention-dropout 0", "\\\n --attention-dropout 0.1 \\\n --qk-clip")
    fits, _, after = verdict(capsys, f"--from-script {script(tmp_path, f'torchrun a.py {flags}')}")
    assert fits.startswith(
        "Change: --attention-dropout=0.1 (train.sh:2) to --attention-dropout 0, as its kernels "
        "have no dropout; --qk-clip (train.sh:3) cannot stay: clipping needs"
    )
    assert "then add these flags: --skyladder-start-window 32" in fits
    assert "make these changes and plan again" in after


def test_context_parallelism_waits_for_its_busiest_rank(
    capsys: pytest.CaptureFixture[str],
) -> None:
    alone = f"{FLAGS} --tflops 1 --gpus 2 --skyladder-start-window 32"
    shared = f"{alone} --context-parallel-size 2 --skyladder-context-parallel-layout zigzag"
    even, busy = plan(capsys, alone), plan(capsys, shared)
    assert busy["time"]["saved_percent"] < even["time"]["saved_percent"]
    _, saves, _ = verdict(capsys, shared)
    assert saves.startswith(f"Saves {busy['time']['saved_percent']:.1f} % of the time (")
    even_share = f"; {even['time']['saved_percent']:.1f} % if all context-parallel ranks had"
    assert even_share in saves
    _, alike, _ = verdict(capsys, alone)
    assert "context-parallel" not in alike


def test_windows_alone_need_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--seq-length 2048 --global-batch-size 8 --train-iters 2000"
    _, saves, after = verdict(capsys, words)
    assert "of the attention work (FLOPs and time: the model is not known: give" in saves
    assert after.startswith("Next: give --hidden-size, --num-attention-heads, --num-layers to")
    result = plan(capsys, f"{words} --at 0,1999")
    assert result["windows"] == {"0": 32, "1999": 2048} and result["flops"] is None
    assert "window" in call(capsys, f"plan {words} -v")


def test_details_are_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    short = call(capsys, f"plan {FLAGS}")
    assert "Schedule     linear 32 -> 2048, fraction 0.64 of 2000 steps" in short
    assert "visible context" not in short and "Left out" not in short
    long = call(capsys, f"plan {FLAGS} --lr 1 -v")
    assert long.splitlines()[:3] == short.splitlines()[:3]
    assert "visible context" in long and "Left out, as they change nothing here:" in long
    some = call(capsys, f"plan {FLAGS} --at 0,5")
    assert "visible context" in some and "FLOPs    " not in some


# --- names --------------------------------------------------------------------------------------


def test_misspelt_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, f"plan {FLAGS} --hiden-size 8 --ful-validation")
    assert "--hiden-size is no flag of Megatron" in message
    assert "Did you mean --hidden-size?" in message and "--full-validation?" in message
    path = script(tmp_path, f"torchrun a.py {FLAGS} \\\n --hiden-size 8")
    assert "train.sh:2: --hiden-size is no flag" in refused(capsys, f"plan --from-script {path}")
    assert main(["doctor", "--from-script", path]) == 1
    assert "train.sh:2: --hiden-size is no flag" in " ".join(capsys.readouterr().out.split())


def test_a_flag_that_is_nobodys_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    notes = plan(capsys, f"{FLAGS} --zyx-own-thing 1")["notes"]
    assert any("--zyx-own-thing is no flag of Megatron" in note for note in notes)


# --- doctor -------------------------------------------------------------------------------------


def test_doctor_takes_a_launch_without_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SKYLADDER_DEVICE", "cpu")
    launch = f"torchrun --nproc-per-node 8 -m megatron_skyladder.pretrain_gpt {FLAGS}"
    main(shlex.split(f"doctor --json {launch} --skyladder-start-window 8"))
    report = json.loads(capsys.readouterr().out)
    assert report["run"]["schedule"].startswith("linear 8 -> 2048")
    assert report["run"]["flags"].startswith("--num-layers 2")


@requires_megatron
@pytest.mark.parametrize("script", [DENSE, MOE], ids=["dense", "experts"])
def test_doctor_takes_a_script(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SKYLADDER_DEVICE", "cpu")
    assert main(["doctor", "--from-script", str(script)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "Fits: add these flags: --skyladder-start-window 32 --skyladder-expand-fraction 0.64; "
        "start -m megatron_skyladder.pretrain_gpt in place of pretrain_gpt.py"
    )
    assert [line.split(":")[0] for line in lines[:2]] == ["Runs", "Next"]


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_may_be_closed(closed: str) -> None:
    """A cron job or a launcher may start it without: Python has None in their place."""
    command = f"{shlex.quote(sys.executable)} -m megatron_skyladder plan --preset 1b-8k {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("Fits:" in done.stdout) == (closed == "2>&-")


def test_an_empty_launch() -> None:
    assert Launch().words == [] and Launch().place("--lr") == ""
