"""From flags to figures: what ``plan`` prints and ``compare`` puts side by side."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

from megatron_skyladder.ladder import costs
from megatron_skyladder.ladder.alignment import explain_multiple
from megatron_skyladder.ladder.config import DEFAULT_SCHEDULE, ROUND_TO_AUTO, SkyLadderConfig
from megatron_skyladder.ladder.costs import DecoderShape
from megatron_skyladder.ladder.flags import config_from_args
from megatron_skyladder.ladder.fragments import window_pairs
from megatron_skyladder.ladder.presets import PAPER_RUNS, SCHEDULE_PRESETS
from megatron_skyladder.ladder.schedules import WindowSchedule
from megatron_skyladder.planning import model_flags, run_flags, stage_plan, tokenizer_check
from megatron_skyladder.planning.files_read import FilesRead
from megatron_skyladder.planning.parallel import BusiestRank, busiest_rank, parallel_costs
from megatron_skyladder.planning.pasted import Pasted
from megatron_skyladder.planning.time_model import TimeModel, time_model
from megatron_skyladder.planning.training_data import TrainingData, training_data
from megatron_skyladder.planning.visible_context import Documents

RECOMMENDED_SHARES = (Fraction(60, 100), Fraction(64, 100))  # arXiv:2503.15450
QUANTILES = (0.1, 0.5, 0.9, 0.99)  # of document lengths and visible context


@dataclass(frozen=True)
class Plan:
    """A run that has not happened yet.

    Args:
        name: what to call it in a table.
        config: the schedule and the masks.
        shape: the model, or None where it cannot be counted: then there are windows only.
        total_steps: global batches.
        documents: what was measured in the data, or None.
        time: the time model, or None where no device and no log was given.
        notes: what the reader has to know about the figures.
        context_parallel_size: ranks that share a sequence.
        tensor_parallel_size: ranks that share the heads.
        pasted: the launch that it was made from.
        not_counted: why the model has no shape.
        device: the GPU's name, or an empty string.
        stage_batches: the value of --step-batch-size-schedule that stages ask for and the launch
            lacks, or an empty string.
    """

    name: str
    config: SkyLadderConfig
    shape: DecoderShape | None
    total_steps: int
    documents: Documents | None
    time: TimeModel | None
    notes: list[str] = field(default_factory=list)
    context_parallel_size: int = 1
    tensor_parallel_size: int = 1
    pasted: Pasted = field(default_factory=Pasted)
    not_counted: str = ""
    device: str = ""
    stage_batches: str = ""

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """Runs of equal windows, ``(first_step, end_step, window)``."""
        return costs.window_runs(self.config, self.total_steps)

    @cached_property
    def layer_runs(self) -> list[tuple[int, ...]]:
        """The same for all layers: with what local ones see, see `costs.layer_runs`."""
        return costs.layer_runs(self.config, self.total_steps)

    @cached_property
    def pairs(self) -> Callable[..., Any]:
        """Windows -> visible pairs of a sequence, under the masks that can be counted.

        Takes the ladder's window and what local layers see, None or left out for all of their own;
        int64 arrays as well.
        """
        if not self.counts_documents:
            return costs.grid_pairs(self.config)
        assert self.documents is not None
        windows = [run[2] for run in self.layer_runs]
        two = self.config.local_schedule is not None
        return self.documents.rows.pairs_by_window(
            windows if two else [*windows, self.config.seq_length],
            sliding=self.config.mask == "sliding",
            local_layers=self.config.local_layers,
            local_windows=[run[3] for run in self.layer_runs] if two else (),
        )

    @property
    def batch_tokens(self) -> int:
        """Tokens of a global batch."""
        return self.config.step_samples * self.config.seq_length

    @property
    def tokens(self) -> int:
        """Tokens of the run."""
        return self.total_steps * self.batch_tokens

    @property
    def causal_pairs(self) -> int:
        """Visible pairs of a sequence under the plain causal mask."""
        return window_pairs(self.config.seq_length, self.config.seq_length)

    @property
    def counts_documents(self) -> bool:
        """Whether the run's own work is counted with documents masked."""
        return self.config.intra_document and self.documents is not None

    @property
    def full_step(self) -> int | None:
        """The step from which the window stays at the sequence's length, or None."""
        first, _, window = self.runs[-1]
        return first if window == self.config.seq_length else None

    @property
    def steps_ahead(self) -> int:
        """Steps of the run from where the schedule begins, of which its shares are."""
        return max(0, self.total_steps - self.config.begin_steps)

    @property
    def finishes(self) -> bool:
        """Whether the schedule gets to its final window within the run."""
        return self.config.schedule.ramp_steps <= self.total_steps

    @property
    def longest_window(self) -> int:
        """The longest window of the run."""
        return max(window for _, _, window in self.runs)

    def window(self, step: int) -> int:
        """Return the window at a step."""
        return self.config.window_at_samples(step * self.config.step_samples)

    def local_window(self, step: int) -> int | None:
        """Return what a query of a local layer sees at most; None: no ladder of theirs decides."""
        if self.config.local_schedule is None:
            return None
        return self.config.local_window_at_samples(step * self.config.step_samples)

    def pairs_at(self, step: int) -> float:
        """Return the visible pairs of a sequence at a step; the mean where layers differ."""
        found: float = self.pairs(self.window(step), self.local_window(step))
        return found

    def context_at(self, step: int) -> float:
        """Return how many tokens a token sees on average, itself included."""
        return self.pairs_at(step) / self.config.seq_length

    def fraction_at(self, step: int) -> float:
        """Return attention work at a step, relative to full causal without documents."""
        return self.pairs_at(step) / self.causal_pairs

    @property
    def mean_fraction(self) -> float:
        """Attention work of the run, relative to full causal without documents."""
        return float(self.mean_pairs / self.causal_pairs)

    @property
    def constant_fraction(self) -> float:
        """The same without the ladder: 1, or less where documents are masked or layers local."""
        return float(self.pairs(self.config.seq_length) / self.causal_pairs)

    @cached_property
    def mean_pairs(self) -> Fraction | float:
        """Visible pairs of a sequence, averaged over the run."""
        return costs.mean_pairs(self.layer_runs, self.pairs)

    @cached_property
    def _busiest_rank(self) -> BusiestRank:
        return busiest_rank(self)

    @property
    def busiest_over_mean(self) -> float:
        """Attention work of the busiest context-parallel rank over the mean one's, of the run."""
        return 1.0 if self.context_parallel_size == 1 else self._busiest_rank.over_mean

    def over_mean(self, window: int, local_window: int | None = None) -> float:
        """Return the busiest rank's attention work over the mean one's at a window.

        Args:
            window: tokens.
            local_window: what a query of a local layer sees at most; None: all of its own window.
        """
        if self.context_parallel_size == 1:
            return 1.0
        return parallel_costs(self, window, local_window).max_over_mean

    def timed_fraction_at(self, step: int) -> float:
        """Return the attention work at a step that time goes by: the busiest rank's."""
        if self.context_parallel_size == 1:
            return self.fraction_at(step)
        return self.fraction_at(step) * self._busiest_rank.over_mean_at(step)

    @cached_property
    def timed_fractions(self) -> tuple[float, float]:
        """Attention work (without the ladder, with it) that time goes by: the busiest rank's."""
        constant, ladder = self.constant_fraction, self.mean_fraction
        return constant * self.over_mean(self.config.seq_length), ladder * self.busiest_over_mean

    def flops(self, pairs: Fraction | float) -> float:
        """Return the run's FLOPs, by the paper's count, for these mean pairs of a sequence."""
        assert self.shape is not None
        return costs.flops(
            self.shape, seq_length=self.config.seq_length, pairs=pairs, tokens=self.tokens
        )

    @property
    def constant_flops(self) -> float:
        """FLOPs of the run without the ladder."""
        return self.flops(self.pairs(self.config.seq_length))

    @property
    def ladder_flops(self) -> float:
        """FLOPs of the run."""
        return self.flops(self.mean_pairs)

    @property
    def is_the_papers(self) -> bool:
        """Whether this is a run of the paper, unchanged."""
        run = PAPER_RUNS.get(self.name)
        if run is None or self.total_steps != run.train_steps:
            return False
        schedule = WindowSchedule(
            "linear", run.start_window, run.seq_length, run.alpha, total_steps=run.train_steps
        )
        config = SkyLadderConfig(schedule, run.seq_length, run.global_batch_size)
        return self.config == config and self.shape == DecoderShape.of_paper(run.model)

    def pairs_under(self, *, ladder: bool, documents: bool) -> Fraction | float:
        """Return the mean pairs of a sequence with each mask on or off; needs documents."""
        assert self.documents is not None
        other = self
        if documents != self.config.intra_document:
            config = replace(self.config, intra_document=documents, require_documents=False)
            other = replace(self, config=config)
        return other.mean_pairs if ladder else other.pairs(self.config.seq_length)


