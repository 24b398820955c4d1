"""Save and resume on every release that is at hand, in every integration and format.

The installed Megatron, wheels (SKYLADDER_MEGATRON_WHEELS, our entry point) and checkouts
(SKYLADDER_MEGATRON_CHECKOUTS: our entry point, the patched script, ``--spec``). A minute or two for
each integration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path

import compared
import pytest
import test_checkouts
import test_wheels
from launches import Data, copy_checkout, require
from resuming import COMBINATIONS, FORMATS, ITERATIONS, SETTINGS, STOP_AT, Resuming, pool_for
from unpack_wheels import OLDER

from megatron_skyladder.cli import main as skyladder
from megatron_skyladder.schedules import Stage
from megatron_skyladder.testing import ProcessPool, requires_megatron

pytestmark = requires_megatron

BOTH = [tag for tag in test_checkouts.TAGS if tag not in test_checkouts.ONLY_PATCHED]
INTEGRATIONS = [
    *((name, "entry point") for name in ("installed", *OLDER, *BOTH)),
    *((name, "spec") for name in BOTH),
    *((name, "patch") for name in test_checkouts.TAGS),
]
EARLIER = {  # what versions up to November 2026 left in Megatron's arguments
    "rate": {"skyladder_alpha": Fraction(15)},
    "stages": {
        "skyladder_stages": [
            Stage(8, Fraction(1, 3)),
            Stage(16, Fraction(1, 3)),
            Stage(-1, Fraction(1, 3)),
        ]
    },
}


@pytest.fixture(scope="module", params=INTEGRATIONS, ids=" ".join)
def resuming(
    request: pytest.FixtureRequest,
    data: Data,
    shared_pool: Callable[[Path | None], ProcessPool],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Resuming]:
    name, integration = request.param
    folder = tmp_path_factory.mktemp("resuming")
    megatron = None
    if name in test_checkouts.TAGS:
        source = require(test_checkouts.VARIABLE, name, "a folder with checkouts by tag")
        megatron = copy_checkout(source, folder / name)
        if integration == "patch":
            assert skyladder(["patch", "apply", str(megatron)]) == 0
    elif name != "installed":
        megatron = require(test_wheels.VARIABLE, name, "make test-releases makes it")
    script = megatron / "pretrain_gpt.py" if megatron and integration != "entry point" else None
    is_checkout = name in test_checkouts.TAGS
    with pool_for(megatron) if is_checkout else nullcontext(shared_pool(megatron)) as pool:
        yield Resuming(pool, data, megatron, script, integration == "spec", folder)


def skip_what_stock_cannot(resuming: Resuming, saved_as: str) -> None:
    """Megatron 0.11 loads with torch's default, which takes no argparse.Namespace since 2.6."""
    if saved_as == "torch" and resuming.megatron and resuming.megatron.name == "core_v0.11.0":
        pytest.skip("with this torch, stock 0.11 does not load its own checkpoints of this format")


@pytest.mark.parametrize(("saved_as", "setting"), COMBINATIONS)
def test_a_run_goes_on_where_it_was(
    resuming: Resuming, saved_as: str, setting: str, request: pytest.FixtureRequest
) -> None:
    skip_what_stock_cannot(resuming, saved_as)
    settings, windows = SETTINGS[setting]
    run = resuming.fresh(f"{saved_as}-{setting}")
    before, _ = run.train(settings, f"{FORMATS[saved_as]} --exit-interval {STOP_AT}")
    after, text = run.train(settings, FORMATS[saved_as])
    assert f"successfully loaded checkpoint from {run.folder / 'checkpoints'}" in text
    logged = [
        (record.iteration, record.window) for record in (*before.iterations, *after.iterations)
    ]
    assert logged == list(zip(range(1, ITERATIONS + 1), windows, strict=True))
    release, integration = request.node.callspec.params["resuming"]
    compared.note(release, integration, f"resumed in mid-ladder, format {saved_as}: windows")


@pytest.mark.parametrize(
    ("saved_as", "setting"), [("torch", "rate"), ("torch", "stages"), ("torch_dist", "stages")]
)
def test_a_checkpoint_of_an_earlier_version_goes_on_too(
    resuming: Resuming, saved_as: str, setting: str
) -> None:
    skip_what_stock_cannot(resuming, saved_as)
    settings, windows = SETTINGS[setting]
    run = resuming.fresh(f"earlier-{saved_as}-{setting}")
    run.train(settings, f"{FORMATS[saved_as]} --exit-interval {STOP_AT}")
    run.leave_in_arguments(EARLIER[setting])
    after, _ = run.train(settings, FORMATS[saved_as])
    assert [record.window for record in after.iterations] == windows[STOP_AT:]


def test_what_is_refused_and_what_cannot_be_read(resuming: Resuming) -> None:
    """In one run, as all of it needs a checkpoint."""
    skip_what_stock_cannot(resuming, "torch")
    settings, _ = SETTINGS["rate"]
    run = resuming.fresh("refused")
    run.train(settings, f"{FORMATS['torch']} --exit-interval {STOP_AT}")
    refused = (1, 2)  # a script of Megatron's shows our refusals as a traceback
    other = settings.replace("alpha 15", "alpha 16")
    if resuming.through_spec:  # without --spec there is nothing of ours in the process
        _, text = run.train(other, FORMATS["torch"], refused)
        assert "To keep the checkpoint's windows: SKYLADDER_ALPHA='15'." in text
    else:
        _, text = run.train("", FORMATS["torch"], refused)
        assert "trained with SkyLadder, but this run has none of its flags" in text
        _, text = run.train(other, FORMATS["torch"], refused)
        assert "To keep the checkpoint's windows: --skyladder-alpha 15." in text
    assert "Traceback" in text or "SkyLadder: error: " in text
    content = run.state.read_bytes()
    run.state.write_bytes(content[:1000])
    for flags in (settings, "--skyladder-end-ladder"):
        _, text = run.train(flags, FORMATS["torch"], (1,))
        assert "Megatron could not read the checkpoint" in text
    run.state.write_bytes(content)
    ended, text = run.train("--skyladder-end-ladder", FORMATS["torch"])
    assert "the ladder ends here, as --skyladder-end-ladder says" in text
    assert [record.window for record in ended.iterations] == [None] * (ITERATIONS - STOP_AT)
