"""Megatron-LM checkouts: the patch and ``--spec``, with the real scripts, on the CPU engine.

SKYLADDER_MEGATRON_CHECKOUTS names a folder with one sub-folder for each tag (core_v0.16.1, ...,
main). They are copied before anything is done to them. About four minutes for each; needs what
Megatron needs to build its dataset helpers (make, a C++ compiler, pybind11).
"""

import math
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import compared
import pytest
import stock_script
import torch
from launches import (
    DOCUMENTS_MASKED,
    LADDER,
    REPOSITORY,
    copy_checkout,
    every_figure,
    figures,
    launch,
    require,
)

from megatron_skyladder.cli import main as skyladder
from megatron_skyladder.megatron_lm import releases
from megatron_skyladder.testing import read_checkpoint, requires_megatron

VARIABLE = "SKYLADDER_MEGATRON_CHECKOUTS"
LAYOUTS = {
    "one": [],
    "tp2": ["--tensor-model-parallel-size", "2"],
    "pp2": ["--pipeline-model-parallel-size", "2"],
    "tp2-pp2": ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"],
    "pp4": ["--pipeline-model-parallel-size", "4"],
    "cp2": ["--context-parallel-size", "2", "--eod-mask-loss"],
}
OWN_TESTS = (  # of the files that the patch touches; older releases have fewer
    *("test_argument_utils.py", "test_training.py", "test_model_parallel_config.py", "training"),
    *("test_eval_batch_size.py", "test_start_eval_at_iter.py", "data/test_get_batch.py"),
    "test_num_floating_point_operations.py",
)
# weights too: scripts make the model's configuration before they switch SkyLadder on
DRAWN = ["--skyladder-init", "reference", "--init-method-std", "0.02"]
SPEC = ["--spec", "megatron_skyladder.layer_specs", "skyladder"]
TAGS = [release.checkout.split()[0] for release in releases.RELEASES.values()]
ONLY_PATCHED = [  # neither our entry point nor --spec works there
    release.checkout
    for release in releases.RELEASES.values()
    if release.trainer is releases.Trainer.ITS_OWN_SCRIPT
]
FORKS = {"swiss-ai": "81d44dbe", "llm-jp": "ea80de79"}  # their commits of July and October 2025

pytestmark = requires_megatron


def num_processes(layout):
    return math.prod(int(word) for word in LAYOUTS[layout] if word.isdigit())


@pytest.fixture(scope="module", params=[*TAGS, *FORKS])
def checkouts(request, tmp_path_factory):
    """A stock and a patched copy of one checkout."""
    source = require(VARIABLE, request.param, "a folder with Megatron-LM checkouts by tag")
    parent = tmp_path_factory.mktemp(request.param, numbered=False)
    for name in ("stock", "patched"):
        copy_checkout(source, parent / name)
    assert skyladder(["patch", "apply", str(parent / "patched")]) == 0
    return parent


@pytest.fixture(scope="module")
def entry_point(checkouts, data):
    """Logs of our entry point on the stock checkout, by flags and layout."""

    @cache
    def run(flags, layout):
        log, _ = launch(
            data,
            *(*flags, *LAYOUTS[layout]),
            megatron=checkouts / "stock",
            num_processes=num_processes(layout),
            stop_time=True,
        )
        return log

    return run


def is_only_patched(checkouts):
    return checkouts.name in {*ONLY_PATCHED, *FORKS}


def of_its_own(checkouts, data):
    """Return flags that a fork cannot do without."""
    if checkouts.name != "swiss-ai":
        return []
    return ["--trigger-path", tempfile.mkdtemp(dir=data.folder)]  # gets a file when a run ends


def run_script(data, checkout, layout, *flags, **options):
    return launch(
        data,
        *(*flags, *LAYOUTS[layout], *of_its_own(checkout.parent, data)),
        megatron=checkout,
        script=checkout / "pretrain_gpt.py",
        num_processes=num_processes(layout),
        **options,
    )