def make_plan(
    args: argparse.Namespace,
    *,
    name: str,
    preset: str | None = None,
    files: FilesRead | None = None,
) -> Plan:
    """Return the plan for parsed flags.

    Args:
        args: what `run_flags.add_run_flags` parsed.
        name: for the first column of a table.
        preset: a run of the paper, in place of ``--preset``.
        files: what the plans before it have read.

    Raises:
        ValueError: a flag is wrong; the message says which and what to do.
    """
    pasted = getattr(args, "pasted", None) or Pasted()
    if args.gpus is None and pasted.launch.num_gpus is not None:
        args = argparse.Namespace(**{**vars(args), "gpus": pasted.launch.num_gpus})
    flags = run_flags.complete(args, preset)
    notes = list(pasted.notes)
    config = config_from_args(flags)
    if config is None:
        flags.skyladder_schedule = DEFAULT_SCHEDULE
        notes.append("No --skyladder-* flag was given: planned with the defaults, as above.")
        config = config_from_args(flags)
    assert config is not None
    shape, not_counted = _shape(flags, pasted, notes)
    files = files or FilesRead()
    documents = _documents(flags, config, pasted, notes, files)
    total_steps = run_flags.total_steps(flags)
    _note_layout(flags, notes)
    _note_final_window(config, notes)
    _note_beginning(config, run_flags.total_samples(flags), notes)
    notes += stage_plan.notes(config, flags.stage_batches)
    _note_local_layers(config, notes)
    plan = Plan(
        name,
        config,
        shape,
        total_steps,
        documents,
        None,
        notes,
        flags.context_parallel_size,
        flags.tensor_model_parallel_size,
        pasted,
        not_counted,
        flags.device or "",
        flags.stage_batches,
    )
    # ranks as unequal as in the plan: what `calibrate` fits, `timed_fractions` multiplies with
    over_mean = functools.cache(plan.over_mean)
    return replace(plan, time=time_model(flags, shape, config, notes, over_mean, files))


