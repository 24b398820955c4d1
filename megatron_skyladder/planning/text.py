"""A plan as text for a terminal."""

from __future__ import annotations

from dataclasses import replace

from megatron_skyladder.ladder.schedules.base import POWERS_OF_TWO
from megatron_skyladder.ladder.sequence_layout import Kind
from megatron_skyladder.planning import estimate, stage_plan, verdict
from megatron_skyladder.planning.estimate import Plan
from megatron_skyladder.planning.evidence import PAPER_SAVINGS
from megatron_skyladder.planning.parallel import kept_bytes, layout_kind, parallel_costs
from megatron_skyladder.terminal import GOOD, HEAD, MARKED, NAME, led, paragraph, remark, table


def to_text(plan: Plan, steps: list[int] | None, *, details: bool) -> str:
    """Return the plan as text: the verdict in three lines, and what was asked for behind it.

    Args:
        plan: of a run.
        steps: to show; None: those of the plan's stages, with the details only.
        details: whether to show everything, in at most WIDTH columns.
    """
    findings = plan.pasted.findings
    fits = verdict.fit(plan.pasted, plan.stage_batches).fits
    styles = [GOOD if fits else MARKED, HEAD, HEAD]
    lines = [led(line, style) for line, style in zip(verdict_lines(plan), styles, strict=True)]
    parts = ["\n".join(lines), led(f"{'Schedule':13}{plan.config.fingerprint}", NAME)]
    if plan.config.schedule.moves():
        parts.append(_moving_stages(plan))
    shown = steps if steps is not None else list(estimate.stage_steps(plan))
    if details:
        parts += [_head(plan), _stage_table(plan, shown)]
        parts += [_work(plan), _documents(plan), _context_parallel(plan, shown)]
        parts += [_time(plan), _advice(plan)]
    elif steps is not None:
        parts.append(_stage_table(plan, steps))
    notes = [*verdict.noted(findings), *plan.notes]
    if details:
        notes += [*verdict.harmless(findings), *verdict.left_out(plan.pasted)]
    parts += [paragraph("Note", note) for note in dict.fromkeys(notes)]
    return "\n\n".join(part for part in parts if part)


def verdict_lines(plan: Plan) -> list[str]:
    """Return the verdict: does it fit, what does it save, what is next."""
    found = verdict.fit(plan.pasted, plan.stage_batches)
    return [str(found), f"Saves {saves(plan)}", f"Next: {_next(plan, found)}"]


def saves(plan: Plan) -> str:
    """Return what the ladder saves, in the units that are known."""
    if plan.shape is None and plan.time is None:
        work = 1 - plan.mean_fraction / plan.constant_fraction
        return f"{percent(work)} of the attention work (FLOPs and time: {plan.not_counted})"
    if plan.time is None:
        saved = 1 - plan.ladder_flops / plan.constant_flops
        return (
            f"{percent(saved)} of the FLOPs (for the time give --device, --tflops or --calibrate)"
        )
    time = plan.time
    constant, ladder = plan.timed_fractions
    share = percent(time.step.saved(ladder, constant))
    low, high = time.saved_range(ladder, constant)
    text = f"{share} of the time ({100 * low:.1f} to {percent(high)}"
    even = percent(time.step.saved(plan.mean_fraction, plan.constant_fraction))
    if even != share:
        text += f"; {even} if all context-parallel ranks had the same work"
    text += ")"
    gpus = time.gpus or 1
    before = time.gpu_hours(plan.total_steps, constant)
    saved = before - time.gpu_hours(plan.total_steps, ladder)
    unit = f"{plan.device}-hours" if plan.device else time.unit
    if time.gpus:
        unit = f"hours on {gpus} {plan.device or ('GPU' if gpus == 1 else 'GPUs')}"
    text += f", {hours(saved / gpus)} of {hours(before / gpus)} {unit}"
    if time.price:
        text += f", about ${saved * time.price:,.0f} at {time.price:.2f}"
    return f"{text}; predicted from {time.basis}"


def percent(share: float) -> str:
    """Write a share as people read it: 15.3 %."""
    return f"{100 * share:.1f} %"


