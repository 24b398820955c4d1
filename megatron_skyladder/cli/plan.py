"""``skyladder plan``: what a schedule does to windows, work, time and cost, before the launch."""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from typing import Any

from megatron_skyladder.ladder.sequence_layout import Kind
from megatron_skyladder.planning import estimate, pasted, run_flags, stage_plan, verdict
from megatron_skyladder.planning.devices import list_devices
from megatron_skyladder.planning.estimate import Plan
from megatron_skyladder.planning.parallel import kept_bytes, layout_kind, parallel_costs
from megatron_skyladder.planning.text import to_text, verdict_lines


def add_parser(subparsers: Any, help_text: str) -> argparse.ArgumentParser:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "plan",
        help=help_text,
        usage="skyladder plan [--preset NAME | --from-script FILE | torchrun ... pretrain_gpt.py] "
        "[Megatron's flags]\n                      [--skyladder-*] [options]",
        formatter_class=run_flags.HelpFormatter,
        description=textwrap.dedent("""\
            Say in three lines whether SkyLadder fits a run, what it saves, and what to add. Paste
            the command that starts training, or name the script that has it: nothing in it is
            run. With -v also the window at every stage, attention work and FLOPs with and without
            the ladder, hours and cost.

            examples:
              skyladder plan torchrun --nproc-per-node 8 pretrain_gpt.py --num-layers 24 ...
              skyladder plan --from-script train.sh --device h100 --price-per-gpu-hour 2.50
              skyladder plan --preset 1b-8k
              skyladder plan --preset 1b-8k --at 0,8,64000 --json
              skyladder plan --preset 1b-32k --device a100-40g --gpus 8 --price-per-gpu-hour 1.5
              skyladder plan --preset 1b-8k --skyladder-intra-document --data-path cc_text_document
              skyladder plan --num-layers 12 ... --train-iters 1000 --calibrate run.log"""),
    )
    parser.add_argument("--at", type=_steps, metavar="STEPS", help="steps to show, such as 0,8,64")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", metavar="FILE", help="draw windows and work: FILE.png or .svg")
    parser.add_argument("-v", "--verbose", action="store_true", help="show all figures")
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
    plan = estimate.make_plan(args, name=args.preset or "run")
    steps = args.at if args.at is not None else list(estimate.stage_steps(plan))
    if max(steps) >= plan.total_steps:
        plan.notes.append(f"Step {max(steps):,} lies behind the end of the run.")
    if args.plot:
        from megatron_skyladder.planning import plots

        plots.draw_plans(args.plot, [plan])
    if args.json:
        print(json.dumps(to_json(plan, steps), indent=2))
    else:
        print(to_text(plan, args.at, details=args.verbose))
    return 0


def _steps(text: str) -> list[int]:
    try:
        steps = [int(part) for part in text.split(",")]
    except ValueError:
        steps = [-1]
    if min(steps) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of steps such as 0,8,64000")
    return steps


def to_json(plan: Plan, steps: list[int]) -> dict[str, Any]:
    """Return the plan as one JSON object; shares are 0 to 1, percentages are named so."""
    result: dict[str, Any] = {
        "verdict": _verdict_json(plan),
        "windows": {str(step): plan.window(step) for step in steps},
        "flops": _flops_json(plan),
        "schedule": plan.config.fingerprint,
        "parameters": plan.shape and plan.shape.num_parameters,
        "active_parameters": plan.shape and plan.shape.active_parameters,
        "steps": plan.total_steps,
        "tokens": plan.tokens,
        "full_window": None,
        "attention_fraction": plan.mean_fraction,
        "notes": [
            *verdict.noted(plan.pasted.findings),
            *plan.notes,
            *verdict.harmless(plan.pasted.findings),
            *verdict.left_out(plan.pasted),
        ],
    }
    if plan.config.local_schedule is not None:
        result["local_windows"] = {str(step): plan.local_window(step) for step in steps}
    if plan.full_step is not None:
        tokens = plan.full_step * plan.batch_tokens
        result["full_window"] = {"step": plan.full_step, "tokens": tokens}
    if plan.config.schedule.moves():
        result["stages"] = [
            {**dataclasses.asdict(row), "values": dataclasses.asdict(row.values)}
            for row in stage_plan.rows(plan.config, plan.total_steps)
        ]
    if plan.config.batches is not None:
        result["step_batch_size_schedule"] = plan.config.batches.flag(plan.config.seq_length)
    if plan.documents:
        result["documents"] = _documents_json(plan)
    if plan.time:
        result["time"] = _time_json(plan)
    if plan.context_parallel_size > 1:
        result["context_parallel"] = _context_parallel_json(plan, steps)
    return result


