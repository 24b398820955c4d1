"""What a run of Bridge says: windows and FLOPs, losses by length, warnings that are seen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from bridge_runs import LADDER, BridgeRun, BridgeRuns

from megatron_skyladder.testing import read_checkpoint

METRICS = ("window", "attention_fraction", "visible_context", "fragments_per_row")
LENGTHS = {**LADDER, "eval_lengths": "32,64"}
_VALUE = re.compile(r"(\S+(?: loss)?) value: (\S+)")


def scalars(run: BridgeRun) -> dict[str, dict[int, float]]:
    """Return what TensorBoard got, by name and iteration."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    return {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }


def console(run: BridgeRun) -> dict[int, dict[str, float]]:
    """Return what SkyLadder's lines on the console say, by iteration."""
    lines = {}
    for found in re.finditer(r"SkyLadder: iteration (\d+)/8 \| (.*)", run.log()):
        fields = (field.split(": ") for field in found[2].split(" | "))
        lines[int(found[1])] = {name: float(value) for name, value in fields}
    return lines


def metrics_of_the_entry_point(run: BridgeRun) -> dict[int, dict[str, float]]:
    """Return what Megatron's log lines say of ours, by iteration."""
    lines = {}
    for found in re.finditer(r"iteration\s+(\d+)/\s*8 \|(.*)", run.log()):
        fields = re.findall(r"(skyladder/\S+): (\S+)", found[2])
        lines[int(found[1])] = {name: float(value) for name, value in fields}
    return lines


@pytest.mark.parametrize("layout", [{}, {"pp": 2}], ids=["1 process", "PP2"])
def test_metrics_are_those_of_the_entry_point(layout: dict[str, Any], runs: BridgeRuns) -> None:
    run = runs.bridge(layout.get("pp", 1), ladder=LADDER, tensorboard=True, **layout)
    expected = metrics_of_the_entry_point(runs.reference(LADDER))
    written, printed = scalars(run), console(run)
    assert list(expected) == list(printed) == list(range(1, 9))
    for iteration, values in expected.items():
        for name in (f"skyladder/{metric}" for metric in METRICS):
            assert printed[iteration][name] == pytest.approx(values[name], rel=1e-5)
            assert written[name][iteration] == pytest.approx(values[name], rel=1e-5)
    assert all(values["skyladder/tflops_per_gpu"] > 0 for values in printed.values())
    assert printed[8]["skyladder/hours_left"] < printed[1]["skyladder/hours_left"]


def test_weights_and_biases_get_the_same(runs: BridgeRuns) -> None:
    run = runs.start(
        "train_with_wandb",
        body_module="bridge_trials",
        ladder=LADDER,
        weights=str(runs.weights),
        environment={"WANDB_MODE": "offline"},
    )
    logged = run.facts()
    last = console(run)[logged["_step"]]  # W&B closes a step when the next one comes
    for metric in METRICS:
        name = f"skyladder/{metric}"
        assert logged[name] == pytest.approx(last[name], rel=1e-5)


def test_mlflow_gets_every_step(runs: BridgeRuns) -> None:
    """Under names without slashes, which are what Bridge writes there."""
    run = runs.start(
        "train_with_mlflow",
        body_module="bridge_trials",
        ladder=LADDER,
        weights=str(runs.weights),
        environment={"MLFLOW_ALLOW_FILE_STORE": "true"},
    )
    printed, kept = console(run), run.facts()
    assert len(printed) == 8
    for metric in METRICS:
        values = {int(step): value for step, value in kept[f"skyladder_{metric}"].items()}
        expected = {step: line[f"skyladder/{metric}"] for step, line in printed.items()}
        assert values == pytest.approx(expected, rel=1e-5)


def test_bridge_counts_the_attention_that_is_left(runs: BridgeRuns) -> None:
    """Sum of l^2 over fragments: with a window of w alone, every sequence has L / w of them."""
    run = runs.bridge(2, pp=2, ladder={"schedule": "constant", "final_window": 8})
    assert {step["squares"] for step in run.steps()} == {8 * 128 * 8}


@pytest.mark.parametrize("interval", [1, 4])
def test_the_report_reads_the_log(interval: int, runs: BridgeRuns) -> None:
    from megatron_skyladder.report.runlog import read_run

    run = runs.bridge(ladder=LENGTHS, eval_iterations=3, log_interval=interval)
    steps = [step for step in run.steps() if step["iteration"] % interval == 0]
    found = read_run(run.folder / "log.0.txt")
    assert [each.iteration for each in found.iterations] == [step["iteration"] for step in steps]
    assert [each.window for each in found.iterations] == [step["window"] for step in steps]
    assert all(each.num_iterations == interval for each in found.iterations)
    if interval == 1:
        losses = [step["loss"] for step in steps]
        assert [each.loss for each in found.iterations] == pytest.approx(losses, rel=1e-6)
    assert found.schedule is not None and found.schedule.startswith("linear 8 -> 128")
    assert set(found.validations[-1].by_length) == {32, 64, 128}


def losses_by_length(run: BridgeRun, rank: int) -> dict[str, float]:
    """Return what the last line about the test set says."""
    lines = [line for line in run.log(rank).splitlines() if "on test set" in line and "|" in line]
    values = {name: float(value) for name, value in _VALUE.findall(lines[-1])}
    return {name.strip("| "): value for name, value in values.items()}