def hours(value: float) -> str:
    """Write hours to about three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _next(plan: Plan, found: verdict.Fit) -> str:
    launch = plan.pasted.launch
    if not found.fits:
        return "make these changes and plan again; skyladder doctor with the same launch checks all"
    if plan.shape is None and plan.time is None:
        return f"{plan.not_counted.rpartition(': ')[2]} to count FLOPs and time; -v shows windows"
    if not plan.pasted.is_launch:
        return "skyladder example prints the flags of this run; -v shows the figures"
    source = f"--from-script {launch.source}" if launch.source else "with the same launch"
    return f"skyladder doctor {source} where the run is to start; -v shows the figures"


def amount(value: float) -> str:
    """Write a count with a unit: 104.9B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:,.0f}"


def _head(plan: Plan) -> str:
    config = plan.config
    full = "not reached within the run"
    if plan.full_step is not None:
        tokens = plan.full_step * plan.batch_tokens
        full = (
            f"from step {plan.full_step:,}, after {amount(tokens)} tokens "
            f"({plan.full_step / plan.total_steps:.0%} of the run)"
        )
    return "\n".join(
        [
            paragraph("Model", _model(plan)),
            paragraph(
                "Run",
                f"{plan.total_steps:,} steps of {config.step_samples} sequences of "
                f"{config.seq_length:,} tokens: {amount(plan.tokens)} tokens",
            ),
            paragraph("Full window", full),
        ]
    )


def _model(plan: Plan) -> str:
    shape = plan.shape
    if shape is None:
        return f"not counted: {plan.not_counted}"
    layers = f"{shape.num_layers} layers"
    if shape.mamba or shape.num_mlp_layers is not None:
        layers = f"{shape.num_layers} attention layers"
        layers += f", {shape.num_mlp_layers} MLPs" if shape.num_mlp_layers else ""
        layers += f", {shape.mamba.num_layers} Mamba layers" if shape.mamba else ""
    text = f"{shape.num_parameters:,} parameters"
    if shape.experts:
        experts = shape.experts
        text += f", {shape.active_parameters:,} of them active"
        layers += (
            f", {experts.num_layers} with {experts.num_experts} experts of "
            f"{experts.ffn_hidden_size}, {experts.topk} for each token"
        )
    return (
        f"{text}: {layers}, hidden {shape.hidden_size}, FFN {shape.ffn_hidden_size}, "
        f"{shape.num_attention_heads} heads in {shape.num_query_groups} groups, vocabulary "
        f"{shape.vocab_size:,} (padded)"
    )


def _stage_table(plan: Plan, steps: list[int]) -> str:
    header = ["step", "tokens", "window", "visible context", "attention work"]
    two = plan.config.local_schedule is not None
    if two:
        header.insert(3, "local layers")
    if plan.time:
        header.append("s/step")
    rows = [header]
    for step in steps:
        row = [
            f"{step:,}",
            amount(step * plan.batch_tokens),
            f"{plan.window(step):,}",
            f"{plan.context_at(step):,.1f}",
            f"{plan.fraction_at(step):.1%}",
        ]
        if two:
            row.insert(3, f"{plan.local_window(step):,}")
        if plan.time:
            # exact, where `timed_fraction_at` interpolates between samples of the run
            over_mean = plan.over_mean(plan.window(step), plan.local_window(step))
            row.append(_seconds(plan.time.step.seconds(plan.fraction_at(step) * over_mean)))
        rows.append(row)
    legend = (
        "visible context: tokens that a token sees on average, itself included; attention work: "
        "relative to the full causal mask"
    )
    if two:
        legend += "; local layers: tokens that one of their queries sees at most"
    if plan.time and plan.context_parallel_size > 1:
        legend += "; s/step: of the busiest context-parallel rank"
    return table(rows) + "\n" + remark(legend)


def _moving_stages(plan: Plan) -> str:
    """Return the stages with all that they set."""
    moves = plan.config.schedule.moves()
    own = ["the model's" if name in moves else "" for name in ("rope", "yarn")]
    lines = [["from sample", "tokens", "window", "batch", "lr factor", "RoPE base", "YaRN factor"]]
    for row in stage_plan.rows(plan.config, plan.total_steps):
        window = f"{row.first_window:,}"
        if row.last_window != row.first_window:
            window += f" -> {row.last_window:,}"
        values = row.values
        rate = "" if values.rate_factor is None else f"{values.rate_factor:.4g}"
        yarn = own[1] if values.yarn is None else f"{values.yarn:.4g}"
        rest = [values.batch or "", rate, values.rope or own[0], yarn]
        lines.append([f"{row.samples:,}", amount(row.tokens), window, *map(str, rest)])
    used = [index for index in range(len(lines[0])) if any(line[index] for line in lines[1:])]
    return table([[line[index] for index in used] for line in lines])


