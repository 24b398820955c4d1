"""``skyladder compare``: several schedules side by side, and the rate that fits a budget."""

from __future__ import annotations

import argparse
import itertools
import json
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

from megatron_skyladder.cli.plan import to_json as to_plan_json
from megatron_skyladder.ladder.config import DEFAULT_SCHEDULE
from megatron_skyladder.ladder.flags import name_of, settings_of
from megatron_skyladder.ladder.numbers import argument, exact, real
from megatron_skyladder.ladder.presets import PAPER_RUNS, SCHEDULE_PRESETS
from megatron_skyladder.ladder.schedules import SCHEDULES, WindowSchedule, all_settings
from megatron_skyladder.planning import budget, estimate, pasted, run_flags, verdict
from megatron_skyladder.planning.budget import Fit
from megatron_skyladder.planning.devices import list_devices
from megatron_skyladder.planning.estimate import Plan
from megatron_skyladder.planning.evidence import Measured, nearest
from megatron_skyladder.planning.files_read import FilesRead
from megatron_skyladder.planning.text import amount, scientific
from megatron_skyladder.terminal import NAME, paragraph, remark, styled, table

UNFINISHED = "unfinished"


def add_parser(subparsers: Any, help_text: str) -> argparse.ArgumentParser:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "compare",
        help=help_text,
        usage="skyladder compare [PRESET ...] [--schedule NAME ...] [--alpha RATE ...] [--share "
        "SHARE ...]\n                         [--start-window N ...] [--round-to N ...] [--preset "
        "NAME]\n                         [Megatron's flags] [--skyladder-*] [options]",
        formatter_class=run_flags.HelpFormatter,
        description=textwrap.dedent(f"""\
            Put schedules side by side: window, attention work, FLOPs and predicted time. Name
            presets first, or give values of one or more of --schedule, --alpha or --share,
            --start-window and --round-to: each combination is a row. One that does not get to
            its final window within the run is marked.

            presets: {", ".join(PAPER_RUNS)} (with their model),
                     {", ".join(name for name in SCHEDULE_PRESETS if name not in PAPER_RUNS)}

            examples:
              skyladder compare 1b-8k 1b-32k 3b-8k
              skyladder compare recommended shortformer --preset 1b-8k --device h100 --gpus 8
              skyladder compare --preset 1b-8k --schedule linear sinusoidal exponential
              skyladder compare --preset 1b-8k --alpha 1/4 1/8 1/12 --plot rates.svg
              skyladder compare --preset 1b-8k --share 0.5 0.64 --start-window 8 32 --evidence
              skyladder compare --preset 1b-8k --device h100 --gpus 8 --budget-hours 48"""),
    )
    parser.add_argument("names", nargs="*", metavar="PRESET", help="before any flag")
    parser.add_argument(
        "--schedule",
        nargs="+",
        action="extend",
        choices=tuple(SCHEDULES),
        metavar="NAME",
        help=f"one or more of {', '.join(SCHEDULES)}",
    )
    parser.add_argument(
        "--alpha", nargs="+", action="extend", type=_rate, metavar="RATE", help="tokens per step"
    )
    parser.add_argument(
        "--share",
        nargs="+",
        action="extend",
        type=_rate,
        metavar="SHARE",
        help="shares of the run over which the window grows, beside --alpha's rates",
    )
    parser.add_argument(
        "--start-window",
        nargs="+",
        action="extend",
        type=_count,
        metavar="TOKENS",
        help="windows at the first step",
    )
    parser.add_argument(
        "--round-to",
        nargs="+",
        action="extend",
        type=argument(all_settings()["round_to"].read),
        metavar="TOKENS",
        help="multiples that growing windows are rounded down to, auto or pow2",
    )
    parser.add_argument(
        "--evidence",
        action="store_true",
        help="what the paper measured nearest to each row, with its source",
    )
    parser.add_argument(
        "--budget-share", type=_rate, metavar="SHARE", help="grow over this share (default: 0.64)"
    )
    parser.add_argument("--budget-tokens", type=_count, metavar="N", help="tokens, such as 20e9")
    parser.add_argument(
        "--budget-hours", type=argument(real), metavar="H", help="hours on all GPUs"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("-v", "--verbose", action="store_true", help="name all that is left out")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw window, visible context and what is saved: FILE.png or .svg",
    )
    pasted.add_source_flags(parser)
    run_flags.add_run_flags(parser)
    return parser