@pytest.mark.parametrize(
    "layout",
    [{}, {"pp": 2, "vpp": 2}, {"cp": 2}, {"tp": 2, "sp": True}],
    ids=["1 process", "PP2 x VPP2", "CP2", "TP2 + SP"],
)
def test_losses_by_length_are_those_of_the_entry_point(
    layout: dict[str, Any], runs: BridgeRuns
) -> None:
    size = layout.get("pp", 1) * layout.get("cp", 1) * layout.get("tp", 1)
    run = runs.bridge(size, ladder=LENGTHS, eval_iterations=3, **layout)
    reference = runs.reference(LENGTHS, eval_iterations=3)
    expected = losses_by_length(reference, 0)
    names = ["at_32", "at_64", "at_128", "positions_0_31", "positions_32_63", "positions_64_127"]
    assert set(expected) == {"lm loss", *(f"skyladder/loss_{name}" for name in names)}
    assert losses_by_length(run, size - 1) == pytest.approx(expected, rel=1e-6)


def test_evaluation_alone(runs: BridgeRuns) -> None:
    """Without training there is no step, no probe and no log line, but the losses by length."""
    run = runs.bridge(ladder=LENGTHS, eval_iterations=3, change="evaluation_alone")
    assert set(run.evaluations()[-1]) > {"lm loss", "skyladder/loss_at_32"}
    assert console(run) == {}


def test_training_after_an_evaluation_is_what_it_was(runs: BridgeRuns) -> None:
    run = runs.bridge(ladder=LENGTHS, eval_iterations=3)
    plain = runs.reference(LADDER)
    assert [step["loss"] for step in run.steps()] == [step["loss"] for step in plain.steps()]


def test_warnings_are_seen_though_bridge_drops_them(runs: BridgeRuns) -> None:
    """Of the data's files and of the first batch: no document ends in the tokenizer's token."""
    import bridge_bodies

    other = bridge_bodies.make_data(runs.folder / "unended" / "documents", eod=60)
    run = runs.start("train_bridge", data=str(other), ladder=LADDER, weights=str(runs.weights))
    log = run.log()
    assert "SkyLadder: WARNING: the documents of the training data do not end in" in log
    assert re.search("WARNING: none of the first 8 sequences has the end-of-document token", log)
    assert "skyladder.require_documents=true refuses such a run" in log
    assert f"skyladder inspect {other} --eod-id 127" in log


def test_missing_documents_are_refused_on_request(runs: BridgeRuns) -> None:
    import bridge_bodies

    other = bridge_bodies.make_data(runs.folder / "unended2" / "documents", eod=60)
    run = runs.start(
        "train_bridge",
        data=str(other),
        ladder={**LADDER, "require_documents": True},
        weights=str(runs.weights),
        exit_codes=(1,),
    )
    assert "UsageError: skyladder.require_documents=true: the documents" in run.log()


def test_attention_statistics_are_logged(runs: BridgeRuns) -> None:
    settings = {**LADDER, "attention_stats_interval": 4}
    run = runs.bridge(2, pp=2, ladder=settings, tensorboard=True)
    written, printed = scalars(run), console(run)
    assert [n for n in printed if "skyladder/attention_entropy" in printed[n]] == [4, 8]
    layers = [name for name in written if "attention_entropy" in name and "layer" in name]
    assert len(layers) == 4  # of both pipeline stages


def test_experts_train_with_the_mask_probed(runs: BridgeRuns) -> None:
    run = runs.bridge(ladder=LADDER, change="experts", iterations=3)
    assert "mask probe passed" in run.log()
    assert [step["window"] for step in run.steps()] == [8, 70, 128]


def test_weights_are_drawn_as_the_papers_code_does(runs: BridgeRuns) -> None:
    run = runs.bridge(
        ladder={**LADDER, "init": "reference"},
        change="default_weights",
        iterations=1,
        save_interval=1,
        weights=None,
    )
    weights = read_checkpoint(run.checkpoint / "iter_0000001")
    std = {name: float(tensor.std()) for name, tensor in weights.items() if tensor.dim() > 1}
    embedding, projection = "embedding.word_embeddings.weight", "linear_proj.weight"
    assert std[embedding] == pytest.approx((2 / (5 * 64)) ** 0.5, rel=0.05)
    found = [value for name, value in std.items() if name.endswith(f"self_attention.{projection}")]
    assert found and found == pytest.approx([1 / 64**0.5 / 4] * len(found), rel=0.05)


def test_run_config_names_what_is_bridges_own(runs: BridgeRuns) -> None:
    """So that export, inference and every tool of Bridge read it."""
    import yaml

    run = runs.bridge(ladder=LADDER, save_interval=8, change="partial_spec")
    text = Path(run.checkpoint, "iter_0000008", "run_config.yaml").read_text()
    config = yaml.safe_load(text)
    spec = config["model"]["transformer_layer_spec"]
    assert spec["_target_"] == "megatron.bridge.models.gpt_provider.local_layer_spec"
    assert "megatron_skyladder" not in text
    assert config["env_vars"]["SKYLADDER_FINGERPRINT"].startswith("linear")
