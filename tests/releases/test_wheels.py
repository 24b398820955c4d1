"""Our entry point on the older wheels; ``make test-releases`` unpacks them.

SKYLADDER_MEGATRON_WHEELS names a folder with one sub-folder for each version, as
``unpack_wheels.py`` makes it.
"""

import os
import subprocess
import sys

import compared
import pytest
from launches import (
    DOCUMENTS_MASKED,
    LADDER,
    REPOSITORY,
    SMALL_MODEL,
    figures,
    launch,
    require,
)
from resuming import Resuming
from unpack_wheels import INSTALLED, OLDER

from megatron_skyladder.testing import requires_megatron

VARIABLE = "SKYLADDER_MEGATRON_WHEELS"
LAYOUT = ["--pipeline-model-parallel-size", "2"]

SOME_TOKENS_COUNT = f"{' '.join(LADDER)} --eod-mask-loss"
CONTEXT_PARALLEL = "--context-parallel-size 2"

pytestmark = requires_megatron


@pytest.fixture(scope="module")
def on_the_installed_one(data):
    """Figures of the release that all other tests run with."""
    log, _ = launch(data, *DOCUMENTS_MASKED, *LAYOUT, num_processes=2)
    return figures(log)


@pytest.fixture
def train(data, shared_pool, tmp_path):
    """Train with our entry point on a wheel, or the installed release, and return its log."""

    def run(wheel, flags, **options):
        way = Resuming(shared_pool(wheel), data, wheel, None, False, tmp_path)
        return way.train(flags, saves=False, **options)

    return run


@pytest.mark.parametrize("version", OLDER)
def test_an_older_wheel_trains_to_the_same_losses(data, request, version):
    wheel = require(VARIABLE, version, "make test-releases makes it")
    log, text = launch(data, *DOCUMENTS_MASKED, *LAYOUT, num_processes=2, megatron=wheel)
    assert "mask probe passed" in text and "documents masked" in text
    assert f"{wheel}/megatron/" in text  # in warnings: not the one that is installed
    assert [entry.window for entry in log.iterations][-1] == 64
    expected = request.getfixturevalue("on_the_installed_one")
    for found, wanted in zip(figures(log), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    what = "documents, pp2, against the installed release"
    compared.note(version, "entry point", what, compared.largest(figures(log), expected))


def test_the_window_follows_the_samples_where_batches_ramp(train):
    """Releases up to 0.17: batches of 2 that grow by 2 each 16 / 3 samples, to 8."""
    wheel = require(VARIABLE, "0.17.1", "make test-releases makes it")
    ramp = "--rampup-batch-size 2 2 16 --skyladder-start-window 8 --skyladder-alpha 14"
    model = SMALL_MODEL.replace("--train-iters 6", "--train-samples 44")
    log, text = train(wheel, ramp, model=model)
    assert "earlier ones let it grow, and the window follows the samples" in text
    consumed = [entry.consumed_samples for entry in log.iterations]
    assert consumed == [2, 4, 6, 10, 14, 20, 28, 36, 44]
    # 8 + 14 * whole steps of 8 samples before the batch, and 64 at most
    assert [entry.window for entry in log.iterations] == [8, 8, 8, 8, 22, 22, 36, 50, 64]


@pytest.mark.parametrize("version", OLDER)
def test_all_flags_are_printed(version):
    wheel = require(VARIABLE, version, "make test-releases makes it")
    result = subprocess.run(
        [sys.executable, "-m", "megatron_skyladder.pretrain_gpt", "--help"],
        env={**os.environ, "PYTHONPATH": f"{wheel}{os.pathsep}{REPOSITORY}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "--num-layers" in result.stdout and "--skyladder-start-window" in result.stdout


@pytest.mark.parametrize("version", [INSTALLED, *OLDER])
def test_context_parallel_ranks_count_their_sequences_tokens_together(train, version):
    """Ranks would hold unequal numbers of tokens that count."""
    wheel = None
    if version != INSTALLED:
        wheel = require(VARIABLE, version, "make test-releases makes it")
    in_one_process = figures(train(None, SOME_TOKENS_COUNT)[0])
    log, _ = train(wheel, f"{SOME_TOKENS_COUNT} {CONTEXT_PARALLEL}", num_processes=2)
    for found, wanted in zip(figures(log), in_one_process, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)  # gradient norms are logged in 4 digits
    what = "masked losses, cp2, against one process"
    difference = compared.largest(figures(log), in_one_process)
    compared.note(version, "entry point", what, difference)
