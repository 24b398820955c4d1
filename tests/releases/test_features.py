"""Every feature on every release that is at hand, in every integration: trained, or refused.

What trains has to log what our entry point logs on the installed release, in mid-ladder: that one
is compared with dense masks in ``tests/distributed``. What a release cannot do has to end at the
start, by a message that names it. Half a minute for each release and integration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import compared
import pytest
import test_checkouts
import test_wheels
from features import EXPERTS, FEATURES, LADDER, LATENT, refusal
from launches import Data, copy_checkout, require
from resuming import Resuming, pool_for
from unpack_wheels import INSTALLED, OLDER

from megatron_skyladder.cli import main as skyladder
from megatron_skyladder.megatron_lm import releases
from megatron_skyladder.report.runlog import RunLog
from megatron_skyladder.testing import ProcessPool, requires_megatron

pytestmark = requires_megatron

BOTH = [tag for tag in test_checkouts.TAGS if tag not in test_checkouts.ONLY_PATCHED]
PATCHED = [*test_checkouts.TAGS, *test_checkouts.FORKS]
LINES = {release.wheel: line for line, release in releases.RELEASES.items()}
LINES |= dict(zip(test_checkouts.TAGS, releases.RELEASES, strict=True))
LINES |= {"swiss-ai": "0.11", "llm-jp": "0.12"}
WAYS = [
    *((name, "entry point") for name in (*OLDER, *BOTH)),
    *((name, "--spec") for name in BOTH),
    *((name, "patch") for name in PATCHED),
]
STOP_AT = 3
# Experts' jitter comes on a CPU out of the generator that data loaders draw from as they begin, so
# stock Megatron's resumed runs differ there, too.
ALL = tuple(name for name in FEATURES if name != "experts")
RESUMED = {
    ("0.17.1", "entry point"): ("rates and RoPE", "latent attention"),
    ("0.18.2", "entry point"): ("batches", "learnable sinks"),
    ("core_v0.16.1", "--spec"): ALL,
    ("core_v0.15.3", "patch"): ALL,
    ("core_v0.17.1", "patch"): ("prediction heads",),
    ("core_v0.12.3", "patch"): ("latent attention",),
}
TWO_RANKS = {  # on releases that make the rotary embedding each in another way
    *(("0.17.1", "entry point"), ("core_v0.16.1", "--spec")),
    *((f"core_v{line}", "patch") for line in ("0.11.0", "0.12.3", "0.15.3")),
    ("main", "patch"),
}
# the last two are swiss-ai's
OF_TIME = ("skyladder/tflops_per_gpu", "skyladder/hours_left", "tokens/sec/gpu", "eta")
NOT_EVERYWHERE = {"num zeros", "load_balancing_loss", "z_loss"}  # 0.11 and 0.12 log the first alone
# logged in the second line of a run as the mean of two in some releases
AUXILIARY = {"load_balancing_loss", "z_loss", "mtp_1 loss", "mtp_2 loss"}
Figures = list[dict[str, float]]


@pytest.fixture(scope="module")
def installed(
    data: Data,
    shared_pool: Callable[[Path | None], ProcessPool],
    tmp_path_factory: pytest.TempPathFactory,
) -> Resuming:
    """Our entry point on the release that all other tests run with."""
    folder = tmp_path_factory.mktemp("installed")
    return Resuming(shared_pool(None), data, None, None, False, folder)


@pytest.fixture(scope="module")
def wanted(installed: Resuming) -> Callable[[str, bool], RunLog]:
    """What the installed release logs of a feature, with documents masked or without."""

    @cache
    def run(feature: str, documents: bool) -> RunLog:
        return train(installed.fresh(f"{feature}-{documents}"), feature, documents=documents)[0]

    return run


@pytest.fixture(scope="module")
def copy_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """A copy of a checkout, stock or patched."""

    @cache
    def make(name: str, patched: bool) -> Path:
        source = require(test_checkouts.VARIABLE, name, "a folder with checkouts by tag")
        if patched and name in BOTH:  # whose helpers are built once
            source = make(name, False)
        copy = copy_checkout(source, tmp_path_factory.mktemp("checkout") / name)
        if patched:
            assert skyladder(["patch", "apply", str(copy)]) == 0
        return copy

    return make


@dataclass
class Way:
    """A release and an integration.

    Args:
        name: of the wheel or the checkout.
        integration: what starts SkyLadder.
        run: what trains with them.
    """

    name: str
    integration: str
    run: Resuming

    @property
    def documents(self) -> bool:
        """Whether documents are masked: --spec brings the window alone."""
        return self.integration != "--spec"

    def train(
        self,
        feature: str,
        flags: str = "",
        *,
        saves: bool = False,
        exit_codes: tuple[int, ...] = (0,),
    ) -> tuple[RunLog, str]:
        """Train with a feature; return the log, parsed and whole."""
        run = self.run.fresh(feature.replace(" ", "-") + "-saved" * saves)
        run.folder.mkdir(exist_ok=True)
        if self.name == "swiss-ai":
            flags += f" --trigger-path {run.folder}"  # gets a file when a run ends
        return train(
            run, feature, flags, documents=self.documents, saves=saves, exit_codes=exit_codes
        )

    def refusal(self, feature: str) -> str:
        """Return the message that refuses a feature, or nothing."""
        assert self.run.megatron is not None
        found = releases.megatron_in(self.run.megatron)
        assert found is not None and found.line == LINES[self.name]
        return refusal(feature, found.line, self.integration).format(version=found.version)


@pytest.fixture(scope="module", params=WAYS, ids=" ".join)
def way(
    request: pytest.FixtureRequest,
    data: Data,
    copy_of: Callable[[str, bool], Path],
    shared_pool: Callable[[Path | None], ProcessPool],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Way]:
    """Each release in each integration."""
    name, integration = request.param
    if name in PATCHED:
        megatron = copy_of(name, integration == "patch")
    else:
        megatron = require(test_wheels.VARIABLE, name, "make test-releases makes it")
    script = None if integration == "entry point" else megatron / "pretrain_gpt.py"
    folder = tmp_path_factory.mktemp("features")
    is_checkout = name in PATCHED
    with pool_for(megatron) if is_checkout else nullcontext(shared_pool(megatron)) as pool:
        run = Resuming(pool, data, megatron, script, integration == "--spec", folder)
        yield Way(name, integration, run)


def train(
    run: Resuming,
    feature: str,
    more: str = "",
    *,
    documents: bool,
    saves: bool = False,
    exit_codes: tuple[int, ...] = (0,),
) -> tuple[RunLog, str]:
    """Train with a feature; return the log, parsed and whole."""
    asked = FEATURES[feature]
    return run.train(
        f"{asked.settings}{' --skyladder-intra-document' * documents}",
        f"{asked.flags} {more}",
        exit_codes,
        model=asked.model,
        saves=saves,
        num_processes=asked.num_processes,
    )


def figures(log: RunLog) -> Figures:
    """Return everything that is logged of each iteration, but for what time decides."""
    found = [
        {"iteration": entry.iteration}
        | {name: value for name, value in entry.values.items() if not name.startswith(OF_TIME)}
        for entry in log.iterations
    ]
    drop_auxiliary(found[1])
    return found


def drop_auxiliary(figures: dict[str, float]) -> None:
    """Forget the losses that are logged as a mean in the second line of a run."""
    for name in AUXILIARY & figures.keys():
        del figures[name]


def assert_close(found: Figures, expected: Figures) -> None:
    """Compare to the digits that are logged; of gradient norms these are four."""
    for each, other in zip(found, expected, strict=True):
        assert each.keys() ^ other.keys() <= NOT_EVERYWHERE
        for name in each.keys() & other.keys():
            tolerance = 1e-3 if name == "grad norm" else 1e-6
            assert each[name] == pytest.approx(other[name], rel=tolerance), name


@pytest.mark.parametrize("feature", FEATURES)
def test_trains_as_on_the_installed_release_or_is_refused(
    way: Way, wanted: Callable[[str, bool], RunLog], feature: str
) -> None:
    if FEATURES[feature].num_processes > 1 and (way.name, way.integration) not in TWO_RANKS:
        pytest.skip("two ranks are slow, and run on a release of each kind")
    if way.name == "swiss-ai" and FEATURES[feature].flags.startswith((LATENT, EXPERTS)):
        pytest.skip("this fork has no --mscale, and without SkyLadder its experts are others, too")
    if message := way.refusal(feature):
        # a script of Megatron's shows our refusals as a traceback
        log, text = way.train(feature, exit_codes=(1, 2))
        assert message in text
        assert not log.iterations
        compared.note(way.name, way.integration, f"{feature}: refused")
        return
    log, text = way.train(feature)
    assert "mask probe passed" in text
    assert [entry.window for entry in log.iterations] == list(FEATURES[feature].windows)
    assert all(set(FEATURES[feature].logs) <= entry.values.keys() for entry in log.iterations)
    expected = wanted(feature, way.documents)
    assert_close(figures(log), figures(expected))
    losses = [[(entry.loss or 0,) for entry in each.iterations] for each in (log, expected)]
    what = f"{feature}, {'documents' if way.documents else 'window'}, against {INSTALLED}"
    compared.note(way.name, way.integration, what, compared.largest(*losses))
    if FEATURES[feature].num_processes == 1 and feature in RESUMED.get(
        (way.name, way.integration), ()
    ):
        assert_goes_on(way, feature, figures(log))


def assert_goes_on(way: Way, feature: str, expected: Figures) -> None:
    """Stop a run in mid-ladder and go on: everything that is logged is as straight through."""
    found: Figures = []
    for flags in (f"--exit-interval {STOP_AT}", ""):
        log, text = way.train(feature, f"--ckpt-format torch_dist {flags}", saves=True)
        found += figures(log)
    assert "successfully loaded checkpoint from" in text
    # The second loss that a run logs is the mean of two, for Megatron does not empty its sum, so
    # what is read out of it has fewer digits.
    second = expected[STOP_AT + 1]
    drop_auxiliary(second)
    second["lm loss"] = pytest.approx(second["lm loss"], rel=1e-6)
    assert found == expected
    compared.note(way.name, way.integration, f"{feature}: resumed, all that is logged")


def test_validation_has_micro_batches_of_its_own(way: Way, installed: Resuming) -> None:
    """Of which tensor-parallel ranks that read nothing have to know the size; since 0.18."""
    if (way.name, way.integration) != ("0.18.2", "entry point"):
        pytest.skip("one release, beside the installed one, has them in our own reading of batches")
    flags = "--eval-micro-batch-size 4 --tensor-model-parallel-size 2"
    validated = [
        run.fresh("validation").train(LADDER, flags, saves=False, num_processes=2)[0].validations
        for run in (installed, way.run)
    ]
    assert validated[0]
    assert validated[0] == validated[1]