def take(parser: argparse.ArgumentParser, words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take the launch out of the command's words."""
    rest, found = pasted.take(parser, words)
    return rest, {"pasted": found}


def run(args: argparse.Namespace) -> int:
    """Run the sub-command."""
    if args.list_devices:
        print(list_devices())
        return 0
    plans = make_plans(args)
    fits = make_fits(args, plans)
    if args.plot:
        from megatron_skyladder.planning import plots

        plots.draw_comparison(args.plot, plans)
    if args.json:
        print(json.dumps(to_json(plans, fits, with_evidence=args.evidence), indent=2))
    else:
        print(to_text(plans, fits, details=args.verbose, with_evidence=args.evidence))
    return 0


def _rate(text: str) -> Fraction:
    try:
        rate = exact(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if rate <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 such as 0.125 or 1/8")
    return rate


def _count(text: str) -> int:
    return int(_rate(text))


# --- the runs to compare ------------------------------------------------------------------------


def make_plans(args: argparse.Namespace) -> list[Plan]:
    """Return one plan for each schedule, with a constant window before each new model or length.

    Raises:
        ValueError: nothing to compare was named, or a flag is wrong.
    """
    plans: list[Plan] = []
    files = FilesRead()
    for name, preset, changes in _entries(args):
        # what does not finish is a row that is marked; the others are still to be seen
        allowed = {"skyladder_allow_unfinished": True}
        own = argparse.Namespace(**{**vars(args), **allowed, **changes})
        plan = estimate.make_plan(own, name=name, preset=preset, files=files)
        same = [p for p in plans if (p.shape, p.tokens) == (plan.shape, plan.tokens)]
        same = [p for p in same if p.config.seq_length == plan.config.seq_length]
        if not same and not _is_constant(plan):
            first = "no ladder" if plan.config.schedule.is_baseline else "constant"
            plans.append(_constant(plan, f"{first} ({preset})" if preset else first))
        plans.append(plan)
    return plans


def _constant(plan: Plan, name: str) -> Plan:
    length = plan.config.seq_length
    schedule = WindowSchedule("constant", length, length)
    config = replace(plan.config, schedule=schedule, local_schedule=None)
    return replace(plan, name=name, config=config)


def _is_constant(plan: Plan) -> bool:
    return plan.config.schedule.is_baseline and plan.config.local_schedule is None


def _entries(args: argparse.Namespace) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """Yield (name, run of the paper or None, flags to set) for each row."""
    unknown = [name for name in args.names if name not in SCHEDULE_PRESETS]
    if unknown:
        raise ValueError(f"{unknown[0]} is no preset. Choose from: {', '.join(SCHEDULE_PRESETS)}.")
    own_model = not (args.preset or args.num_layers)
    for name in args.names:
        preset = name if own_model and name in PAPER_RUNS else None
        yield name, preset, {"skyladder_preset": name}
    swept = any((args.schedule, args.alpha, args.share, args.start_window, args.round_to))
    names = args.schedule or ([DEFAULT_SCHEDULE] if swept else [])
    for name in names:
        for label, changes in _combinations(args, SCHEDULES[name]):
            of_schedule = {"skyladder_schedule": name, **_flags_of_other_rows(SCHEDULES[name])}
            yield f"{name}{label}", None, of_schedule | changes
    if not args.names and not names:
        if not (args.budget_hours or args.budget_tokens or args.budget_share):
            raise ValueError(
                "there is nothing to compare. Name presets (skyladder compare 1b-8k 1b-32k), or "
                "give --preset 1b-8k --schedule linear sinusoidal."
            )
        yield args.preset or "run", None, {}


def _combinations(
    args: argparse.Namespace, kind: type[WindowSchedule]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (what tells a row from others, flags to set) for each combination of swept values.

    A value that the schedule has no use for is left out, so that it has no rows that are equal.
    """
    growth: list[tuple[str, dict[str, Any]]] = [
        (f" {alpha}", {"skyladder_alpha": alpha, "skyladder_expand_fraction": None})
        for alpha in args.alpha or []
    ]
    growth += [
        (f" {float(100 * share):g}%", {"skyladder_expand_fraction": share, "skyladder_alpha": None})
        for share in args.share or []
    ]
    starts = [
        (f" from {start}", {"skyladder_start_window": start}) for start in args.start_window or []
    ]
    rounds = [(f" by {each}", {"skyladder_round_to": each}) for each in args.round_to or []]
    uses = kind.settings().keys() - kind.without_effect(settings_of(args))
    swept = [
        values
        for name, values in (("alpha", growth), ("start_window", starts), ("round_to", rounds))
        if values and name in uses
    ]
    for chosen in itertools.product(*swept):
        changes = {name: value for _, flags in chosen for name, value in flags.items()}
        yield "".join(label for label, _ in chosen), changes


def _flags_of_other_rows(kind: type[WindowSchedule]) -> dict[str, Any]:
    """Return, as not given, what another schedule cannot do without: it was given for its row."""
    others = {name for other in SCHEDULES.values() for name in other.required()}
    return {name_of(name): None for name in others - kind.settings().keys()}


# --- budgets ------------------------------------------------------------------------------------


def make_fits(args: argparse.Namespace, plans: list[Plan]) -> list[tuple[str, Fit | None]]:
    """Return (what was asked, the run that fits it); the paper's 64 % is the default share.

    The runs are of the first plan whose schedule has a rate. What was asked names the schedule,
    unless it is the default one.

    Raises:
        ValueError: a budget is out of range, or hours were given without a time model.
    """
    plan = next((p for p in plans if p.config.schedule.has_rate() and p.steps_ahead), None)
    if plan is None:
        return []
    share = args.budget_share or estimate.RECOMMENDED_SHARES[1]
    if share > 1:
        raise ValueError(f"--budget-share={float(share):g} is above 1. Give a share such as 0.64.")
    if args.budget_tokens:
        steps = args.budget_tokens // plan.batch_tokens
        if not steps:
            raise ValueError(
                f"--budget-tokens={args.budget_tokens:,} is less than a batch of "
                f"{plan.batch_tokens:,} tokens. Give more."
            )
        plan = replace(plan, total_steps=steps)
    if not plan.steps_ahead:
        begin = plan.config.begin_steps * plan.batch_tokens
        raise ValueError(
            f"--budget-tokens={args.budget_tokens:,}: the schedule begins after {amount(begin)} "
            "tokens (--skyladder-begin-samples). Give more."
        )
    name = plan.config.schedule.schedule
    is_default = name == DEFAULT_SCHEDULE
    grows = f"{'growing' if is_default else name} over {float(share):.0%}"
    fits: list[tuple[str, Fit | None]] = [
        (f"{amount(plan.tokens)} tokens, {grows}", budget.fit_share(plan, share))
    ]
    hours = args.budget_hours
    if hours is not None:
        fits.append((f"{hours:g} hours, {grows}", budget.fit_hours(plan, share, hours)))
        asked = f"{amount(plan.tokens)} tokens in {hours:g} hours"
        asked += "" if is_default else f", {name}"
        fits.append((asked, budget.fit_tokens_and_hours(plan, hours)))
    return fits


# --- output -------------------------------------------------------------------------------------


def to_json(
    plans: list[Plan], fits: list[tuple[str, Fit | None]], *, with_evidence: bool = False
) -> dict[str, Any]:
    """Return the comparison as one JSON object."""
    found = {plan.name: nearest(plan) for plan in plans} if with_evidence else {}
    measured = {
        name: [{"kind": each.kind, "found": each.found, "of": each.run, "source": each.source}
               for each in records]
        for name, records in found.items()
    }  # fmt: skip
    return {
        **({"evidence": measured} if with_evidence else {}),
        "schedules": [_plan_json(plan) for plan in plans],
        "budgets": [{"asked": asked, "fit": _fit_json(fit)} for asked, fit in fits],
        "notes": _notes(plans),
    }


def _plan_json(plan: Plan) -> dict[str, Any]:
    result = to_plan_json(plan, list(estimate.stage_steps(plan)))
    del result["notes"]
    return {"name": plan.name, "finishes": plan.finishes, **result}


def _fit_json(fit: Fit | None) -> dict[str, Any] | None:
    if fit is None:
        return None
    return {**fit._asdict(), "share": float(fit.share), "alpha": float(fit.alpha)}


def _notes(plans: list[Plan]) -> list[str]:
    found = verdict.fit(plans[0].pasted)
    notes = [] if found.fits else [str(found)]
    notes += verdict.noted(plans[0].pasted.findings)
    notes += [
        f"The model is not counted: {plan.not_counted}." for plan in plans if plan.not_counted
    ]
    return list(dict.fromkeys([*notes, *(note for plan in plans for note in plan.notes)]))


def to_text(
    plans: list[Plan],
    fits: list[tuple[str, Fit | None]],
    *,
    details: bool = False,
    with_evidence: bool = False,
) -> str:
    """Return the comparison as text."""
    parts = [_table(plans)]
    if with_evidence:
        parts.append(_evidence(plans))
    parts += [paragraph("Time", f"on {plan.time.basis}") for plan in plans[:1] if plan.time]
    if fits:
        parts.append(_fit_table(plans, fits))
    notes = _notes(plans)
    if details:
        notes += [*verdict.harmless(plans[0].pasted.findings), *verdict.left_out(plans[0].pasted)]
    parts += [paragraph("Note", note) for note in notes]
    return "\n\n".join(parts)


def _table(plans: list[Plan]) -> str:
    timed = plans[0].time is not None
    header = ["schedule", "window", "full from", "attention", "FLOPs", "saved"]
    if timed:
        header += [_hours_unit(plans[0]), "saved"]
    rows, marked = [header], []
    for plan in plans:
        if not plan.finishes:
            marked.append(len(rows))
        row = [
            plan.name,
            f"{plan.window(0):,} to {plan.window(plan.total_steps - 1):,}",
            _full_from(plan),
            f"{plan.mean_fraction:.1%}",
            scientific(plan.ladder_flops) if plan.shape else "?",
            f"{1 - plan.ladder_flops / plan.constant_flops:.1%}" if plan.shape else "?",
        ]
        if plan.time:
            constant, ladder = plan.timed_fractions
            hours = plan.time.gpu_hours(plan.total_steps, ladder) / (plan.time.gpus or 1)
            row += [f"{hours:,.4g}", f"{plan.time.step.saved(ladder, constant):.1%}"]
        rows.append(row)
    legend = (
        "full from: share of the run after which the window stays at the sequence's length; "
        "attention: mean work relative to full causal; saved: against a constant window"
    )
    if marked:
        legend += (
            f"; {UNFINISHED}: the schedule is longer than the run, which training refuses unless "
            "--skyladder-allow-unfinished is given"
        )
    return table(rows, left=1, marked=marked) + "\n" + remark(legend)


def _full_from(plan: Plan) -> str:
    if not plan.finishes:
        return UNFINISHED
    return "never" if plan.full_step is None else f"{plan.full_step / plan.total_steps:.0%}"


def _evidence(plans: list[Plan]) -> str:
    """Return what the paper measured nearest to each row, rows of the same together."""
    rows: dict[tuple[Measured, ...], list[str]] = {}
    for plan in plans:
        if found := nearest(plan):
            rows.setdefault(tuple(found), []).append(plan.name)
    parts = ["What the paper measured nearest to each row:"]
    for records, names in rows.items():
        parts.append(styled(", ".join(names), NAME))
        parts += [paragraph(f"  {each.kind}", f"{each.found} ({each.run})", 18) for each in records]
    return "\n".join(parts)


def _hours_unit(plan: Plan) -> str:
    assert plan.time is not None
    return "hours" if plan.time.gpus else plan.time.unit


def _fit_table(plans: list[Plan], fits: list[tuple[str, Fit | None]]) -> str:
    timed = plans[0].time is not None
    rows = [["budget", "share", "alpha", "steps", "tokens"]]
    if timed:
        rows[0].append(_hours_unit(plans[0]))
    marked = [place for place, (_, fit) in enumerate(fits, start=1) if fit is None]
    for asked, fit in fits:
        if fit is None:
            rows.append([asked, "does not fit", *[""] * (len(rows[0]) - 2)])
            continue
        row = [asked, f"{float(fit.share):.0%}", f"{float(fit.alpha):.4g}"]
        row += [f"{fit.steps:,}", amount(fit.tokens)]
        if fit.hours is not None:
            row.append(f"{fit.hours:,.4g}")
        rows.append(row)
    advice = (
        "share: --skyladder-expand-fraction, or alpha: --skyladder-alpha, tokens per step. The "
        "paper found growth over 60 to 64 % of the tokens best, whatever the budget; a longer "
        "growth saves more time and leaves less at full length."
    )
    return table(rows, left=1, marked=marked) + "\n" + remark(advice)
