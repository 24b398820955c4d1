"""The paper's runs as command lines: against its tables, Megatron's parser and Megatron's model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_skyladder.cli import main
from megatron_skyladder.ladder.costs import DecoderShape
from megatron_skyladder.ladder.presets import PAPER_RUNS
from megatron_skyladder.planning import examples, layouts
from megatron_skyladder.planning.devices import DEVICES
from megatron_skyladder.planning.examples import VARIANTS, example
from megatron_skyladder.planning.launch import from_script
from megatron_skyladder.planning.layouts import (
    GPU_MEMORY_GIB,
    GPUS_PER_NODE,
    LAYOUTS,
    estimated_gib,
)
from megatron_skyladder.testing import ProcessPool, requires_megatron

LAUNCHER = Path(__file__).resolve().parents[2] / "examples" / "pretrain.sh"
# 32,000 tokens without the tokenizer's file
DATA = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "32000", "--mock-data"]


NO_TOKENIZER = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "32000"]
LAUNCHES = Path(__file__).parents[1] / "data" / "launches"


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool() as processes:
        yield processes


# --- what the flags say ---------------------------------------------------------------------------

# arXiv:2503.15450, Table 12, typed anew: these flags are in every example of the run
MODEL_FLAGS = {
    "120m-8k": "--num-layers 12|--hidden-size 768|--ffn-hidden-size 2048|--num-attention-heads 12|"
    "--num-query-groups 1|--seq-length 8192|--global-batch-size 128|--rotary-base 10000",
    "360m-8k": "--num-layers 18|--hidden-size 1024|--ffn-hidden-size 4096|--num-attention-heads 16|"
    "--num-query-groups 16|--seq-length 8192|--global-batch-size 128|--rotary-base 10000",
    "1b-8k": "--num-layers 22|--hidden-size 2048|--ffn-hidden-size 5632|--num-attention-heads 32|"
    "--num-query-groups 4|--seq-length 8192|--global-batch-size 128|--rotary-base 10000",
    "1b-32k": "--num-layers 22|--hidden-size 2048|--ffn-hidden-size 5632|--num-attention-heads 32|"
    "--num-query-groups 4|--seq-length 32768|--global-batch-size 32|--rotary-base 1000000",
    "3b-8k": "--num-layers 28|--hidden-size 3072|--ffn-hidden-size 8192|--num-attention-heads 24|"
    "--num-query-groups 8|--seq-length 8192|--global-batch-size 128|--rotary-base 100000",
}
TRAINING_FLAGS = (
    "--train-iters 100000|--lr 0.0004|--min-lr 4e-05|--lr-decay-style cosine|"
    "--lr-warmup-iters 2000|--adam-beta1 0.9|--adam-beta2 0.95|--weight-decay 0.1|--clip-grad 1.0|"
    "--bf16|--seed 3407|--norm-epsilon 1e-05|--normalization RMSNorm|--swiglu|"
    "--disable-bias-linear|--untie-embeddings-and-output-weights|--skyladder-init reference"
)
WINDOW_FLAGS = {
    "constant": {"--skyladder-schedule constant"},
    "intra-document": {"--skyladder-schedule constant", "--skyladder-intra-document"},
    "skyladder": {"--skyladder-preset RUN"},
    "skyladder-intra-document": {"--skyladder-preset RUN", "--skyladder-intra-document"},
    "recommended": {"--skyladder-preset recommended"},
    "recommended-intra-document": {
        "--skyladder-preset recommended",
        "--skyladder-intra-document",
    },
}


def flags(found: examples.Example) -> list[str]:
    return [flag.text for section in found.sections.values() for flag in section]


@pytest.mark.parametrize("run_name", PAPER_RUNS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_flags_are_the_papers(run_name: str, variant: str) -> None:
    given = flags(example(run_name, variant))
    assert {*MODEL_FLAGS[run_name].split("|"), *TRAINING_FLAGS.split("|")} <= set(given)
    window = {text.replace("RUN", run_name) for text in WINDOW_FLAGS[variant]}
    ours = {text for text in given if text.startswith("--skyladder")}
    assert {t for t in ours if "init" not in t and "eval" not in t} == window
    names = [text.split()[0] for text in given]
    assert len(names) == len(set(names))


def test_the_paper_and_its_advice_are_told_apart() -> None:
    for variant in VARIANTS:
        text = "\n".join(examples.to_text(example("1b-8k", variant)))
        assert ("NOT a run of the paper" in text) == variant.startswith("recommended")


def test_every_flag_has_a_reason() -> None:
    for run_name, gpu in LAYOUTS:
        for section in example(run_name, "skyladder", gpu=gpu).sections.values():
            assert all(flag.reason for flag in section)


def test_evaluation_is_the_papers_25_batches_every_500_steps() -> None:
    for run_name in PAPER_RUNS:
        assert {"--eval-interval 500", "--eval-iters 25"} <= set(
            flags(example(run_name, "constant"))
        )


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"7b is no run of the paper\. Choose: 120m-8k"):
        example("7b", "skyladder")
    with pytest.raises(ValueError, match=r"fast is no variant\. Choose: constant"):
        example("1b-8k", "fast")
    with pytest.raises(
        ValueError, match=r"no layout for 1b-8k on v100\. Known are the runs 120m-8k"
    ):
        example("1b-8k", "skyladder", gpu="v100")


# --- layouts --------------------------------------------------------------------------------------


def test_every_run_has_a_layout_for_every_gpu() -> None:
    assert set(LAYOUTS) == {(run, gpu) for run in PAPER_RUNS for gpu in GPU_MEMORY_GIB}
    assert GPU_MEMORY_GIB.keys() <= DEVICES.keys()


def test_memory_by_hand() -> None:
    # 1B at 8K on 8 GPUs: 1,100,048,384 * 7.5 bytes; 8,192 tokens of 22 * (12 * 2048 + 4 * 256
    # + 6 * 5632) + 10 * 32000 bytes
    expected = 1_100_048_384 * 7.5 + 8192 * (22 * (24_576 + 1024 + 33_792) + 320_000)
    layout = layouts.Layout(micro_batch_size=1)
    assert estimated_gib(PAPER_RUNS["1b-8k"], layout, 8) == pytest.approx(expected / 2**30)
    # TP2 halves all but the optimizer state, which it cuts over the 4 replicas instead of 8
    halved = layouts.Layout(micro_batch_size=1, tensor=2)
    cut = expected / 2 + 1_100_048_384 * (12 / 4 - 12 / 8) / 2
    assert estimated_gib(PAPER_RUNS["1b-8k"], halved, 8) == pytest.approx(cut / 2**30)


@pytest.mark.parametrize(("run_name", "gpu"), LAYOUTS)
def test_layouts_fit(run_name: str, gpu: str) -> None:
    layout, run = LAYOUTS[run_name, gpu], PAPER_RUNS[run_name]
    assert estimated_gib(run, layout, GPUS_PER_NODE) < 0.6 * GPU_MEMORY_GIB[gpu]
    for num_gpus in (8, 16, 32):  # one to four nodes divide the batch
        replicas = num_gpus // layout.gpus_per_replica
        assert run.global_batch_size % (replicas * layout.micro_batch_size) == 0
    assert run.seq_length % (2 * layout.context) == 0  # Megatron's zigzag
    assert run.model.num_query_groups % layout.tensor == 0


# --- Megatron's own parser and model --------------------------------------------------------------


@requires_megatron
def test_every_example_passes_megatrons_parser(pool: ProcessPool, tmp_path: Path) -> None:
    wanted = {
        f"{run} {variant} {gpu}": example(run, variant, gpu=gpu).words + DATA
        for run, gpu in LAYOUTS
        for variant in (VARIANTS if gpu == "h100" else ["skyladder"])  # they share no flag
    }
    results = tmp_path / "results.json"
    arguments = {"command_lines": wanted, "world_size": GPUS_PER_NODE, "results": str(results)}
    pool.run("example_bodies:parse_all", num_processes=1, folder=tmp_path, arguments=arguments)
    parsed: dict[str, dict[str, Any]] = json.loads(results.read_text())
    assert parsed.keys() == wanted.keys()
    for name, found in parsed.items():
        run_name, variant, gpu = name.split()
        replicas = GPUS_PER_NODE // LAYOUTS[run_name, gpu].gpus_per_replica
        assert found["data_parallel_size"] == replicas, name
        assert found["padded_vocab_size"] == 32_000, name
        assert (found["params_dtype"], found["weight_decay"]) == ("torch.bfloat16", 0.1), name
        assert found["init"] == "reference", name
        assert found["schedule"].startswith(_schedule(run_name, variant)), name
        assert found["schedule"].endswith(
            "documents masked" if variant.endswith("document") else "documents not masked"
        ), name


@requires_megatron
def test_launch_scripts_pass_megatrons_parser_as_plan_reads_them(
    pool: ProcessPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two typical scripts, with the flags that plan says are to be added: the same schedule."""
    wanted, planned = {}, {}
    for name, variable, value in (
        ("train_llama_8b.sh", "NUM_NODES", "16"),
        ("train_moe.sh", "EXTRA_ARGS", ""),
    ):
        script = ["--from-script", str(LAUNCHES / name), "--set", f"{variable}={value}"]
        assert main(["plan", "--json", *script]) == 0
        plan = json.loads(capsys.readouterr().out)
        planned[name] = plan["schedule"]
        words = from_script(str(LAUNCHES / name), {variable: value}).words
        wanted[name] = [*words, *plan["verdict"]["add"], *NO_TOKENIZER]
    results = tmp_path / "results.json"
    arguments = {"command_lines": wanted, "world_size": 128, "results": str(results)}
    pool.run("example_bodies:parse_all", num_processes=1, folder=tmp_path, arguments=arguments)
    parsed = json.loads(results.read_text())
    assert {name: found["schedule"] for name, found in parsed.items()} == planned
    assert parsed["train_llama_8b.sh"]["data_parallel_size"] == 128 // 4


