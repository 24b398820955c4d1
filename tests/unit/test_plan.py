"""``skyladder plan``, through the command line: figures, text, pictures, messages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import prepare_inputs as tiny
import pytest

from megatron_skyladder.cli import main
from megatron_skyladder.data.indexed import IndexedWriter
from megatron_skyladder.ladder.fragments import window_pairs
from megatron_skyladder.planning import plots, visible_context
from megatron_skyladder.planning.devices import DEVICES
from megatron_skyladder.report import images

# A launch line as people have it: 2,000 steps of 8 rows of 2,048 tokens.
LAUNCH = (
    "--num-layers 2 --hidden-size 128 --num-attention-heads 4 --seq-length 2048 "
    "--max-position-embeddings 2048 --swiglu --normalization RMSNorm --disable-bias-linear "
    "--position-embedding-type rope --untie-embeddings-and-output-weights --vocab-size 512 "
    "--micro-batch-size 1 --global-batch-size 8 --train-iters 2000"
)


def call(capsys: pytest.CaptureFixture[str], command: str) -> str:
    assert main(command.split()) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def plan_json(capsys: pytest.CaptureFixture[str], flags: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(call(capsys, f"plan --json {flags}"))
    return result


def refused(capsys: pytest.CaptureFixture[str], flags: str) -> str:
    try:
        code = main(["plan", *flags.split()])
    except SystemExit as stop:  # argparse
        code = stop.code if isinstance(stop.code, int) else 1
    assert code
    return " ".join(capsys.readouterr().err.split())


# --- figures ------------------------------------------------------------------------------------


def test_windows_at_steps(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(capsys, "--preset 1b-8k --at 0,8,64000")
    assert plan["windows"] == {"0": 32, "8": 33, "64000": 8032}


@pytest.mark.parametrize(
    ("preset", "constant", "ladder", "saved"),
    [("1b-8k", 11.57, 9.91, 14.3), ("1b-32k", 25.50, 18.83, 26.1)],
)
def test_table_8(
    capsys: pytest.CaptureFixture[str], preset: str, constant: float, ladder: float, saved: float
) -> None:
    flops = plan_json(capsys, f"--preset {preset}")["flops"]
    assert round(flops["constant"] / 1e20, 2) == constant
    assert round(flops["ladder"] / 1e20, 2) == ladder
    assert round(flops["saved_percent"], 1) == saved
    text = call(capsys, f"plan -v --preset {preset}")
    assert f"{constant:.2f}e20 with a constant window, {ladder:.2f}e20 with the ladder" in text


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("120m-8k", 121_129_728),
        ("360m-8k", 367_563_776),
        ("1b-8k", 1_100_048_384),
        ("1b-32k", 1_100_048_384),
        ("3b-8k", 3_015_355_392),
    ],
)
def test_every_preset_plans(
    capsys: pytest.CaptureFixture[str], preset: str, parameters: int
) -> None:
    plan = plan_json(capsys, f"--preset {preset}")
    assert plan["parameters"] == parameters
    assert plan["tokens"] == 100_000 * 2**20


def test_a_step_behind_the_end_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_json(capsys, f"{LAUNCH} --at 0,1999")["notes"] == plan_json(capsys, LAUNCH)["notes"]
    assert "Step 2,000 lies behind the end" in call(capsys, f"plan {LAUNCH} --at 2000")


def test_full_window(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(capsys, f"{LAUNCH} --skyladder-alpha 2")
    assert plan["full_window"] == {"step": 1008, "tokens": 1008 * 8 * 2048}
    shorter = plan_json(capsys, f"{LAUNCH} --skyladder-alpha 2 --skyladder-final-window 1024")
    assert shorter["full_window"] is None


def test_mean_work_is_that_of_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(capsys, f"{LAUNCH} --skyladder-schedule cyclic --train-iters 100")
    steps = ",".join(str(step) for step in range(100))
    each = plan_json(capsys, f"{LAUNCH} --skyladder-schedule cyclic --train-iters 100 --at {steps}")
    work = sum(window_pairs(w, 2048) for w in each["windows"].values()) / 100
    assert plan["attention_fraction"] == pytest.approx(work / window_pairs(2048, 2048))


def test_a_constant_window_saves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(capsys, f"{LAUNCH} --skyladder-schedule constant")
    assert plan["flops"]["saved_percent"] == 0
    assert plan["attention_fraction"] == 1
    assert plan["full_window"] == {"step": 0, "tokens": 0}


def test_flags_override_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(
        capsys,
        "--preset 1b-8k --num-layers 11 --train-samples 12800000 --skyladder-start-window 8 "
        "--at 0,8",
    )
    assert plan["parameters"] < 700e6
    assert plan["steps"] == 100_000
    assert plan["windows"] == {"0": 8, "8": 9}


def test_samples_make_steps(capsys: pytest.CaptureFixture[str]) -> None:
    launch = LAUNCH.replace("--train-iters 2000", "--train-samples 1607")
    assert plan_json(capsys, launch)["steps"] == 200


def test_a_schedule_that_begins_later(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(
        capsys, f"{LAUNCH} --skyladder-alpha 2 --skyladder-begin-samples 800 --at 99,100,101"
    )
    assert plan["windows"] == {"99": 32, "100": 32, "101": 34}
    assert plan["full_window"]["step"] == 1108


@pytest.mark.parametrize(
    "flags",
    [
        "--skyladder-alpha 2",
        "--skyladder-round-to pow2",
        "--skyladder-schedule points --skyladder-points 0:64 0.3:512 0.9:final",
        "--skyladder-schedule staged --skyladder-stages 128:0.5 512..final:0.2 final:rest",
        "--skyladder-alpha 2 --step-batch-size-schedule 0:4,4000000:8",
    ],
)
@pytest.mark.parametrize("begin", [800, 803])
def test_the_rest_of_a_run_that_began_without_is_planned_alone(
    capsys: pytest.CaptureFixture[str], flags: str, begin: int
) -> None:
    """As the note says; it has the windows that the whole run has from there on."""
    launch = LAUNCH.replace("--train-iters 2000", "--train-samples 16000")
    if "--step-batch" in flags:
        launch = launch.replace("--global-batch-size 8", "")
    first, ahead = -(-begin // 8), (16_000 - begin) // 8
    steps = range(first, 2000)
    at = f"--at {','.join(map(str, steps))}"
    whole = plan_json(capsys, f"{launch} {flags} --skyladder-begin-samples {begin} {at}")
    [note] = [note for note in whole["notes"] if "--skyladder-begin-samples" in note]
    assert f"count the first {begin:,} samples at the first window" in note
    rest = f"--train-samples {16_000 - begin}"
    assert f"plan the rest alone, with {rest} and without --skyladder-begin-samples." in note
    launch = launch.replace("--train-samples 16000", rest)
    alone = plan_json(capsys, f"{launch} {flags} --at {','.join(map(str, range(ahead)))}")
    assert alone["steps"] == ahead == len(steps)
    assert list(alone["windows"].values()) == list(whole["windows"].values())
    assert not any("--skyladder-begin-samples" in note for note in alone["notes"])


def test_the_first_samples_are_noted_where_their_window_is_short(
    capsys: pytest.CaptureFixture[str],
) -> None:
    begin = "--skyladder-begin-samples 800"
    words = "with --train-samples 15200 and without --skyladder-begin-samples"
    for command in ("plan", "compare --schedule linear cyclic"):
        text = " ".join(call(capsys, f"{command} {LAUNCH} {begin}").split())
        assert text.count(words) == 1
    for schedule in ("constant", "reversed"):
        flags = f"--skyladder-schedule {schedule} {begin}"
        assert words not in " ".join(call(capsys, f"plan {LAUNCH} {flags}").split())


def test_the_batch_follows_from_the_layout(capsys: pytest.CaptureFixture[str]) -> None:
    launch = LAUNCH.replace("--global-batch-size 8 ", "")
    layout = "--gpus 16 --tensor-model-parallel-size 2 --context-parallel-size 2"
    assert plan_json(capsys, f"{launch} {layout}")["tokens"] == 2000 * 4 * 2048


def test_stages_are_shown_where_they_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(capsys, f"{LAUNCH} --skyladder-preset shortformer")
    assert plan["windows"] == {"0": 128, "1000": 2048}


def test_other_flags_of_megatron_are_left_out_and_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    extra = "--lr 3e-4 --bf16 --split 99,1,0 --adam-beta2=0.95 --mock-data"
    plan = plan_json(capsys, f"--tokenizer-type NullTokenizer {LAUNCH} {extra}")
    (left_out,) = [note for note in plan["notes"] if "Left out" in note]
    for flag in ("--lr", "--bf16", "--split", "--adam-beta2", "--mock-data"):
        assert flag in left_out
    assert plan["flops"] == plan_json(capsys, LAUNCH)["flops"]


def test_without_our_flags_the_defaults_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(capsys, LAUNCH)
    assert plan["windows"]["0"] == 32
    assert any("No --skyladder-* flag was given" in note for note in plan["notes"])


def test_neither_torch_nor_megatron_is_loaded() -> None:
    code = (
        "import sys; from megatron_skyladder.cli import main; main(['plan', '--preset', '1b-8k']);"
        "print(sorted({'torch', 'megatron', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_a_batch_that_grows(capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron refuses --global-batch-size here; 4 batches of 2 and 6 of 4 are 8 steps of 4."""
    grows = LAUNCH.replace("--global-batch-size 8 --train-iters 2000", "--train-iters 10").split()
    flags = [*grows, "--step-batch-size-schedule", "0:2 16K:4", "--skyladder-start-window", "8"]
    flags[flags.index("--seq-length") + 1] = "2000"  # 16,000 tokens are 8 samples
    assert main(["plan", "--json", "--tflops", "100", "--gpus", "1", *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == 8 and "fraction 0.64 of 8 steps; step of 4 samples" in plan["schedule"]
    assert plan["tokens"] == 32 * 2000
    even = [*flags, "--train-samples", "32", "--step-batch-size-schedule", "0:4"]
    even.remove("--train-iters"), even.remove("10")  # type: ignore[func-returns-value]
    assert main(["plan", "--json", "--tflops", "100", "--gpus", "1", *even]) == 0
    assert json.loads(capsys.readouterr().out)["time"]["ladder"] == plan["time"]["ladder"]


def test_stages_that_move_all(capsys: pytest.CaptureFixture[str]) -> None:
    """What Megatron needs is printed, and taken where it stands in the launch already."""
    launch = LAUNCH.replace("--train-iters 2000", "--train-samples 1600").split()
    stages = "128..512:0.5,lr=1 ..final:0.25,batch=x2,lr=sqrt,rope=500000 final:rest,rope=1000000"
    flags = [*launch, "--skyladder-schedule", "staged", "--skyladder-stages", *stages.split()]
    assert main(["plan", *flags]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Change: --global-batch-size cannot stay: the stages set batches; then add" in text
    assert "--step-batch-size-schedule '0:8 1638400:16'" in text
    assert "releases have it from 0.18 on, older ones are refused" in text
    assert "800 1.6M 512 -> 1,986 16 1.414 500000 1,200 2.5M 2,048 16 1.414 1000000" in text
    assert "window, batch, learning rate and RoPE base move together here." in text
    assert "what they do together is unproven" in text
    at = flags.index("--global-batch-size")
    flags[at : at + 2] = ["--step-batch-size-schedule", "0:8,1638400:16"]
    assert main(["plan", "--json", *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["verdict"]["change"] == []
    assert "--step-batch-size-schedule" not in plan["verdict"]["add"]
    assert plan["step_batch_size_schedule"] == "0:8 1638400:16"
    assert plan["steps"] == 100
    assert plan["stages"][1] == {
        "samples": 800,
        "tokens": 1_638_400,
        "first_window": 512,
        "last_window": 512 + 1536 * 24 // 25,
        "values": {"batch": 16, "rate_factor": 2**0.5, "rope": 500_000, "yarn": None},
    }
    flags[at + 1] = "0:8"
    assert main(["plan", *flags]) != 0
    assert "the flag says '0:8'" in capsys.readouterr().err


def test_stages_that_move_yarn(capsys: pytest.CaptureFixture[str]) -> None:
    """A column of its own; what training refuses, plan refuses."""
    stages = "--skyladder-schedule staged --skyladder-stages 512:0.5 final:rest,rope=50000,yarn=4"
    launch = LAUNCH.replace("--position-embedding-type rope", "--position-embedding-type yarn")
    text = " ".join(call(capsys, f"plan -v {launch} {stages}").split())
    assert "RoPE base YaRN factor" in text
    assert "0 0 512 the model's the model's 8,000 16.4M 2,048 50000 4" in text
    assert "from 0.19 on, older ones are refused" in text
    assert "window, RoPE base and YaRN factor move together here." in text
    assert main(["plan", *f"{LAUNCH} {stages}".split()]) != 0
    assert "Give --position-embedding-type yarn, which Meg" in capsys.readouterr().err


def test_what_was_published_is_not_unproven(capsys: pytest.CaptureFixture[str]) -> None:
    launch = LAUNCH.replace("--train-iters 2000", "--train-samples 16000")
    seesaw = call(capsys, f"plan {launch} --skyladder-preset seesaw")
    assert "unproven" not in seesaw and "0:8 " in seesaw
    assert "unproven" in call(capsys, f"plan {launch} --skyladder-preset modded-nanogpt")


def test_a_preset_of_stages_is_not_answered_with_another(
    capsys: pytest.CaptureFixture[str],
) -> None:
    samples = "--train-samples 12288000 --lr-warmup-samples 1000 --lr-decay-samples 12288000"
    out = call(capsys, f"plan --preset 1b-8k {samples} --skyladder-preset seesaw")
    fits = next(line for line in out.splitlines() if line.startswith("Fits"))
    assert fits.startswith("Fits: add these flags: --step-batch-size-schedule '0:128 ")
    assert "--skyladder-preset" not in fits


def test_stages_with_batches_need_samples(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, f"{LAUNCH} --skyladder-preset seesaw")
    assert "the run's length has to be given in samples" in message


# --- time and money -----------------------------------------------------------------------------


def test_hours_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron's count: no word embedding (32,000 x 2,048) and no norms (45 x 2,048) in it."""
    time = plan_json(capsys, "--preset 1b-8k --tflops 100 --gpus 8 --price-per-gpu-hour 2")["time"]
    weights = 1_100_048_384 - 32_000 * 2048 - 45 * 2048
    flops = (6 * weights + 6 * 22 * 2048 * 8192) * 1e5 * 2**20  # attention: l**2 / L = L
    gpu_hours = flops / 100e12 / 3600
    assert time["constant"]["gpu_hours"] == pytest.approx(gpu_hours)
    assert time["constant"]["hours"] == pytest.approx(gpu_hours / 8)
    assert time["constant"]["cost"] == pytest.approx(gpu_hours * 2)
    saved = 1 - time["ladder"]["gpu_hours"] / time["constant"]["gpu_hours"]
    assert time["saved_percent"] == pytest.approx(100 * saved)


def test_a_device_and_its_share(capsys: pytest.CaptureFixture[str]) -> None:
    share = plan_json(capsys, "--preset 1b-8k --device a100-40g --mfu 0.5")["time"]
    rate = plan_json(capsys, "--preset 1b-8k --tflops 156")["time"]
    assert share["constant"] == rate["constant"]
    assert "hours" not in share["constant"]  # no --gpus
    assumed = plan_json(capsys, "--preset 1b-8k --device a100-40g")["time"]
    assert "assumed 40%" in assumed["basis"]


@pytest.mark.parametrize(
    ("preset", "measured", "predicted"), [("1b-8k", 13.1, 11.6), ("1b-32k", 22.2, 23.6)]
)
def test_the_papers_measurements(
    capsys: pytest.CaptureFixture[str], preset: str, measured: float, predicted: float
) -> None:
    """Within 1.5 points, and inside the stated range; the text says so."""
    time = plan_json(capsys, f"--preset {preset} --device a100-40g")["time"]
    assert time["saved_percent"] == pytest.approx(predicted, abs=0.05)
    low, high = time["saved_percent_range"]
    assert low - 0.05 <= measured <= high + 0.05
    text = " ".join(call(capsys, f"plan -v --preset {preset} --device a100-40g").split())
    assert f"The paper measured {measured} % on A100-40G; this model says {predicted}%" in text


def test_only_the_papers_own_runs_are_compared_with_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = "--preset 1b-8k --device a100-40g --skyladder-start-window 8"
    assert "The paper measured" not in call(capsys, f"plan -v {flags}")


@pytest.mark.parametrize("command", ["plan --list-devices", "compare --list-devices"])
def test_devices_are_listed_with_their_sources(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    text = call(capsys, command)
    for name in ("a100-40g", "a100-80g", "h100", "h200", "b200", "gb200", "mi300x"):
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        assert "data sheet" in line and float(line.split()[1]) == DEVICES[name].bf16
    assert "any other: --tflops RATE" in text


def test_fp8_makes_all_but_attention_faster(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: products at twice the peak, attention at the peak of bf16."""
    flags = "--preset 1b-8k --device h100 --mfu 0.5"
    plain = plan_json(capsys, flags)["time"]
    fast = plan_json(capsys, f"{flags} --fp8-format hybrid")["time"]
    weights = 1_100_048_384 - 32_000 * 2048 - 45 * 2048
    products, attention = 6 * weights, 6 * 22 * 2048 * 8192
    tokens = 1e5 * 2**20 / 3600 / 1e12
    assert plain["constant"]["gpu_hours"] == pytest.approx(
        (products + attention) * tokens / (989 * 0.5)
    )
    assert fast["constant"]["gpu_hours"] == pytest.approx(
        (products / 1979 + attention / 989) * tokens / 0.5
    )
    assert fast["saved_percent"] > plain["saved_percent"]
    assert "1979 TFLOP/s in FP8, 989 for attention" in fast["basis"]
    old = plan_json(capsys, "--preset 1b-8k --device a100-80g --fp8-format hybrid")
    assert any("a100-80g has no FP8: counted in bf16" in note for note in old["notes"])


# --- models -------------------------------------------------------------------------------------


def test_a_mixture_of_experts_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """Time goes by what a token meets, memory by all."""
    dense = plan_json(capsys, f"{LAUNCH} --tflops 1")
    moe = plan_json(capsys, f"{LAUNCH} --num-experts 8 --moe-router-topk 1 --tflops 1")
    assert moe["parameters"] > 2 * dense["parameters"]
    assert moe["active_parameters"] == dense["parameters"] + 2 * 8 * 128  # and the routers
    assert moe["time"]["constant"] == dense["time"]["constant"]
    text = " ".join(call(capsys, f"plan -v {LAUNCH} --num-experts 8").split())
    assert "of them active: 2 layers, 2 with 8 experts of 320, 2 for each token" in text


def test_a_hybrid_layout_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    gpt = plan_json(capsys, LAUNCH)
    hybrid = LAUNCH.replace("--num-layers 2", "--hybrid-layer-pattern *-|*-")
    assert plan_json(capsys, hybrid)["flops"] == gpt["flops"]
    mamba = plan_json(capsys, hybrid.replace("*-|*-", "M-*-"))
    assert mamba["flops"]["saved_percent"] < gpt["flops"]["saved_percent"]
    other = call(capsys, f"plan {hybrid.replace('*-|*-', 'G-*-')}")
    assert "has layers G that plan cannot count" in " ".join(other.split())


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--mtp-num-layers 1 --mtp-use-repeated-layer", "gives heads that plan cannot count"),
        ("--multi-latent-attention --mtp-num-layers 1", ""),
        ("--heterogeneous-layers-config-path x", "gives layers that differ"),
        ("--num-experts 4 --hybrid-layer-pattern *E --vocab-size 8", ""),
        ("--hybrid-layer-pattern *E", "the experts are not known: give --num-experts"),
    ],
)
def test_what_is_not_counted_leaves_the_windows(
    capsys: pytest.CaptureFixture[str], flags: str, reason: str
) -> None:
    plan = plan_json(capsys, f"{LAUNCH} {flags} --at 0")
    assert plan["windows"] == {"0": 32}
    assert (plan["flops"] is None) == bool(reason)
    assert reason in " ".join(call(capsys, f"plan -v {LAUNCH} {flags}").split())


def vocabulary(capsys: pytest.CaptureFixture[str], flags: str) -> int | None:
    """Return the rows of the embedding that plan counts; of two of 128 columns each."""
    launch = LAUNCH.replace("--vocab-size 512", "--make-vocab-size-divisible-by 1")
    rest = plan_json(capsys, f"{launch} --vocab-size 1")["parameters"] - 2 * 128
    parameters = plan_json(capsys, f"{launch} {flags}")["parameters"]
    return parameters and (parameters - rest) // (2 * 128)


def test_the_vocabulary_is_read_from_the_tokenizer(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    added = [{"id": 5, "content": "<s>"}, {"id": 0, "content": "a"}]
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0, "b": 1, "c": 2}}, "added_tokens": added})
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"5": {"content": "<s>"}, "6": {"content": "<x>"}}})
    )
    pieces = tmp_path / "tokenizer.model"  # 3 pieces, a trainer's settings, a number, a float
    pieces.write_bytes(
        b"\x0a\x03\x0a\x01a\x0a\x03\x0a\x01b\x0a\x00\x12\x81\x01"
        + b"x" * 129
        + b"\x18\x80\x01\x2d0000"
    )
    words = tmp_path / "vocab.json"
    words.write_text(json.dumps({"a": 0, "b": 1}))
    sentencepiece = "--tokenizer-type Llama2Tokenizer --tokenizer-model"
    assert (
        vocabulary(capsys, f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder}") == 5
    )
    assert vocabulary(capsys, f"{sentencepiece} {pieces}") == 3
    assert vocabulary(capsys, f"--tokenizer-type GPT2BPETokenizer --vocab-file {words}") == 2
    assert vocabulary(capsys, "--tokenizer-type GPT2BPETokenizer --vocab-file /no/x") == 50_257
    assert vocabulary(capsys, f"{sentencepiece} {words}") is None  # no such model
    assert vocabulary(capsys, f"{sentencepiece} /no/such.model") is None
    assert vocabulary(capsys, "--tokenizer-type TikTokenizer --tokenizer-model x") is None


def test_a_sentencepiece_model_as_the_library_counts_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"word{n} and {n * 7} more" for n in range(200)))
    prefix = tmp_path / "sp"
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(prefix), vocab_size=60, minloglevel=2
    )
    flags = f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {prefix}.model"
    assert vocabulary(capsys, flags) == 60


# --- logs ---------------------------------------------------------------------------------------


def write_log(path: Path, *, batch: int) -> None:
    """Write the log of 20 steps; Megatron's second line is the mean of the first two."""
    lines = ["using world size: 8, data-parallel size: 8"]
    for step in range(1, 21):
        lines.append(
            f" [2026-11-23] iteration {step}/ 20 | elapsed time per iteration (ms): "
            f"{630 if step == 2 else 600 + 20 * step} | global batch size: {batch} | "
            f"skyladder/window: {step * 100} | skyladder/attention_fraction: {step / 20} |"
        )
    path.write_text("\n".join(lines), encoding="utf-8")


def test_calibrated_hours(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """600 ms + 400 ms x work for 8 rows, on 8 GPUs: 2,000 full steps are 2,000 s, 4.44 GPU-h."""
    write_log(tmp_path / "run.log", batch=8)
    flags = f"{LAUNCH} --skyladder-alpha 2 --calibrate {tmp_path}/run.log"
    plan = plan_json(capsys, flags)
    time = plan["time"]
    assert time["constant"]["gpu_hours"] == pytest.approx(2000 * 8 / 3600, rel=1e-4)
    assert time["constant"]["hours"] == pytest.approx(2000 / 3600, rel=1e-4)
    work = plan["attention_fraction"]
    assert time["ladder"]["hours"] == pytest.approx(2000 * (0.6 + 0.4 * work) / 3600, rel=1e-4)
    assert time["step_seconds"]["fixed"] == pytest.approx(0.6, rel=1e-4)
    low, high = time["saved_percent_range"]
    assert low <= time["saved_percent"] <= high
    assert "run.log: 19 lines, 19 windows" in call(capsys, f"plan -v {flags}")


def test_a_log_that_does_not_say_its_gpus(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Its times are of all of its GPUs, however many: 2,000 steps of a second are 0.556 hours."""
    log = tmp_path / "run.log"
    write_log(log, batch=8)
    log.write_text(log.read_text(encoding="utf-8").partition("\n")[2], encoding="utf-8")
    flags = f"{LAUNCH} --skyladder-alpha 2 --calibrate {log}"
    plan = plan_json(capsys, flags)
    time = plan["time"]
    assert time["gpus"] is None and time["constant"].keys() == {"hours"}
    assert time["constant"]["hours"] == pytest.approx(2000 / 3600, rel=1e-4)
    assert any("does not say on how many GPUs" in note for note in plan["notes"])
    text = " ".join(call(capsys, f"plan -v {flags}").split())
    assert "of 0.556 hours; predicted from run.log" in text and "constant 0.5556 hours l" in text
    assert "GPU-hours" not in text.partition("Note ")[0]
    compared = call(capsys, f"compare {flags} --share 0.64 --budget-hours 0.5")
    assert "GPU-hours" not in compared.partition("Note ")[0]
    price = "--price-per-gpu-hour 2"
    message = refused(capsys, f"{flags} {price}")
    assert "--price-per-gpu-hour needs to know how many GPUs work, which" in message
    assert message.endswith("run.log does not say. Give --gpus.")
    # given, or said by the launch
    launch = "torchrun --nproc-per-node 4 pretrain_gpt.py"
    for given in (f"{flags} --gpus 4 {price}", f"--calibrate {log} {price} {launch} {LAUNCH}"):
        plan = plan_json(capsys, given)
        assert plan["time"]["constant"]["gpu_hours"] == pytest.approx(4 * 2000 / 3600, rel=1e-4)
        assert plan["time"]["constant"]["cost"] == pytest.approx(8 * 2000 / 3600, rel=1e-4)
        assert not any("how many GPUs" in note for note in plan["notes"])


def test_a_log_of_another_batch_is_scaled(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_log(tmp_path / "run.log", batch=4)
    plan = plan_json(capsys, f"{LAUNCH} --calibrate {tmp_path}/run.log")
    assert plan["time"]["constant"]["hours"] == pytest.approx(2 * 2000 / 3600, rel=1e-4)
    assert any("The log's batch has 4 sequences" in note for note in plan["notes"])


def logged(settings: dict[str, Any]) -> list[str]:
    """Return arguments as Megatron prints them."""
    return [f"  {name} {'.' * (48 - len(name))} {value}" for name, value in settings.items()]


OF_LAUNCH = {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "seq_length": 2048}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_length": 8192}, "seq_length 8192 (planned: 2048)"),
        ({"num_layers": 24, "hidden_size": 64}, "num_layers 24 (planned: 2), hidden_size 64 (pl"),
        ({"num_attention_heads": 8}, "num_attention_heads 8 (planned: 4)"),
        ({"num_experts": 64}, "num_experts 64 (planned: None)"),
        ({"multi_latent_attention": "True"}, "multi_latent_attention True (planned: None)"),
        ({"fp8": "hybrid"}, "fp8 hybrid (planned: None)"),
    ],
)
def test_a_log_of_another_model_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, settings: dict[str, int], message: str
) -> None:
    """Its seconds would be taken for this model's."""
    path = tmp_path / "run.log"
    write_log(path, batch=8)
    times = path.read_text()
    flags = f"{LAUNCH} --calibrate {path}"
    path.write_text("\n".join([*logged(OF_LAUNCH | settings), times]))
    found = refused(capsys, flags)
    assert f"is of another run: {message}" in found and "Give a log of this model" in found
    right = OF_LAUNCH | {"num_experts": "None", "multi_latent_attention": "False", "fp8": "None"}
    path.write_text("\n".join([*logged(right), times]))
    plan = plan_json(capsys, flags)
    assert plan["time"]["step_seconds"]["fixed"] == pytest.approx(0.6, rel=1e-4)
    assert not any("prints no arguments" in note for note in plan["notes"])
    found = refused(capsys, f"{flags} --num-experts 8 --mtp-num-layers 1 --fp8-format hybrid")
    assert "num_experts None (planned: 8), fp8 None (planned: hybrid)" in found


@pytest.mark.parametrize("rows", [512, 131072])
def test_a_log_says_how_many_rows_the_embedding_has(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, rows: int
) -> None:
    """Megatron prints them, wherever they come from; 512 tokens are no more when padded."""
    path = tmp_path / "run.log"
    write_log(path, batch=8)
    line = f"INFO: > padded vocab (size: 500) with 12 dummy tokens (new size: {rows})"
    path.write_text("\n".join([line, path.read_text()]))
    if rows == 512:
        assert plan_json(capsys, f"{LAUNCH} --calibrate {path}")["time"]
        # eight ranks pad them to 1,024, which is no other model
        eight = f"{LAUNCH} --tensor-model-parallel-size 8"
        log = [*logged(OF_LAUNCH | {"tensor_model_parallel_size": 1}), path.read_text()]
        path.write_text("\n".join(log))
        notes = plan_json(capsys, f"{eight} --calibrate {path}")["notes"]
        assert any("tensor_model_parallel_size 1 (planned: 8)" in note for note in notes)
    else:
        assert "vocabulary of 131072 rows (planned: 512)" in refused(
            capsys, f"{LAUNCH} --calibrate {path}"
        )


def test_a_log_without_arguments_is_judged_by_its_windows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Megatron Bridge prints none of Megatron's arguments; this log goes up to 2,000 tokens."""
    path = tmp_path / "run.log"
    write_log(path, batch=8)
    calibrate = f"--calibrate {path}"
    assert "is of another run: windows of up to 2000 tokens (planned: 1024)" in refused(
        capsys, f"{LAUNCH.replace('2048', '1024')} {calibrate}"
    )
    # where sequences are longer, a window leaves less of the work; here it is all
    assert "attention work of 1 at a window of 2000 (planned: 0.239)" in refused(
        capsys, f"{LAUNCH.replace('2048', '8192')} {calibrate}"
    )
    [note] = [
        note
        for note in plan_json(capsys, f"{LAUNCH} {calibrate}")["notes"]
        if "prints no arguments" in note
    ]
    assert "nothing shows that it is of this model" in note


def test_a_log_without_local_layers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Half of the planned layers see 128 tokens: the log's work is more than they leave."""
    path = tmp_path / "run.log"
    write_log(path, batch=8)
    local = "--window-size 127,0 --window-attn-skip-freq 2"
    assert "attention work of 1 at a window of 2000 (planned: 0.5" in refused(
        capsys, f"{LAUNCH} {local} --calibrate {path}"
    )


@pytest.mark.parametrize(
    ("masks", "refuses"),
    [
        ("local mask; documents not masked", True),
        ("local mask; documents masked", False),  # these leave less, nobody knows how much
        ("sliding mask; documents not masked", False),  # its windows leave other work
    ],
)
def test_less_work_than_the_windows_leave(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, masks: str, refuses: bool
) -> None:
    path = tmp_path / "run.log"
    write_log(path, batch=8)

    def a_tenth(match: re.Match[str]) -> str:
        return f"attention_fraction: {float(match[1]) / 10}"

    text = re.sub(r"attention_fraction: (\S+)", a_tenth, path.read_text())
    line = f"SkyLadder: linear 32 -> 2048, alpha 1 per step; step of 8 samples; {masks}"
    path.write_text("\n".join([line, text]))
    flags = f"{LAUNCH} --calibrate {path}"
    if refuses:
        assert "attention work of 0.1 at a window of 2000 (planned: 0.95" in refused(capsys, flags)
    else:
        assert plan_json(capsys, flags)["time"]


ZIGZAG = f"{LAUNCH} --context-parallel-size 2 --skyladder-context-parallel-layout zigzag"


def zigzag_work(window: int) -> tuple[int, int]:
    """Return the visible pairs of each of two ranks, token by token."""
    pairs = [0, 0]
    for token in range(2048):
        rank = (0, 1, 1, 0)[token // 512]
        pairs[rank] += token % window + 1
    return pairs[0], pairs[1]


def write_zigzag_log(path: Path, *, ranks: int | None = 2) -> None:
    """Write a log whose steps take 600 ms and as long as the busier rank's attention, up to 400."""
    windows = range(128, 2049, 128)
    lines = [] if ranks is None else logged(OF_LAUNCH | {"context_parallel_size": ranks})
    for step, window in enumerate(windows, 2):
        work = zigzag_work(window)
        lines.append(
            f" iteration {step}/ 20 | elapsed time per iteration (ms): "
            f"{600 + 400 * max(work) / max(zigzag_work(2048))} | global batch size: 8 | "
            f"skyladder/window: {window} | "
            f"skyladder/attention_fraction: {sum(work) / sum(zigzag_work(2048))} |"
        )
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize("ranks", [2, None])
def test_a_calibrated_step_waits_for_the_busiest_rank(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, ranks: int | None
) -> None:
    """The log says the mean work of the ranks; one that prints no arguments is the plan's."""
    assert zigzag_work(1536)[1] > 1.7 * zigzag_work(1536)[0]  # far from equal
    write_zigzag_log(tmp_path / "run.log", ranks=ranks)
    time = plan_json(capsys, f"{ZIGZAG} --calibrate {tmp_path}/run.log")["time"]
    assert time["step_seconds"]["fixed"] == pytest.approx(0.6, rel=1e-4)
    assert time["step_seconds"]["attention_at_full_window"] == pytest.approx(0.4, rel=1e-4)
    assert time["step_seconds"]["spread"] == pytest.approx(0, abs=1e-4)


def test_zigzag_stands_beside_itself_on_powers_of_two(capsys: pytest.CaptureFixture[str]) -> None:
    windows = [min(2048, 32 + 4 * step) for step in range(1000)]  # full from step 504 on
    works = [zigzag_work(window) for window in windows]
    expected = sum(map(max, works)) / sum(sum(work) / 2 for work in works) - 1
    assert expected > 0.05
    ladder = f"{ZIGZAG} --train-iters 1000 --skyladder-start-window 32 --skyladder-alpha 4"
    given = " ".join(call(capsys, f"plan -v {ladder}").split())
    rounded = " ".join(call(capsys, f"plan -v {ladder} --skyladder-round-to pow2").split())
    named = r"has ([\d.]+)% more .* {} --skyladder-round-to pow2, another schedule, ([\d.]+)%"
    one, other = (
        re.search(named.format(word), text)
        for word, text in (("with", given), ("without", rounded))
    )
    assert one and other and one.groups() == other.groups()[::-1] and one[2] == "0.0"
    assert float(one[1]) == pytest.approx(100 * expected, abs=0.2)


def test_a_log_of_other_ranks_is_taken_as_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_zigzag_log(tmp_path / "run.log", ranks=1)
    plan = plan_json(capsys, f"{ZIGZAG} --calibrate {tmp_path}/run.log")
    assert plan["time"]["step_seconds"]["spread"] > 0.01
    [note] = [note for note in plan["notes"] if "laid out otherwise" in note]
    assert "context_parallel_size 1 (planned: 2)" in note


# --- documents ----------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Documents of 256 tokens: 8 whole ones in each row of 2,048."""
    with IndexedWriter(tmp_path / "docs", "<u2") as writer:
        for _ in range(300):
            writer.add_document(np.append(np.full(255, 7), 2))
    return str(tmp_path / "docs")


def test_the_longest_document_need_not_be_in_the_sample(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visible_context, "SAMPLE_DOCUMENTS", 1)
    with IndexedWriter(tmp_path / "docs", "<u2") as writer:
        for length in (*[256] * 99, 5000):
            writer.add_document(np.full(length, 2))
    text = call(
        capsys, f"plan {LAUNCH} --skyladder-preset shortformer --data-path {tmp_path}/docs -v"
    )
    assert "99% up to 256, longest 5,000" in " ".join(text.split())


def test_work_under_both_masks(capsys: pytest.CaptureFixture[str], data: str) -> None:
    flags = f"{LAUNCH} --skyladder-preset shortformer --data-path {data} --skyladder-intra-document"
    plan = plan_json(capsys, flags)
    documents = plan["documents"]
    assert (documents["documents"], documents["tokens"]) == (300, 76_800)
    assert set(documents["length_quantiles"].values()) == {256}
    context = {name: work["visible_context"] for name, work in documents["work"].items()}
    assert context == {  # windows of 128, then of 2,048; documents of 256
        "constant_causal": 1024.5,
        "constant_documents": 128.5,
        "ladder_causal": (64.5 + 1024.5) / 2,
        "ladder_documents": (64.5 + 128.5) / 2,
    }
    assert plan["attention_fraction"] == pytest.approx(96.5 / 1024.5)
    assert plan["flops"]["constant"] == documents["work"]["constant_documents"]["flops"]
    assert plan["flops"]["ladder"] == documents["work"]["ladder_documents"]["flops"]
    quantiles = documents["visible_context_quantiles"]
    assert quantiles == {"0.1": 26, "0.5": 128, "0.9": 231, "0.99": 254}


SPLITS = {
    "train": ["0.25", "{short}", "0.75", "{data}"],
    "valid": "{nowhere}",
    "test": None,
}
# the launch's way to name its training data -> the share of rows from the short documents
WAYS = {
    "--train-data-path {data} --valid-data-path {nowhere}": 0.0,
    "--train-data-path 0.25 {short} 0.75 {data} --valid-data-path {data}": 0.25,
    "--data-args-path {folder}/blend.txt": 0.25,
    "--per-split-data-args-path {folder}/splits.json": 0.25,
    "--per-split-data-args-path {folder}/text.json": 0.25,
    "--data-path {data} --train-data-path {short} --per-split-data-args-path {folder}/no": 0.0,
    "--data-path {data}.bin": 0.0,
    "--train-data-path 0.25 {short}.idx 0.75 {data}.bin": 0.25,
}


@pytest.fixture
def named(data: str, tmp_path: Path) -> dict[str, str]:
    """Names in the ways above, and the files that some of them need."""
    with IndexedWriter(tmp_path / "short", "<u2") as writer:
        for _ in range(300):
            writer.add_document(np.append(np.full(63, 7), 2))
    names = {"data": data, "short": f"{tmp_path}/short", "folder": f"{tmp_path}"}
    names["nowhere"] = "/nowhere/docs"
    blend = "0.25 {short}\n0.75 {data}\n".format(**names)
    (tmp_path / "blend.txt").write_text(blend)
    lists = json.dumps(SPLITS)
    for key, value in names.items():
        lists = lists.replace(f"{{{key}}}", value)
    (tmp_path / "splits.json").write_text(lists)
    (tmp_path / "text.json").write_text(json.dumps({"train": blend, "valid": "v", "test": "t"}))
    return names


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_name_the_training_data(
    capsys: pytest.CaptureFixture[str], named: dict[str, str], way: str
) -> None:
    flags = f"{LAUNCH} --skyladder-intra-document {way.format(**named)}"
    plan = plan_json(capsys, flags)
    expected = WAYS[way] * 32.5 + (1 - WAYS[way]) * 128.5
    context = plan["documents"]["work"]["constant_documents"]["visible_context"]
    assert context == pytest.approx(expected, rel=0.01)
    noted = [note for note in plan["notes"] if "Megatron wants the path without the ending" in note]
    assert bool(noted) == (".bin" in way or ".idx" in way)


@pytest.mark.parametrize("flag", ["--data-args-path", "--per-split-data-args-path"])
def test_a_list_of_data_that_is_elsewhere_or_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flag: str
) -> None:
    plan = plan_json(capsys, f"{LAUNCH} {flag} /nowhere/list")
    assert any("/nowhere/list, which names the data, is not here" in n for n in plan["notes"])
    message = refused(capsys, f"{LAUNCH} {flag} /nowhere/list --skyladder-intra-document")
    assert "/nowhere/list" in message
    for text in ("[]", "nothing", '{"valid": "v"}'):
        (tmp_path / "list").write_text(text)
        if flag == "--per-split-data-args-path":
            assert "wants a JSON object with train" in refused(
                capsys, f"{LAUNCH} {flag} {tmp_path}/list"
            )


def test_only_validation_data(capsys: pytest.CaptureFixture[str], named: dict[str, str]) -> None:
    plan = plan_json(capsys, f"{LAUNCH} --valid-data-path {named['data']}")
    assert "documents" not in plan


def test_documents_that_are_not_masked_do_not_count(
    capsys: pytest.CaptureFixture[str], data: str
) -> None:
    plan = plan_json(capsys, f"{LAUNCH} --data-path {data}")
    assert plan["flops"] == plan_json(capsys, LAUNCH)["flops"]
    assert plan["documents"]["work"]["constant_documents"]["visible_context"] == 128.5


def test_a_calibrated_time_counts_documents_as_the_log_does(
    capsys: pytest.CaptureFixture[str], data: str, tmp_path: Path
) -> None:
    write_log(tmp_path / "run.log", batch=8)
    flags = f"{LAUNCH} --calibrate {tmp_path}/run.log --data-path {data}"
    plan = plan_json(capsys, f"{flags} --skyladder-intra-document")
    constant = 2000 * (0.6 + 0.4 * 128.5 / 1024.5) / 3600
    assert plan["time"]["constant"]["hours"] == pytest.approx(constant, rel=1e-4)


def test_data_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    """On a laptop the data of a cluster's launch line are missing; that stops nothing."""
    plan = plan_json(capsys, f"{LAUNCH} --data-path /nowhere/docs")
    assert any("/nowhere/docs is not here" in note for note in plan["notes"])
    assert "/nowhere/docs.idx does not exist" in refused(
        capsys, f"{LAUNCH} --data-path /nowhere/docs --skyladder-intra-document"
    )


def test_uncounted_documents_are_mentioned(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(capsys, f"{LAUNCH} --skyladder-intra-document")
    assert any("give --data-path to measure" in note for note in plan["notes"])


def test_data_without_ends_are_mentioned(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with IndexedWriter(tmp_path / "docs", "<u2") as writer:
        for index in range(20):
            writer.add_document(np.full(100, index))
    plan = plan_json(capsys, f"{LAUNCH} --data-path {tmp_path}/docs --skyladder-intra-document")
    assert any("do not all end with the same token" in note for note in plan["notes"])


NULL = "--tokenizer-type NullTokenizer"  # LAUNCH has --vocab-size 512; the documents end in 2
MASKED = "--skyladder-intra-document"
NOT_DONE = "Counted with documents masked, which training would not do: it"


def of_tokenizer(plan: dict[str, Any]) -> list[str]:
    return [note for note in plan["notes"] if NOT_DONE in note]


def test_a_tokenizer_whose_token_does_not_end_the_documents(
    capsys: pytest.CaptureFixture[str], data: str
) -> None:
    """What training warns of, said beforehand."""
    launch = f"{LAUNCH} --data-path {data} {MASKED} {NULL}"
    [note] = of_tokenizer(plan_json(capsys, launch))
    assert note == (
        f"{NOT_DONE} warns, as the documents of the training data do not end in the tokenizer's "
        "end-of-document token (NullTokenizer: 511), so their ends cannot be found and they are "
        f"not masked: {data}: 0 of 300 sampled documents end in it; 300 end in 2. Give the "
        "tokenizer that the data were made with, or prepare the data again. To look: skyladder "
        f"inspect {data} --eod-id 511"
    )
    [note] = of_tokenizer(plan_json(capsys, f"{launch} --skyladder-require-documents"))
    assert f"{NOT_DONE} stops, as the documents" in note
    assert not of_tokenizer(plan_json(capsys, f"{launch} --null-tokenizer-eod-id 2"))
    assert of_tokenizer(plan_json(capsys, f"{launch} --null-tokenizer-eod-id 3"))
    assert not of_tokenizer(plan_json(capsys, launch.replace(NULL, "")))
    assert not of_tokenizer(plan_json(capsys, launch.replace(MASKED, "")))
    assert not of_tokenizer(plan_json(capsys, f"{launch} --null-tokenizer-eod-id two"))


def test_the_null_tokenizer_of_older_releases(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Their end-of-document token is the vocabulary's size; which release trains is not known."""
    with IndexedWriter(tmp_path / "docs", "<u2") as writer:
        writer.add_document([7, 8, 512])
    launch = f"{LAUNCH} --data-path {tmp_path}/docs {MASKED} {NULL}"
    assert not of_tokenizer(plan_json(capsys, launch))


def test_a_tokenizer_of_files(
    capsys: pytest.CaptureFixture[str], data: str, tmp_path: Path
) -> None:
    """Read where they are here; a plan does without them."""
    model = tiny.make_hf_folder(tmp_path / "hf")
    launch = f"{LAUNCH} --train-data-path 1 {data} {MASKED} --tokenizer-type HuggingFaceTokenizer"
    for there in (model, model / "tokenizer.json"):
        [note] = of_tokenizer(plan_json(capsys, f"{launch} --tokenizer-model {there}"))
        assert "(HuggingFaceTokenizer: 1), so" in note and f"not masked: {data}: 0 of" in note
    for text in ("{", "{}"):
        (model / "tokenizer.json").write_text(text)
        assert not of_tokenizer(plan_json(capsys, f"{launch} --tokenizer-model {model}"))
    for elsewhere in ("/nowhere/hf", "somebody/model", f"{tmp_path}"):
        assert not of_tokenizer(plan_json(capsys, f"{launch} --tokenizer-model {elsewhere}"))
    sentences = launch.replace("HuggingFaceTokenizer", "Llama2Tokenizer")
    for model in (tiny.make_sentencepiece(tmp_path / "good", eos_id=2), tmp_path / "none"):
        assert not of_tokenizer(plan_json(capsys, f"{sentences} --tokenizer-model {model}"))
    model = tiny.make_sentencepiece(tmp_path / "other", eos_id=0, unk_id=2, bos_id=1)
    [note] = of_tokenizer(plan_json(capsys, f"{sentences} --tokenizer-model {model}"))
    assert "(Llama2Tokenizer: 0)" in note


# --- text and pictures --------------------------------------------------------------------------


def test_text_fits_a_terminal(capsys: pytest.CaptureFixture[str], data: str) -> None:
    for flags in (
        "--preset 1b-32k --device a100-40g --gpus 8 --price-per-gpu-hour 1.5",
        f"{LAUNCH} --data-path {data} --skyladder-intra-document --lr 1 --bf16 --tflops 5",
    ):
        text = call(capsys, f"plan -v {flags}").split("\n\n", 2)[2]  # behind the verdict
        assert max(len(line) for line in text.splitlines()) <= 100
        assert "Full window  from step" in text


def test_advice_where_the_growth_is_far_from_the_papers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = " ".join(call(capsys, f"plan -v {LAUNCH} --skyladder-expand-fraction 0.2").split())
    assert "grows over 20% of the run" in text
    assert "--skyladder-expand-fraction=0.64, or alpha 1.575" in text  # 2016 / (0.64 * 2000)


@pytest.mark.parametrize(
    ("flags", "of", "alpha"),
    [
        ("", "run", "1.575"),
        ("--skyladder-begin-samples 8000", "1,000 steps from step 1,000 on", "3.15"),
        ("--skyladder-schedule cyclic", "run", "6.3"),  # it grows twice and shrinks twice
        ("--skyladder-schedule cyclic-jump --skyladder-cycles 3", "run", "4.725"),
        ("--skyladder-schedule reversed --skyladder-start-window 48", "run", "1.562"),
    ],
)
def test_advice_that_was_followed_asks_for_nothing(
    capsys: pytest.CaptureFixture[str], flags: str, of: str, alpha: str
) -> None:
    def advice(rate: str) -> str:
        text = " ".join(call(capsys, f"plan -v {LAUNCH} {flags} --skyladder-{rate}").split())
        return text.partition("Advice ")[2].partition(" Note")[0]

    grows = "the window grows over {} of the " + of + "; the paper found 60 to 64 % best"
    for rate in ("expand-fraction 0.64", f"alpha {alpha}"):
        assert advice(rate) == grows.format("64%")
    wanted = f": --skyladder-expand-fraction=0.64, or alpha {alpha}"
    for rate in ("expand-fraction 0.2", f"alpha {3.2 * float(alpha)}"):
        assert advice(rate) == grows.format("20%") + wanted


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str, suffix: str
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plan{suffix}"
    call(capsys, f"plan {LAUNCH} --data-path {data} --plot {path}")
    start = path.read_bytes()[:8]
    assert start == b"\x89PNG\r\n\x1a\n" if suffix == ".png" else start.startswith(b"<?xml")
    assert [file.name for file in tmp_path.glob("plan*")] == [path.name]  # nothing half-written


def test_a_picture_needs_matplotlib(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = refused(capsys, f"{LAUNCH} --plot plan.png")
    assert "--plot needs matplotlib" in message
    assert "pip install 'megatron-skyladder[plot]'" in message


def test_the_lines_of_a_picture_end_where_the_table_does() -> None:
    from megatron_skyladder.planning import estimate, run_flags

    args = _parsed(f"{LAUNCH} --train-iters 40 --tflops 100")
    plan = estimate.make_plan(args, name="run")
    assert plan.time
    steps = plots._steps(plan)
    cost = plots._cumulated(plan, steps)
    assert cost[-1] == pytest.approx(plan.time.gpu_hours(40, plan.mean_fraction))
    assert run_flags.total_steps(run_flags.complete(args)) == plan.total_steps


def test_a_picture_has_the_unit_of_the_table(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    monkeypatch.setattr(images, "save", lambda figure, path: drawn.append(figure))
    log = tmp_path / "run.log"
    write_log(log, batch=8)
    log.write_text(log.read_text(encoding="utf-8").partition("\n")[2], encoding="utf-8")
    for flags, unit in (("--gpus 8", "GPU-hours"), ("", "hours")):
        call(capsys, f"plan {LAUNCH} --calibrate {log} --plot p.png {flags}")
        axes = drawn[-1].axes[-1]
        assert axes.get_ylabel() == unit
        assert f" {unit}, -" in axes.get_lines()[0].get_label()


def _parsed(flags: str) -> Any:
    import argparse

    from megatron_skyladder.planning import run_flags

    parser = argparse.ArgumentParser()
    run_flags.add_run_flags(parser)
    return parser.parse_args(flags.split())


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "not given: --seq-length, --global-batch-size, --train-iters. A plan needs"),
        ("--seq-length 128 --hidden-size 128", "not given: --global-batch-size, --train-iters."),
        (f"{LAUNCH} --train-samples 100", "--train-samples and --train-iters are both given"),
        (f"{LAUNCH} --num-layers 0", "--num-layers=0: give at least 1"),
        (
            LAUNCH.replace("--train-iters 2000", "--train-samples 7"),
            "--train-samples=7 is less than one batch of 8",
        ),
        (
            f"{LAUNCH} --num-attention-heads 3",
            "--hidden-size=128 is no multiple of --num-attention-heads=3",
        ),
        (
            f"{LAUNCH} --group-query-attention --num-query-groups 3",
            "--num-attention-heads=4 is no multiple of --num-query-groups=3",
        ),
        (f"{LAUNCH} --gpus 3 --tensor-model-parallel-size 2", "--gpus=3 is no multiple of TP x PP"),
        (f"{LAUNCH} --gpus 0", "--gpus=0 is no multiple of TP x PP x CP = 1"),
        (
            f"{LAUNCH} --gpus 16",
            "--global-batch-size=8 is no multiple of micro-batch size x data-parallel size = 16",
        ),
        (
            f"{LAUNCH} --num-experts 8 --moe-layer-freq [1]*3",
            "--moe-layer-freq=[1]*3 does not say for each of 2 layers",
        ),
        (
            f"{LAUNCH} --step-batch-size-schedule 0:8",
            "--global-batch-size=8 stands beside --step-batch-size-schedule, which Megatron",
        ),
        (f"{LAUNCH} --mfu 0.5", "--mfu is a share of a device's peak rate. Give --device"),
        (f"{LAUNCH} --device h100 --mfu 40", "--mfu=40 is not a share. Give a number such as 0.4"),
        (f"{LAUNCH} --device rtx", "--device rtx is unknown. Known are a100-40g"),
        (f"{LAUNCH} --tflops 0", "--tflops=0: give a rate above 0"),
        (f"{LAUNCH} --tflops 100 --device h100", "give a rate above 0, and no --device beside it"),
        (f"{LAUNCH} --tflops 1 --calibrate x", "--calibrate and --device or --tflops both set"),
        (f"{LAUNCH} --calibrate /nowhere.log", "/nowhere.log"),
        (f"{LAUNCH} --tflops 1 --price-per-gpu-hour 0", "--price-per-gpu-hour=0: give a price"),
        (f"{LAUNCH} --price-per-gpu-hour 1", "--price-per-gpu-hour needs a time to multiply"),
        (f"{LAUNCH} --plot plan.pdf", "--plot plan.pdf: give a file that ends in .png or .svg"),
        (
            f"{LAUNCH} --plot nowhere/plan.png",
            "--plot nowhere/plan.png: there is no folder nowhere",
        ),
        (f"{LAUNCH} --at 0,x", "'0,x' is not a list of steps such as 0,8,64000"),
        (f"{LAUNCH} --at=-1", "'-1' is not a list of steps such as 0,8,64000"),
        # the same as in training
        (f"{LAUNCH} --skyladder-start-window 4096", "is above the final window of 2048"),
        (f"{LAUNCH} --skyladder-final-window 4096", "is above --seq-length=2048"),
        (f"{LAUNCH} --skyladder-alpha 0", "never reaches the final window of 2048 tokens"),
        (f"{LAUNCH} --skyladder-alpha 1/8", "takes 16,128 steps, but the run has 2,000"),
        (f"{LAUNCH} --skyladder-alpha 1 --skyladder-expand-fraction 0.5", "both set the rate"),
        (f"{LAUNCH} --skyladder-preset 7b", "--skyladder-preset=7b is unknown"),
        (
            f"{LAUNCH} --skyladder-alhpa 1",
            "--skyladder-alhpa is no flag of SkyLadder. Did you mean --skyladder-alpha?",
        ),
    ],
)
def test_refused(capsys: pytest.CaptureFixture[str], flags: str, message: str) -> None:
    assert message in refused(capsys, flags)


def test_a_log_of_another_number_of_gpus_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_log(tmp_path / "run.log", batch=8)
    message = refused(capsys, f"{LAUNCH} --calibrate {tmp_path}/run.log --gpus 4")
    assert "--gpus=4, but" in message and "is of a run on 8" in message


def test_a_window_that_ends_early_is_named(capsys) -> None:
    """A preset's final window stays where sequences are made longer: that saves most."""
    longer = "--preset 1b-8k --seq-length 32768"
    (note,) = [note for note in plan_json(capsys, longer)["notes"] if "never sees" in note]
    assert note.startswith("The window ends at 8,192 of 32,768 tokens")
    full = plan_json(
        capsys, f"{longer} --skyladder-final-window 32768 --skyladder-expand-fraction 0.64"
    )
    assert not any("never sees" in note for note in full["notes"])
