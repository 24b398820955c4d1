"""The answer of a plan in three lines: does it fit, what does it save, what is next."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_skyladder.attention.limits import Effect, Finding
from megatron_skyladder.ladder.flags import STEP_BATCHES
from megatron_skyladder.ladder.schedules import DEFAULT_EXPAND_FRACTION, DEFAULT_START_WINDOW
from megatron_skyladder.megatron_lm import flag_rules, releases
from megatron_skyladder.planning.launch import ENTRY_POINT, Launch
from megatron_skyladder.planning.pasted import Pasted

_GLOBAL_BATCH = "--global-batch-size"


@dataclass(frozen=True)
class Fit:
    """What has to happen to a launch so that it runs with SkyLadder.

    Args:
        add: flags that are not there yet, as words of a command line.
        change: what stands there and has to change, one sentence each, with its place.
        start: how the script has to be started, or an empty string where it is right as it is.
    """

    add: tuple[str, ...]
    change: tuple[str, ...]
    start: str = ""

    @property
    def fits(self) -> bool:
        """Whether adding flags is enough."""
        return not self.change

    def __str__(self) -> str:
        """Return the first line of the verdict."""
        add = f"add these flags: {' '.join(self.add)}" if self.add else "no flag is to be added"
        start = f"; start {self.start}" if self.start else ""
        if self.fits:
            return f"Fits: {add}{start}"
        return f"Change: {'; '.join(self.change)}; then {add}{start}"


def fit(pasted: Pasted, batches: str = "") -> Fit:
    """Return what has to happen to a launch.

    Args:
        pasted: the launch.
        batches: the value of Megatron's schedule of batches that stages ask for and it lacks.
    """
    launch = pasted.launch
    given = {word.partition("=")[0] for word in launch.words}
    stops = [each for each in pasted.findings if each.rule.effect.stops]
    addable = [each for each in stops if each.rule.set_to and each.rule.flag not in given]
    change = tuple(_change(each, launch) for each in stops if each not in addable)
    add = [word for each in addable for word in each.rule.set_to.split()]
    if "--preset" in given and "--skyladder-preset" not in given:
        add += ["--skyladder-preset", _preset(launch)]
    elif not any(flag.startswith("--skyladder-") for flag in given):
        add += ["--skyladder-start-window", str(DEFAULT_START_WINDOW)]
        add += ["--skyladder-expand-fraction", DEFAULT_EXPAND_FRACTION]
    if batches:
        add += [STEP_BATCHES, f"'{batches}'"]
        if _GLOBAL_BATCH in given:
            place = launch.place(_GLOBAL_BATCH)
            where = f" ({place})" if place else ""
            change += (f"{_GLOBAL_BATCH}{where} cannot stay: the stages set batches",)
    return Fit(tuple(add), change, _start(launch))


def _preset(launch: Launch) -> str:
    """Return the run of the paper whose model and batch the plan is about."""
    words = [part for word in launch.words for part in word.split("=", 1)]
    return words[words.index("--preset") + 1]


def _change(finding: Finding, launch: Launch) -> str:
    place = launch.place(finding.rule.flag)
    where = f" ({place})" if place else ""
    rule = finding.rule
    if rule.set_to:
        return f"{finding.given}{where} to {rule.set_to}, as {finding.why}"
    do = f". {rule.do}".rstrip(".") if rule.do else ""
    return f"{finding.given}{where} cannot stay: {finding.why}{do}"


def _start(launch: Launch) -> str:
    """Return what to start in place of the script, or nothing."""
    name = launch.entry.rpartition("/")[2]
    if not launch.entry or launch.is_ours or "megatron_skyladder.layer_specs" in launch.words:
        return ""
    if name in releases.SCRIPTS:
        return f"-m {ENTRY_POINT} in place of {launch.entry} (or: skyladder patch apply its folder)"
    return (
        f"{launch.entry} once its checkout is patched (skyladder patch apply DIR), or -m "
        f"{ENTRY_POINT} in its place"
    )


def noted(findings: Iterable[Finding]) -> list[str]:
    """Return what is accepted with something to know, one sentence each."""
    return [str(each) for each in findings if each.rule.effect is Effect.NOTED]


def left_out(pasted: Pasted) -> list[str]:
    """Return which flags of the launch change nothing here, in one sentence."""
    known = {rule.flag for rule in flag_rules.RULES} | {each.flag for each in pasted.unknown}
    names = [flag for flag in dict.fromkeys(pasted.left_out) if flag not in known]
    return [f"Left out, as they change nothing here: {', '.join(names)}."] if names else []


def harmless(findings: Iterable[Finding]) -> list[str]:
    """Return what looks like a conflict and is none, one sentence each."""
    return [str(each) for each in findings if each.rule.effect is Effect.HARMLESS]