def _shape(
    flags: argparse.Namespace, pasted: Pasted, notes: list[str]
) -> tuple[DecoderShape | None, str]:
    """Return the model, or None and why it cannot be counted; windows do without one."""
    reasons = [str(each) for each in pasted.findings if each.rule.not_counted]
    if reasons:
        return None, reasons[0]
    try:
        return model_flags.decoder_shape(flags, notes), ""
    except model_flags.NotCountedError as error:
        return None, str(error)


def _note_layout(flags: argparse.Namespace, notes: list[str]) -> None:
    preset = SCHEDULE_PRESETS.get(flags.skyladder_preset or "")
    of_preset = preset.settings.get("round_to") if preset else None
    if (flags.skyladder_round_to or of_preset) == ROUND_TO_AUTO:
        notes.append(explain_multiple(flags.seq_length, flags.context_parallel_size))


def _note_final_window(config: SkyLadderConfig, notes: list[str]) -> None:
    final = config.schedule.final_window
    if final < config.seq_length:
        notes.append(
            f"The window ends at {final:,} of {config.seq_length:,} tokens, so the model never "
            "sees a whole sequence, and that is part of what is saved. For the full length give "
            f"--skyladder-final-window {config.seq_length}."
        )


def _note_beginning(config: SkyLadderConfig, total_samples: int, notes: list[str]) -> None:
    """Say what the steps before the schedule are taken for, where they could be others."""
    begin = config.begin_samples
    is_full = config.window_at_samples(0) == config.seq_length and config.local_schedule is None
    if begin and not is_full:
        notes.append(
            f"FLOPs, hours and savings count the first {begin:,} samples at the first window, as a "
            "run trains them that has these flags from its start. Where it began without SkyLadder "
            f"they are behind it: plan the rest alone, with --train-samples "
            f"{total_samples - begin} and without --skyladder-begin-samples."
        )