def test_revert_gives_the_checkout_back(checkouts, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkouts / "patched", copy, symlinks=True)
    assert skyladder(["patch", "revert", str(copy)]) == 0
    for path in (checkouts / "stock").rglob("*.py"):
        restored = copy / path.relative_to(checkouts / "stock")
        assert restored.read_bytes() == path.read_bytes()
        assert restored.stat().st_mode == path.stat().st_mode
    compared.note(checkouts.name, "patch", "applied and reverted, every file")


def test_the_tables_of_the_script_are_right(checkouts):
    if is_only_patched(checkouts):
        pytest.skip("our entry point has nothing to do with its script")
    folder = checkouts / "stock"
    line = releases.megatron_in(folder).line
    scripts = [folder / name for name in stock_script.SCRIPTS[line]]
    read = set().union(*(stock_script.names_read(path, "args") for path in scripts))
    assert read == stock_script.READ[line]
    assert stock_script.signatures(scripts[0]).items() >= stock_script.SIGNATURES.items()
    passed = stock_script.keywords(scripts[0], "pretrain")
    passed |= stock_script.keywords(scripts[0], "parse_and_validate_args")
    assert passed == stock_script.PRETRAIN_KEYWORDS
    if len(scripts) > 1:
        assert stock_script.keywords(scripts[1], "GPTModel") == stock_script.GPT_MODEL_KEYWORDS
        provider = stock_script.signatures(scripts[2])["model_provider"]
        assert provider == stock_script.MODEL_PROVIDER


