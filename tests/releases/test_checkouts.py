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
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

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

pytestmark = requires_megatron


def num_processes(layout):
    return math.prod(int(word) for word in LAYOUTS[layout] if word.isdigit())


@pytest.fixture(scope="module", params=TAGS)
def checkouts(request, tmp_path_factory):
    """A stock and a patched copy of one checkout."""
    source = require(VARIABLE, request.param, "a folder with Megatron-LM checkouts by tag")
    parent = tmp_path_factory.mktemp(request.param)
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


def run_script(data, checkout, layout, *flags, **options):
    return launch(
        data,
        *(*flags, *LAYOUTS[layout]),
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


def test_the_tables_of_the_script_are_right(checkouts):
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
    subprocess.run(
        [sys.executable, "-m", "megatron_skyladder.cpu", runner, *words],
        cwd=checkout,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(checkout), str(REPOSITORY)]),
            "MASTER_PORT": "0",  # any that is free
            "HTTPS_PROXY": "http://localhost:9",  # they run without the data they would download
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1800,
    )
    return {
        f"{case.get('classname')}::{case.get('name')}": [child.tag for child in case]
        for case in ElementTree.parse(report).iter("testcase")
    }


def test_megatrons_own_tests_end_as_in_the_stock_checkout(checkouts, tmp_path):
    stock = own_outcomes(checkouts / "stock", tmp_path / "stock.xml")
    patched = own_outcomes(checkouts / "patched", tmp_path / "patched.xml")
    assert patched == stock
    num_passed = sum(not problems for problems in stock.values())
    assert num_passed > 10  # the others need more ranks, a GPU, or packages


def test_without_our_flags_no_bit_changes(checkouts, data, tmp_path):
    """Neither in the patched script nor in our entry point."""
    results = []
    for name, script in (
        ("stock", checkouts / "stock" / "pretrain_gpt.py"),
        ("patched", checkouts / "patched" / "pretrain_gpt.py"),
        ("stock", None),
    ):
        saved = tmp_path / str(len(results))
        save = ["--save", str(saved), "--save-interval", "100", "--ckpt-format", "torch_dist"]
        masks = ["--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss"]
        log, _ = launch(
            data,
            *(*save, *masks, *LAYOUTS["pp2"]),
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
    if layout == "pp4" and "main" not in checkouts.name:
        pytest.skip("two middle stages behave as one; tried on main only")
    flags = [*flags, *DRAWN, "--log-throughput"]
    log, text = run_script(data, checkouts / "patched", layout, *flags, stop_time=True)
    assert "mask probe passed" in text and "documents" in text
    found, wanted = every_figure(log), every_figure(entry_point(tuple(flags), layout))
    for each, other in zip(found, wanted, strict=True):
        assert each == other
    assert log.iterations[-1].tflops_per_gpu > 0


@pytest.mark.parametrize("layout", ["tp2", "pp2", "cp2"])
def test_spec_alone_brings_the_ladder(checkouts, data, entry_point, layout, tmp_path):
    variables, more = {"SKYLADDER_START_WINDOW": "8"}, []
    if layout == "tp2":
        variables["SKYLADDER_INIT"], more = "reference", DRAWN
    if layout == "cp2":  # the same from a file
        settings = tmp_path / "flags.txt"
        settings.write_text("--skyladder-start-window 8  # tokens\n")
        variables = {"SKYLADDER_CONFIG": str(settings)}
    flags = [*SPEC, *more[2:]]  # Megatron's own
    log, text = run_script(data, checkouts / "stock", layout, *flags, environment=variables)
    assert "mask probe passed" in text and "documents are not masked: --spec" in text
    assert figures(log) == figures(entry_point((*LADDER, *more), layout))
    if layout == "cp2":  # the script's own loss function, and ranks that count unequally
        in_one_process = entry_point((*LADDER, "--eod-mask-loss"), "one")
        for found, wanted in zip(figures(log), figures(in_one_process), strict=True):
            assert found == pytest.approx(wanted, rel=1e-4)


def test_our_entry_point_takes_a_patched_checkout(checkouts, data, entry_point):
    log, _ = launch(
        data,
        *(*DOCUMENTS_MASKED, *LAYOUTS["pp2"]),
        megatron=checkouts / "patched",
        num_processes=2,
    )
    assert figures(log) == figures(entry_point(tuple(DOCUMENTS_MASKED), "pp2"))