def _schedule(run_name: str, variant: str) -> str:
    length = 32_768 if run_name == "1b-32k" else 8192
    if variant in ("constant", "intra-document"):
        return f"constant {length}; step of {2**20 // length} samples"
    if variant.startswith("recommended"):
        return f"linear 8 -> {length}, fraction 0.64 of 100000 steps;"
    return f"linear 32 -> {length}, alpha {'1/2' if length == 32_768 else '1/8'};"


PAPER_PARAMETERS = {
    "120m-8k": 121_129_728,
    "360m-8k": 367_563_776,
    "1b-8k": 1_100_048_384,  # the paper's N: with it, its FLOPs (Table 8) come out to the digit
    "1b-32k": 1_100_048_384,
    "3b-8k": 3_015_355_392,
}


@requires_megatron
def test_models_of_full_size_have_the_papers_parameters(pool: ProcessPool, tmp_path: Path) -> None:
    whole = ["--tensor-model-parallel-size", "1", "--context-parallel-size", "1"]
    lines = {name: [*example(name, "skyladder").words, *DATA, *whole] for name in PAPER_RUNS}
    results = tmp_path / "results.json"
    pool.run(
        "example_bodies:build_on_meta",
        num_processes=1,
        folder=tmp_path,
        arguments={"command_lines": lines, "results": str(results)},
    )
    built = json.loads(results.read_text())
    assert built == PAPER_PARAMETERS
    for name, run in PAPER_RUNS.items():
        assert DecoderShape.of_paper(run.model).num_parameters == built[name]


