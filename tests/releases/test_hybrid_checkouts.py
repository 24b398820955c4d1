"""Checkouts with ``pretrain_hybrid.py``: the patch and ``--spec``, beside our entry point's GPT.

A pattern of attention and MLPs draws the weights that the GPT draws, so every run from scratch has
to log what the GPT logs in the same layout. About two minutes for each checkout.
"""

import os

import compared
import pytest
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
from test_checkouts import SPEC, VARIABLE

from megatron_skyladder.cli import main as skyladder
from megatron_skyladder.testing import requires_megatron

TAGS = ("core_v0.18.2", "core_v0.19.0", "main")
TP2 = ["--tensor-model-parallel-size", "2"]
STOCK_SPEC = ["--spec", "megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"]
PATTERNS = {1: "*-*-*-*-", 2: "*-*-|*-*-", 4: "*-|*-|*-|*-"}

pytestmark = requires_megatron


@pytest.fixture(scope="module", params=TAGS)
def checkouts(request, tmp_path_factory):
    """A stock and a patched copy of one checkout."""
    source = require(VARIABLE, request.param, "a folder with Megatron-LM checkouts by tag")
    parent = tmp_path_factory.mktemp(f"hybrid-{request.param}", numbered=False)
    for name in ("stock", "patched"):
        copy_checkout(source, parent / name)
    assert skyladder(["patch", "apply", str(parent / "patched")]) == 0
    return parent


def stages(num):
    return ["--pipeline-model-parallel-size", str(num)]


def run_hybrid(data, checkout, num_stages, *flags, script="pretrain_hybrid.py", **options):
    options.setdefault("num_processes", num_stages)
    if "--spec" not in flags and "0.18" in checkout.parent.name:  # its script wants one
        flags = (*flags, *STOCK_SPEC)
    return launch(
        data,
        *(*flags, *stages(num_stages), f"--hybrid-layer-pattern={PATTERNS[num_stages]}"),
        megatron=checkout,
        script=checkout / script if script else None,
        **options,
    )


@pytest.mark.parametrize("num_stages", [2, 4])
def test_the_patched_script_logs_what_the_gpt_logs(checkouts, data, num_stages):
    """And our entry point, given the pattern, too."""
    if num_stages == 4 and checkouts.name != "hybrid-main":
        pytest.skip("two middle stages behave as one; tried on main only")
    gpt, _ = launch(
        data,
        *(*DOCUMENTS_MASKED, *stages(num_stages)),
        megatron=checkouts / "stock",
        num_processes=num_stages,
    )
    stop = "--skyladder-eval-lengths=16,32"
    patched, text = run_hybrid(
        data, checkouts / "patched", num_stages, *DOCUMENTS_MASKED, stop, stop_time=True
    )
    assert "mask probe passed" in text and "documents masked" in text
    assert figures(patched) == figures(gpt)
    ours, _ = run_hybrid(
        data,
        checkouts / "stock",
        num_stages,
        *(*DOCUMENTS_MASKED, stop),
        script=None,
        stop_time=True,
    )
    assert every_figure(ours) == every_figure(patched)
    what = f"hybrid, documents, pp{num_stages}, against the GPT"
    compared.note(checkouts.name, "patch, entry point", what)


def test_spec_alone_brings_the_ladder(checkouts, data):
    gpt, _ = launch(data, *LADDER, *TP2, megatron=checkouts / "stock", num_processes=2)
    spec, text = run_hybrid(
        data,
        checkouts / "stock",
        1,
        *(*SPEC, *TP2),
        num_processes=2,
        environment={"SKYLADDER_START_WINDOW": "8"},
    )
    assert "mask probe passed" in text and "documents are not masked: --spec" in text
    assert figures(spec) == figures(gpt)
    compared.note(checkouts.name, "--spec", "hybrid, window, tp2, against the GPT")


def test_without_our_flags_the_patched_script_is_stock(checkouts, data):
    stock, patched = (
        run_hybrid(data, checkouts / name, 2, stop_time=True)[0] for name in ("stock", "patched")
    )
    assert every_figure(patched) == every_figure(stock)


def test_a_symbol_that_cannot_be_combined_ends_the_script(checkouts, data):
    _, text = launch(
        data,
        *(*LADDER, "--hybrid-layer-pattern=M-*-"),
        megatron=checkouts / "patched",
        script=checkouts / "patched" / "pretrain_hybrid.py",
        fails=True,
    )
    assert "--hybrid-layer-pattern=M-*- cannot be combined" in text


KERNELS = REPOSITORY / "tests" / "recurrent_kernels"
SIZES = (
    "--mamba-state-dim 8 --mamba-head-dim 8 --mamba-num-groups 2 --mamba-num-heads 8 "
    "--linear-key-head-dim 8 --linear-value-head-dim 8 --linear-num-key-heads 4 "
    "--linear-num-value-heads 4 --linear-conv-kernel-dim 4"
)


def test_recurrent_layers_are_cut_in_the_patched_script(checkouts, data):
    """On reference kernels; what a cut means is tested in tests/distributed."""
    pytest.importorskip("einops", reason="Megatron's Mamba mixer needs it")
    has_delta = "0.18" not in checkouts.name  # there its kernels have other places
    pattern = "M-*-|G-*-" if has_delta else "M-*-|M-*-"
    cut = ["--skyladder-recurrent-state", "fragments", f"--hybrid-layer-pattern={pattern}"]
    flags = [*DOCUMENTS_MASKED, *SIZES.split(), *cut, *stages(2)]
    logs = {}
    for name, script in (("patched", "pretrain_hybrid.py"), ("stock", None)):
        folder = checkouts / name
        logs[name], text = launch(
            data,
            *(flags if has_delta else [*flags, *STOCK_SPEC]),
            megatron=folder,
            script=folder / script if script else None,
            num_processes=2,
            environment={"PYTHONPATH": os.pathsep.join(map(str, (KERNELS, folder, REPOSITORY)))},
        )
        assert "attention layers and 1 recurrent ones on this rank" in text
    assert figures(logs["patched"]) == figures(logs["stock"])