def _verdict_json(plan: Plan) -> dict[str, Any]:
    found = verdict.fit(plan.pasted, plan.stage_batches)
    return {
        "fits": found.fits,
        "add": list(found.add),
        "change": list(found.change),
        "start": found.start or None,
        "lines": verdict_lines(plan),
    }


def _flops_json(plan: Plan) -> dict[str, float] | None:
    if plan.shape is None:
        return None
    return {
        "constant": plan.constant_flops,
        "ladder": plan.ladder_flops,
        "saved_percent": 100 * (1 - plan.ladder_flops / plan.constant_flops),
    }


def _context_parallel_json(plan: Plan, steps: list[int]) -> dict[str, Any]:
    stages = {}
    for step in steps:
        windows = plan.window(step), plan.local_window(step)
        stage = parallel_costs(plan, *windows)
        zigzag = parallel_costs(plan, *windows, kind=Kind.ZIGZAG)
        stages[str(step)] = {
            "work_of_ranks": stage.work,
            "work_max_over_mean": stage.max_over_mean,
            "waiting_share": stage.waiting_share,
            "received_bytes_per_layer_and_row": stage.received_bytes,
            "share_of_all_gather": stage.gather_share,
            "zigzag_work_max_over_mean": zigzag.max_over_mean,
            "zigzag_share_of_all_gather": zigzag.gather_share,
        }
    return {
        "size": plan.context_parallel_size,
        "layout": layout_kind(plan).value,
        "work_max_over_mean": plan.busiest_over_mean,
        "kept_bytes_per_sequence": kept_bytes(plan),
        "stages": stages,
    }


def _documents_json(plan: Plan) -> dict[str, Any]:
    documents = plan.documents
    assert documents is not None
    work = {
        f"{'ladder' if ladder else 'constant'}_{'documents' if masked else 'causal'}": {
            "visible_context": float(pairs / plan.config.seq_length),
            "attention_fraction": float(pairs / plan.causal_pairs),
            "flops": plan.flops(pairs) if plan.shape else None,
        }
        for ladder, masked, pairs in estimate.work_under_masks(plan)
    }
    return {
        "documents": documents.num_documents,
        "tokens": documents.num_tokens,
        "length_quantiles": {
            f"{share:g}": int(documents.lengths[round(share * (documents.lengths.size - 1))])
            for share in estimate.QUANTILES
        },
        "visible_context_quantiles": {
            f"{share:g}": documents.rows.context_quantile(share) for share in estimate.QUANTILES
        },
        "work": work,
    }


def _time_json(plan: Plan) -> dict[str, Any]:
    time = plan.time
    assert time is not None
    constant, ladder = plan.timed_fractions
    low, high = time.saved_range(ladder, constant)
    result: dict[str, Any] = {"basis": time.basis, "gpus": time.gpus}
    for name, fraction in (("constant", constant), ("ladder", ladder)):
        gpu_hours = time.gpu_hours(plan.total_steps, fraction)
        result[name] = {"gpu_hours" if time.has_gpu_hours else "hours": gpu_hours}
        if time.gpus:
            result[name]["hours"] = gpu_hours / time.gpus
        if time.price:
            result[name]["cost"] = gpu_hours * time.price
    result["saved_percent"] = 100 * time.step.saved(ladder, constant)
    result["saved_percent_range"] = [100 * low, 100 * high]
    if time.calibration:
        result["step_seconds"] = {
            "fixed": time.step.fixed,
            "attention_at_full_window": time.step.attention,
            "spread": time.calibration.spread,
        }
    return result
