"""Our entry point on the older wheels; ``make test-releases`` unpacks them.

SKYLADDER_MEGATRON_WHEELS names a folder with one sub-folder for each version, as
``unpack_wheels.py`` makes it.
"""

import pytest
from launches import DOCUMENTS_MASKED, figures, launch, require
from unpack_wheels import OLDER

from megatron_skyladder.testing import requires_megatron

VARIABLE = "SKYLADDER_MEGATRON_WHEELS"
LAYOUT = ["--pipeline-model-parallel-size", "2"]

pytestmark = requires_megatron


@pytest.fixture(scope="module")
def on_the_installed_one(data):
    """Figures of the release that all other tests run with."""
    log, _ = launch(data, *DOCUMENTS_MASKED, *LAYOUT, num_processes=2)
    return figures(log)


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