def _seconds(value: float) -> str:
    return f"{value:.4f}" if value < 1 else f"{value:.2f}"


def _work(plan: Plan) -> str:
    attention = paragraph(
        "Attention", f"{plan.mean_fraction:.1%} of full causal, mean over the run"
    )
    if plan.shape is None:
        return attention
    masked = ", documents masked" if plan.counts_documents else ""
    saved = 1 - plan.ladder_flops / plan.constant_flops
    return "\n".join(
        [
            attention,
            paragraph(
                "FLOPs",
                f"{scientific(plan.constant_flops)} with a constant window{masked}, "
                f"{scientific(plan.ladder_flops)} with the ladder: {saved:.1%} saved",
            ),
            paragraph(
                "",
                "(6 N + 12 layers hidden S) tokens as in the paper's Table 8: N all (active) "
                "parameters above, S = mean of sum(l^2) / L over the windows l of a sequence",
            ),
        ]
    )


def scientific(value: float) -> str:
    """Write 1.157e21 as 11.57e20, the paper's unit, and smaller ones to four digits."""
    return f"{value / 1e20:.2f}e20" if value >= 1e20 else f"{value:.3e}"


def _documents(plan: Plan) -> str:
    documents = plan.documents
    if documents is None:
        return ""
    lengths = documents.lengths
    spread = ", ".join(
        f"{share:.0%} up to {lengths[round(share * (lengths.size - 1))]:,}"
        for share in estimate.QUANTILES
    )
    seen = ", ".join(
        f"{share:.0%} up to {documents.rows.context_quantile(share):,}"
        for share in estimate.QUANTILES
    )
    rows = [["window", "documents", "visible context", "attention work", "FLOPs"]]
    for ladder, masked, pairs in estimate.work_under_masks(plan):
        rows.append(
            [
                "ladder" if ladder else "full",
                "masked" if masked else "joined",
                f"{float(pairs / plan.config.seq_length):,.1f}",
                f"{float(pairs / plan.causal_pairs):.1%}",
                scientific(plan.flops(pairs)) if plan.shape else "?",
            ]
        )
    return "\n".join(
        [
            paragraph(
                "Documents",
                f"{documents.num_documents:,} with {amount(documents.num_tokens)} tokens; "
                f"length: {spread}, longest {documents.longest:,}",
            ),
            paragraph("", f"a token sees, with documents masked and the full window: {seen}"),
            table(rows),
        ]
    )


_SHARED_BY = {
    Kind.ZIGZAG: "in Megatron's zigzag",
    Kind.WINDOW: "balanced by the window",
    Kind.SEQUENCE: "balanced by the window and the documents",
}


def _context_parallel(plan: Plan, steps: list[int]) -> str:
    if plan.context_parallel_size == 1:
        return ""
    zigzag = layout_kind(plan) is Kind.ZIGZAG
    rows = [
        ["step", "window", "max / mean work", "waits", "MB per layer and sequence", "of gather"]
    ]
    if not zigzag:
        rows[0].insert(3, "in zigzag")
    for step in steps:
        windows = plan.window(step), plan.local_window(step)
        costs = parallel_costs(plan, *windows)
        rows.append(
            [
                f"{step:,}",
                f"{windows[0]:,}",
                f"{costs.max_over_mean:.3f}",
                f"{costs.waiting_share:.1%}",
                "?" if costs.received_bytes is None else f"{costs.received_bytes / 1e6:,.3f}",
                f"{costs.gather_share:.2%}",
            ]
        )
        if not zigzag:
            in_zigzag = parallel_costs(plan, *windows, kind=Kind.ZIGZAG)
            rows[-1].insert(3, f"{in_zigzag.max_over_mean:.3f}")
    legend = (
        "max / mean work: attention work of the busiest rank over the mean; waits: share of the "
        "work that sees keys of another rank, the rest is done while they travel; MB: keys, values "
        "and gradients that a rank receives in bf16; of gather: relative to gathering all keys"
    )
    head = paragraph(
        "CP",
        f"{plan.context_parallel_size} ranks share a sequence, {_SHARED_BY[layout_kind(plan)]}; "
        f"over the run the busiest has {plan.busiest_over_mean - 1:.1%} more attention work than "
        f"the mean{_rounded_otherwise(plan) if zigzag else ''}",
    )
    return "\n".join([head, table(rows), remark(legend), *_kept_keys(plan)])