def own_outcomes(checkout, report):
    """Run Megatron's own tests in a checkout; return how each ended, by its name."""
    tests = checkout / "tests" / "unit_tests"
    words = [str(tests / name) for name in OWN_TESTS if (tests / name).exists()]
    words += ["--override-ini", "addopts=", "--junit-xml", str(report)]
    runner = str(Path(__file__).with_name("own_tests.py"))
    done = subprocess.run(
        [sys.executable, "-m", "megatron_skyladder.cpu", runner, *words],
        cwd=checkout,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(checkout), str(REPOSITORY)]),
            "MASTER_PORT": "0",  # any that is free
            **{"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},  # up to 0.15 they are asked for
            "HTTPS_PROXY": "http://localhost:9",  # they run without the data they would download
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    if not report.exists() and is_only_patched(checkout.parent):
        pytest.skip(f"they do not start: {done.stdout.splitlines()[-1]}")
    return {
        f"{case.get('classname')}::{case.get('name')}": [child.tag for child in case]
        for case in ElementTree.parse(report).iter("testcase")
    }


def test_megatrons_own_tests_end_as_in_the_stock_checkout(checkouts, tmp_path):
    stock = own_outcomes(checkouts / "stock", tmp_path / "stock.xml")
    patched = own_outcomes(checkouts / "patched", tmp_path / "patched.xml")
    assert patched == stock
    num_passed = sum(not problems for problems in stock.values())
    few = is_only_patched(checkouts)  # older releases have fewer tests of these files
    assert num_passed > (0 if few else 10)  # the others need more ranks, a GPU, or packages


def test_without_our_flags_no_bit_changes(checkouts, data, tmp_path):
    """Neither in the patched script nor in our entry point."""
    results = []
    for name, script in (
        ("stock", checkouts / "stock" / "pretrain_gpt.py"),
        ("patched", checkouts / "patched" / "pretrain_gpt.py"),
        *([] if is_only_patched(checkouts) else [("stock", None)]),
    ):
        saved = tmp_path / str(len(results))
        save = ["--save", str(saved), "--save-interval", "100", "--ckpt-format", "torch_dist"]
        masks = ["--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss"]
        log, _ = launch(
            data,
            *(*save, *masks, *LAYOUTS["pp2"], *of_its_own(checkouts, data)),
            megatron=checkouts / name,
            script=script,
            num_processes=2,
        )
        results.append((figures(log), read_checkpoint(saved / "iter_0000006")))
    (stock_figures, stock), *others = results
    assert any("optimizer" in name for name in stock)
    for other_figures, other in others:
        assert other_figures == stock_figures
        assert other.keys() == stock.keys()
        assert all(torch.equal(other[name], stock[name]) for name in stock)
    integration = "patch" if is_only_patched(checkouts) else "patch, entry point"
    compared.note(checkouts.name, integration, "no flag, PP2, against stock")


@pytest.mark.parametrize(
    ("layout", "flags"),
    [
        ("tp2-pp2", LADDER),
        ("tp2-pp2", DOCUMENTS_MASKED),
        ("pp4", DOCUMENTS_MASKED),
        ("cp2", DOCUMENTS_MASKED),
    ],
    ids=["tp2-pp2-window", "tp2-pp2-documents", "pp4-documents", "cp2-documents"],
)
def test_the_patched_script_logs_what_our_entry_point_logs(
    checkouts, data, entry_point, layout, flags
):
    if layout == "pp4" and checkouts.name != "main":
        pytest.skip("two middle stages behave as one; tried on main only")
    if is_only_patched(checkouts):
        pytest.skip("our entry point does not start it; see the next test")
    flags = [*flags, *DRAWN, "--log-throughput"]
    log, text = run_script(data, checkouts / "patched", layout, *flags, stop_time=True)
    assert "mask probe passed" in text and "documents" in text
    found, wanted = every_figure(log), every_figure(entry_point(tuple(flags), layout))
    for each, other in zip(found, wanted, strict=True):
        assert each == other
    assert log.iterations[-1].tflops_per_gpu > 0
    kind = "documents" if flags[: len(DOCUMENTS_MASKED)] == DOCUMENTS_MASKED else "window"
    what = f"{kind}, {layout}, against the entry point"
    compared.note(checkouts.name, "patch", what)


@pytest.fixture(scope="module")
def on_the_installed_one(data):
    """Figures of our entry point on the Megatron that is installed, by layout."""

    @cache
    def run(layout):
        log, _ = launch(
            data, *DOCUMENTS_MASKED, *LAYOUTS[layout], num_processes=num_processes(layout)
        )
        return figures(log)

    return run


@pytest.mark.parametrize("layout", ["one", "tp2-pp2", "pp4", "cp2"])
def test_what_only_the_patch_starts_trains_as_the_installed_one(
    checkouts, data, on_the_installed_one, layout
):
    if not is_only_patched(checkouts):
        pytest.skip("our entry point starts it too; see the test before")
    flags = [*DOCUMENTS_MASKED, "--skyladder-eval-lengths", "16"]
    log, text = run_script(data, checkouts / "patched", layout, *flags)
    assert "mask probe passed" in text and "documents masked" in text
    validates = checkouts.name != "swiss-ai"
    assert ("no losses by length will come" in text) != validates
    assert all("skyladder/loss_at_16" in each.values for each in log.validations)
    found, wanted = figures(log), on_the_installed_one(layout)
    if not validates:
        wanted = wanted[: len(found)]
    assert len(found) == len(wanted) >= 6
    for each, other in zip(found, wanted, strict=True):
        assert each == pytest.approx(other, rel=1e-3 if len(each) > 1 else 1e-6)
        assert each[0] == pytest.approx(other[0], rel=1e-6)  # the norm is logged in 4 digits
    what = f"documents, {layout}, against the entry point on the installed release"
    compared.note(checkouts.name, "patch", what, compared.largest(found, wanted))


def test_a_fork_that_takes_exp_of_all_that_it_calls_a_loss(checkouts, data, tmp_path):
    if checkouts.name != "llm-jp":
        pytest.skip("llm-jp does, for Weights & Biases")
    pytest.importorskip("wandb")
    flags = ["--seq-length", "1024", "--max-position-embeddings", "1024"]  # e^1024 is no float
    flags += ["--skyladder-schedule", "constant", "--tensorboard-dir", str(tmp_path)]
    flags += ["--wandb-project", "test", "--wandb-exp-name", "test", "--wandb-entity", "test"]
    flags += ["--wandb-save-dir", str(tmp_path)]
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    log, _ = run_script(data, checkouts / "patched", "one", *flags, environment=environment)
    assert [entry.window for entry in log.iterations] == [1024] * 6


@pytest.mark.parametrize("layout", ["one", "pp2"])
def test_flags_are_refused_where_a_merge_took_the_line_that_switches_on(
    checkouts, data, layout, tmp_path
):
    """The other lines are there: flags parse, and nothing else would read them."""
    copy = tmp_path / checkouts.name / "merged"  # named as `of_its_own` looks it up
    shutil.copytree(checkouts / "patched", copy, symlinks=True)
    training = copy / "megatron" / "training" / "training.py"
    lines = training.read_text().splitlines(keepends=True)
    training.write_text("".join(line for line in lines if "skyladder.switch_on()" not in line))
    assert training.read_text().count("switch_on") == 0
    _, text = run_script(data, copy, layout, *LADDER, fails=True)
    assert "nothing switched SkyLadder on" in text and "elapsed time per iteration" not in text


def test_what_only_the_patch_starts_is_refused_elsewhere(checkouts, data):
    if not is_only_patched(checkouts):
        pytest.skip("our entry point and --spec start it too")
    _, text = launch(data, *LADDER, megatron=checkouts / "stock", fails=True)
    assert "is started by its own pretrain_gpt.py only" in text
    _, text = run_script(data, checkouts / "stock", "one", *SPEC, fails=True)
    assert "is started by its own pretrain_gpt.py only" in text


@pytest.mark.parametrize("layout", ["tp2", "pp2", "cp2"])
def test_spec_alone_brings_the_ladder(checkouts, data, entry_point, layout, tmp_path):
    if is_only_patched(checkouts):
        pytest.skip("refused there, see the test before")
    variables, more = {"SKYLADDER_START_WINDOW": "8"}, []
    if layout == "tp2":
        variables["SKYLADDER_INIT"], more = "reference", DRAWN
    if layout == "cp2":  # the same from a file
        settings = tmp_path / "flags.txt"
        settings.write_text("--skyladder-start-window 8  # tokens\n")
        variables = {"SKYLADDER_CONFIG": str(settings)}
        more = ["--skyladder-context-parallel-layout", "zigzag"]  # of which the script cuts
    flags = [*SPEC, *(more[2:] if layout == "tp2" else [])]  # Megatron's own
    log, text = run_script(data, checkouts / "stock", layout, *flags, environment=variables)
    assert "mask probe passed" in text and "documents are not masked: --spec" in text
    assert figures(log) == figures(entry_point((*LADDER, *more), layout))
    compared.note(checkouts.name, "--spec", f"window, {layout}, against the entry point")
    if layout == "cp2":  # the script's own loss function, and ranks that count unequally
        assert "context parallelism keeps Megatron's zigzag, because this forward step" in text
        in_one_process = entry_point((*LADDER, "--eod-mask-loss"), "one")
        for found, wanted in zip(figures(log), figures(in_one_process), strict=True):
            assert found == pytest.approx(wanted, rel=1e-4)


def test_our_entry_point_takes_a_patched_checkout(checkouts, data, entry_point):
    if is_only_patched(checkouts):
        pytest.skip("refused there, see above")
    log, _ = launch(
        data,
        *(*DOCUMENTS_MASKED, *LAYOUTS["pp2"]),
        megatron=checkouts / "patched",
        num_processes=2,
    )
    assert figures(log) == figures(entry_point(tuple(DOCUMENTS_MASKED), "pp2"))
    compared.note(checkouts.name, "entry point", "documents, pp2, patched against stock checkout")