# --- the same, shrunk, on the CPU -----------------------------------------------------------------


def test_shrinking_keeps_the_kind_of_run() -> None:
    for run in PAPER_RUNS.values():
        small = examples.shrunk_run(run)
        for of_run in (run, small):
            assert of_run.model.num_attention_heads % of_run.model.num_query_groups == 0
        assert (small.model.num_query_groups == 1) == (run.model.num_query_groups == 1)
        is_grouped = small.model.num_query_groups < small.model.num_attention_heads
        assert is_grouped == (run.model.num_query_groups < run.model.num_attention_heads)
        assert (small.rotary_base, small.model.norm_epsilon) == (run.rotary_base, 1e-5)


@requires_megatron
@pytest.mark.parametrize("run_name", PAPER_RUNS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_shrunk_example_trains(
    pool: ProcessPool, tmp_path: Path, run_name: str, variant: str
) -> None:
    # TP and CP are tried once for each run that has them; the masks are the same
    gpu = "a100-40g" if variant == "skyladder-intra-document" else "h100"
    found = example(run_name, variant, gpu=gpu, shrink=True)
    pool.run(
        "example_bodies:train",
        num_processes=found.layout.gpus_per_replica,
        folder=tmp_path,
        arguments={"words": found.words},
    )
    last = found.layout.gpus_per_replica - 1
    _check_log(tmp_path / f"log.{last}.txt", variant, found)


def _check_log(log: Path, variant: str, found: examples.Example) -> None:
    rows = re.findall(
        r"iteration +(\d+)/ +8 .* lm loss: ([\d.E+-]+) \| skyladder/window: ([\d.E+-]+)",
        log.read_text(),
    )
    assert [int(row[0]) for row in rows] == list(range(1, 9))
    assert all(0 < float(row[1]) < 6 for row in rows)  # about ln 128 for an untrained model
    length = examples.SHRUNK_LENGTHS[PAPER_RUNS[found.run_name].seq_length]
    windows = [int(float(row[2])) for row in rows]
    # 2 tokens at first, all from 0.6528 (at 32K 0.65472) of 8 steps on
    # the recommended ones: 8 tokens at first, all from 0.64 of 8 steps on
    full = -(-8 * 65 // 100)
    if variant in ("constant", "intra-document"):
        assert set(windows) == {length}
    else:
        assert windows[0] == (2 if VARIANTS[variant].has_papers_ladder else 8)
        assert windows == sorted(windows)
        assert windows[full - 1] < length and set(windows[full:]) == {length}


# --- docs/reproduce.md ----------------------------------------------------------------------------


def test_tests_that_the_docs_name_exist() -> None:
    text = (LAUNCHER.parents[1] / "docs" / "reproduce.md").read_text()
    named = re.findall(r"`(tests/[\w/]+/)?(test_\w+\.py)`", text)
    assert len(named) > 20
    for folder, name in named:
        assert (LAUNCHER.parents[1] / (folder or "tests/unit/") / name).exists(), name


@pytest.mark.parametrize(
    "words",
    [
        "1b-32k --skyladder-schedule stepwise",
        "1b-32k --skyladder-schedule sinusoidal",
        "1b-32k --skyladder-schedule exponential",
        "1b-32k --skyladder-preset late-switch-baseline",
        *(f"120m-8k --skyladder-alpha {rate}" for rate in ("1", "1/2", "1/4", "1/12")),
        "120m-8k --skyladder-start-window 8",
        "1b-8k --skyladder-mask sliding",
        "1b-8k --skyladder-schedule cyclic --skyladder-expand-fraction 0.64",
        "1b-8k --skyladder-schedule cyclic-jump --skyladder-expand-fraction 0.64",
        "1b-8k --skyladder-schedule reversed --skyladder-expand-fraction 0.64",
    ],
)
def test_flags_behind_an_example_win(words: str) -> None:
    """The runs behind the paper's other tables, as docs/reproduce.md has them."""
    run_name, *changes = words.split()
    flags = [*example(run_name, "skyladder").words, "--vocab-size", "32000", *changes]
    assert main(["plan", *flags]) == 0


# --- the command and the launcher -----------------------------------------------------------------


def test_the_command_prints_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["example", "1b-8k", "--variant", "constant", "--flags-only"]) == 0
    words = capsys.readouterr().out.split()
    assert words == example("1b-8k", "constant").words
    assert main(["example", "1b-8k", "--variant", "constant"]) == 0
    typed = [line.partition("#")[0] for line in capsys.readouterr().out.splitlines()]
    assert " ".join(typed).split() == words


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["example", "3b-8k", "--variant", "recommended", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["words"] == example("3b-8k", "recommended").words
    assert found["reasons"]["--num-layers 28"] == "Table 12"
    assert (found["gpus_per_replica"], found["of_paper"]) == (2, False)


@pytest.mark.parametrize("shrink", [False, True])
def test_text_fits_a_terminal(shrink: bool) -> None:
    for run_name, gpu in LAYOUTS:
        for variant in VARIANTS:
            text = examples.to_text(example(run_name, variant, gpu=gpu, shrink=shrink))
            assert max(map(len, text)) <= 100


def test_the_command_lists_runs_and_variants(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["example"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in [*PAPER_RUNS, *VARIANTS])
    assert main(["example", "1b"]) == 1
    assert "1b is no run of the paper" in capsys.readouterr().err


def launch(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(LAUNCHER), *words],
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(LAUNCHER.parents[1])}
        | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_launcher_shows_its_usage_and_passes_errors_on() -> None:
    result = launch("1b-8k")
    assert result.returncode == 2
    assert result.stderr.startswith("Train one of the paper's runs")
    result = launch("1b", "skyladder")
    assert result.returncode == 1
    assert "1b is no run of the paper" in result.stderr


def test_the_launcher_runs_torchrun_with_the_examples_flags(tmp_path: Path) -> None:
    """With an interpreter that shows the command line in place of torchrun."""
    fake = tmp_path / "python"
    fake.write_text(
        "#!/bin/sh\n"
        f'[ "$2" = torch.distributed.run ] || exec {sys.executable} "$@"\n'
        'echo "$SKYLADDER_DEVICE $CUDA_DEVICE_MAX_CONNECTIONS $*"\n'
    )
    fake.chmod(0o755)
    shown = launch("3b-8k", "constant", "--lr", "1e-3", PYTHON=str(fake), GPU="h100").stdout
    flags_of = " ".join(example("3b-8k", "constant", gpu="h100").words)
    launched = "-m torch.distributed.run --standalone --nproc-per-node {} -m {} {}"
    entry = "megatron_skyladder.pretrain_gpt"
    assert shown.strip() == "1 " + launched.format(8, entry, flags_of) + " --lr 1e-3"
    shown = launch("1b-32k", "skyladder", "--shrink", PYTHON=str(fake)).stdout
    flags_of = " ".join(example("1b-32k", "skyladder", shrink=True).words)
    assert shown.strip() == "cpu 1 " + launched.format(4, entry, flags_of)


@requires_megatron
def test_the_launcher_trains() -> None:
    result = launch("3b-8k", "skyladder", "--shrink", "--train-iters", "4")
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(r"iteration +4/ +4 ", result.stdout + result.stderr)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_the_launcher_passes_shellcheck() -> None:
    subprocess.run(["shellcheck", str(LAUNCHER)], check=True)