def _note_local_layers(config: SkyLadderConfig, notes: list[str]) -> None:
    local = config.local_layers
    if local is not None:
        notes.append(
            f"{local.num_local} of {local.num_layers} attention layers see {local.window:,} tokens "
            "at most (--window-size): attention work is the mean over all layers, relative to full "
            "causal attention in each."
        )
    if config.local_schedule is not None and local is not None:
        own = config.local_schedule
        notes.append(
            f"Their own window grows from {own.start_window:,} tokens to these {local.window:,} "
            f"over {float(own.ramp_steps):,.0f} steps (--skyladder-local-start-window); they see "
            "no more than the ladder's window either."
        )


def _documents(
    flags: argparse.Namespace,
    config: SkyLadderConfig,
    pasted: Pasted,
    notes: list[str],
    files: FilesRead,
) -> Documents | None:
    data = _training_data(flags, config, notes)
    if data is None:
        if config.intra_document:
            notes.append(
                "--skyladder-intra-document cuts attention further than counted here: give "
                "--data-path to measure the documents."
            )
        return None
    if not data.is_here and not config.intra_document:
        notes.append(f"{data} is not here: not measured.")
        return None
    documents = files.documents(data.blend, config.seq_length, flag=data.flag)
    notes += data.notes
    unmasked = tokenizer_check.note(flags, config, data, pasted.launch.words)
    if unmasked:
        notes.append(unmasked)
    elif not documents.same_end:
        notes.append(
            "The documents do not all end with the same token. Training finds documents by their "
            "end-of-document token: prepare the data with one (--append-eod)."
        )
    return documents


def _training_data(
    flags: argparse.Namespace, config: SkyLadderConfig, notes: list[str]
) -> TrainingData | None:
    """Return the data that the launch names; a list of it may be elsewhere."""
    try:
        return training_data(flags)
    except OSError as error:
        if config.intra_document:
            raise
        notes.append(f"{error.filename}, which names the data, is not here: not measured.")
        return None


def alpha_for_share(schedule: WindowSchedule, steps: int, share: Fraction) -> Fraction:
    """Return the rate, in tokens per step, at which the schedule takes this share of the steps."""
    by_one = replace(schedule, alpha=Fraction(1), expand_fraction=None)
    return by_one.ramp_steps / (share * steps)


def stage_steps(plan: Plan, count: int = 9) -> Sequence[int]:
    """Return the steps to show: every window where there are few, else evenly over the ramp."""
    if len(plan.layer_runs) <= count + 1:
        return [first for first, *_ in plan.layer_runs]
    end = plan.full_step if plan.full_step is not None else plan.total_steps - 1
    if plan.config.local_schedule is not None:
        end = max(end, plan.layer_runs[-1][0])
    steps = {round(end * part / (count - 1)) for part in range(count)}
    return sorted(steps | {plan.total_steps - 1})


def work_under_masks(plan: Plan) -> list[tuple[bool, bool, Fraction | float]]:
    """Return (ladder, documents masked, mean pairs of a sequence) for the four combinations."""
    return [
        (ladder, masked, plan.pairs_under(ladder=ladder, documents=masked))
        for ladder in (False, True)
        for masked in (False, True)
    ]