def _rounded_otherwise(plan: Plan) -> str:
    """Return what zigzag's busiest rank has on powers of two, or without them where they are."""
    schedule = plan.config.schedule
    if "round_to" not in schedule.uses or plan.config.local_schedule is not None:
        return ""
    given = schedule.round_to == POWERS_OF_TWO
    other = replace(schedule, round_to=None if given else POWERS_OF_TWO)
    of_other = replace(plan, config=replace(plan.config, schedule=other))
    return (
        f"; {'without' if given else 'with'} --skyladder-round-to {POWERS_OF_TWO}, another "
        f"schedule, {of_other.busiest_over_mean - 1:.1%}"
    )


def _kept_keys(plan: Plan) -> list[str]:
    size = kept_bytes(plan)
    if not size:
        return []
    return [
        paragraph(
            "Memory",
            f"at a window of {plan.longest_window:,}, keys and values of other ranks take up to "
            f"{size / 1e9:.3g} GB in bf16 for each sequence of a micro-batch, until its backward "
            "pass; --recompute-granularity selective --recompute-modules core_attn fetches them "
            "again instead",
        )
    ]


def _time(plan: Plan) -> str:
    time = plan.time
    if time is None:
        return paragraph("Time", "give --device (with --gpus), --tflops or --calibrate LOG")
    constant, ladder = plan.timed_fractions
    low, high = time.saved_range(ladder, constant)
    lines = [paragraph("Time", f"on {time.basis}")]
    for name, fraction in (("constant", constant), ("ladder", ladder)):
        gpu_hours = time.gpu_hours(plan.total_steps, fraction)
        text = f"{name:9}{gpu_hours:,.4g} {time.unit}"
        if time.gpus:
            text += (
                f", {gpu_hours / time.gpus:,.4g} hours on {time.gpus} GPU{'s' * (time.gpus > 1)}"
            )
        if time.price:
            text += f", costs {gpu_hours * time.price:,.0f}"
        lines.append(paragraph("", text))
    saved = time.step.saved(ladder, constant)
    lines.append(paragraph("", f"saved    {saved:.1%} of the time ({low:.1%} to {high:.1%})"))
    if time.calibration:
        lines.append(
            paragraph(
                "",
                f"a step takes {time.step.fixed:.4g} s + {time.step.attention:.4g} s x attention "
                "work; the range is two standard errors",
            )
        )
    return "\n".join(lines + _paper_comparison(plan, saved))


def _paper_comparison(plan: Plan, saved: float) -> list[str]:
    assert plan.time is not None
    measured = PAPER_SAVINGS.get(plan.name)
    if measured is None or plan.time.calibration or not plan.is_the_papers:
        return []
    return [
        paragraph(
            "",
            f"The paper measured {measured:.1f} % on A100-40G; this model says {saved:.1%}. FLOPs "
            "alone overstate the saving, as causal kernels skip half of each window; attention "
            "runs below the rate of matrix products, which works the other way. One relative "
            "cost of attention cannot give both of the paper's runs (1b-8k 13.1 %, 1b-32k "
            "22.2 %): the model is fitted to both, and its range is what either would need.",
        )
    ]


def _advice(plan: Plan) -> str:
    schedule = plan.config.schedule
    begin, ahead = plan.config.begin_steps, plan.steps_ahead
    if not schedule.has_rate() or plan.full_step is None or not ahead:
        return ""
    share = schedule.ramp_steps / ahead
    low, high = estimate.RECOMMENDED_SHARES
    steps = f"{ahead:,} steps from step {begin:,} on" if begin else "run"
    advice = (
        f"the window grows over {float(share):.0%} of the {steps}; the paper found 60 to 64 % best"
    )
    if not 0.95 * low <= share <= 1.05 * high:
        alpha = estimate.alpha_for_share(schedule, ahead, high)
        advice += f": --skyladder-expand-fraction={float(high):g}, or alpha {float(alpha):.4g}"
    return paragraph("Advice", advice)
