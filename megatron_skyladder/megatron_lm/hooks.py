"""What we change inside a running Megatron, all in one table.

Each hook wraps one function of Megatron's trainer where the trainer looks it up; nothing else of
Megatron is touched. A place that somebody else has wrapped already is refused, naming both.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatron_skyladder.attention import prediction_heads, recurrent
from megatron_skyladder.attention.layer_spec import with_skyladder
from megatron_skyladder.attention.rotary import follow_layout
from megatron_skyladder.attention.rotary_stages import follow_stages
from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import clock, layer_pattern
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.flags import FINGERPRINT, keep_stages
from megatron_skyladder.ladder.settings import SAME_ON_A_NODE
from megatron_skyladder.megatron_lm import (
    compat,
    data_check,
    flag_rules,
    hybrid,
    layout_choice,
    releases,
    resume,
    stage_batches,
    stage_rates,
)
from megatron_skyladder.megatron_lm.adapter import MegatronLM
from megatron_skyladder.megatron_lm.training_log import counting_windows, logging_metrics
from megatron_skyladder.runtime import attention_present, kept_keys, same_settings, trainer
from megatron_skyladder.runtime.weights import draw_as_reference

logger = logging.getLogger(__name__)

_OWNER = "__skyladder_hook__"


@dataclass(frozen=True)
class Hook:
    """One wrapped function (or ``Class.method``): where it is looked up, what wraps it, and why.

    Args:
        only_in: the release lines that need it; empty: all.
        of_hybrid_model: whether it is about HybridModel, which not every release has.
        of_prediction_heads: whether it is about multi-token prediction, which not every run has.
        package: whose function it is, where it is not Megatron's: it may be missing, or wrapped by
            its own package.
    """

    module: str
    name: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    reason: str
    only_in: tuple[str, ...] = ()
    of_hybrid_model: bool = False
    of_prediction_heads: bool = False
    package: str = ""


def install(config: SkyLadderConfig, options: Any) -> None:
    """Switch SkyLadder on for this process, before the model is built.

    Args:
        config: the checked configuration.
        options: Megatron's validated arguments; the fingerprint is noted in them, so that every
            checkpoint carries it.

    Raises:
        UsageError: a Megatron flag that cannot be combined with SkyLadder.
    """
    check_options(config, options)
    resume.accept_old_checkpoints()
    if getattr(options, "create_attention_mask_in_dataloader", False):
        logger.info(
            "the data loader makes no dense attention masks: create_attention_mask_in_dataloader "
            "True -> False"
        )
        options.create_attention_mask_in_dataloader = False
    setattr(options, FINGERPRINT, config.fingerprint)
    keep_stages(options, config)
    trainer.install(config, MegatronLM())
    line = releases.installed().line
    for hook in (*HOOKS, *GUARDS):
        missing = hook.of_hybrid_model and not hybrid.is_in_megatron()
        missing |= hook.of_prediction_heads and not getattr(options, "mtp_num_layers", None)
        if not missing and (not hook.only_in or line in hook.only_in):
            _wrap(hook)
    if config.recurrent_state not in ("", "free"):
        for symbol in hybrid.recurrent_symbols(options):
            for hook in STATES[symbol]:
                _wrap(hook)
    for name in config.schedule.moves() & STAGES.keys():
        _wrap(STAGES[name])
    logger.info("%s", config.fingerprint)


def install_guards() -> None:
    """Watch over resuming in a run without our flags; everything else stays Megatron's own.

    Before the arguments are parsed, where possible: ``--use-checkpoint-args`` reads a checkpoint.
    """
    resume.accept_old_checkpoints()
    _wrap_where_possible(GUARDS)


def install_ended() -> None:
    """Watch over a run whose variables end the ladder: resuming, and that every rank has them."""
    install_guards()
    _wrap_where_possible(ENDED)


def _wrap_where_possible(hooks: Iterable[Hook]) -> None:
    for hook in hooks:
        try:
            _wrap(hook)
        except compat.MegatronMismatchError as error:  # nothing of ours was asked for
            logger.warning("%s", error, extra=SAME_ON_A_NODE)


def check_options(config: SkyLadderConfig, options: Any) -> None:
    """Refuse what cannot be combined, before anything is built."""
    flag_rules.check(options)
    hybrid.check(options)
    if getattr(options, "mtp_num_layers", None) and not prediction_heads.can_follow():
        raise UsageError(
            "--mtp-num-layers needs Megatron 0.17 or later with SkyLadder, and this is "
            f"{releases.installed().version}: earlier ones shift the tokens of a prediction head "
            "in several places. Drop it, or take a later release."
        )
    if "yarn" in config.schedule.moves() and not hasattr(options, "yarn_beta_fast"):
        raise UsageError(
            f"--skyladder-stages sets yarn, and Megatron {releases.installed().version} has no "
            "flags of YaRN for plain attention: releases have them from 0.19 on. Take a newer one, "
            "or leave yarn out of the stages."
        )
    if config.intra_document:
        compat.eod_token()
        data_check.check(config, options)


def _wrap(hook: Hook) -> None:
    try:
        owner: Any = importlib.import_module(hook.module)
    except ModuleNotFoundError:
        owner = None
    *parents, name = hook.name.split(".")
    for parent in parents:
        owner = getattr(owner, parent, None)
    original = None if owner is None else getattr(owner, name, None)
    if original is None and hook.package:
        raise UsageError(
            f"{hook.package} is not installed, whose {name} SkyLadder needs {hook.reason}. "
            "Megatron's layers of this kind need it, too."
        )
    if original is None:
        raise compat.MegatronMismatchError(
            f"Megatron has no {hook.module}.{hook.name}, which SkyLadder hooks ({hook.reason}). "
            "Use a tested release (see the README)."
        )
    if getattr(original, _OWNER, False):
        return
    if hasattr(original, "__wrapped__") and not hook.package:
        raise compat.MegatronMismatchError(
            f"{hook.module}.{hook.name} is already wrapped by {original.__module__}, and "
            f"{__name__} needs it too ({hook.reason}). Load only one of them."
        )
    wrapped = hook.wrap(original)
    setattr(wrapped, _OWNER, True)
    setattr(owner, name, wrapped)


def _gpt_with_skyladder(original: Callable[..., Any]) -> Callable[..., Any]:
    def num_blocks(given: dict[str, Any]) -> int:
        return int(given["config"].num_layers)

    return _built_with_skyladder(original, "transformer_layer_spec", num_blocks)


def _hybrid_with_skyladder(original: Callable[..., Any]) -> Callable[..., Any]:
    def num_blocks(given: dict[str, Any]) -> int:
        return layer_pattern.num_blocks(given.get("hybrid_layer_pattern") or "")

    build = _built_with_skyladder(original, "hybrid_stack_spec", num_blocks)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        hybrid.check_layers(self, clock.current().config.recurrent_state)

    return __init__


def _built_with_skyladder(
    original: Callable[..., Any], spec: str, num_blocks: Callable[[dict[str, Any]], int]
) -> Callable[..., Any]:
    """Wrap a model's ``__init__``.

    Args:
        original: the method.
        spec: which of its arguments is the layer spec.
        num_blocks: returns from its arguments how many pairs of attention and MLP it has.
    """
    signature = inspect.signature(original)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        for name in (spec, "mtp_block_spec"):
            if given.arguments.get(name) is not None:
                given.arguments[name] = with_skyladder(given.arguments[name])
        if clock.current().config.init == "reference":
            draw_as_reference(given.arguments["config"], num_blocks(given.arguments))
        original(*given.args, **given.kwargs)
        ids_begin_anew = getattr(compat.args(), "reset_position_ids", False)
        moves = clock.current().config.schedule.moves() & {"rope", "yarn"}
        if moves:
            default = signature.parameters["rotary_base"].default
            follow_stages(self, given.arguments.get("rotary_base", default), moves)
        follow_layout(self, checks_ids=not ids_begin_anew)
        prediction_heads.follow_fragments(self)

    return __init__


def _probe_before_training(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def train(*args: Any, **kwargs: Any) -> Any:
        from megatron_skyladder.megatron_lm.evaluate import warn_where_nothing_is_validated

        active = clock.current()
        same_settings.check(active.config)
        warn_where_nothing_is_validated(compat.args())
        given = signature.bind(*args, **kwargs)
        train_with = given.arguments
        attention_present.check(train_with["model"])
        stage_batches.check(compat.args(), train_with["model"])
        layout_choice.choose(compat.args(), train_with["model"], train_with["forward_step_func"])
        kept_keys.announce(train_with["model"], active)
        if not active.config.probe:
            return original(*args, **kwargs)
        from megatron_skyladder.runtime.probe import probe_mask

        train_with["train_data_iterator"] = probe_mask(
            train_with["model"],
            active,
            train_with["forward_step_func"],
            train_with["train_data_iterator"],
        )
        return original(*given.args, **given.kwargs)

    return train


def _training_step(original: Callable[..., Any]) -> Callable[..., Any]:
    from megatron_skyladder.runtime import sequence_mean

    def train_step(
        forward_step_func: Any,
        data_iterator: Any,
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        options = compat.args()
        trainer.begin_step()
        if _moves("rate_factor"):
            stage_rates.begin_step(opt_param_scheduler, options.consumed_train_samples)
        if not options.calculate_per_token_loss:  # else Megatron counts over all ranks
            forward_step_func = sequence_mean.with_mean_over_sequences(forward_step_func)
        return original(
            forward_step_func, data_iterator, model, optimizer, opt_param_scheduler, *args, **kwargs
        )

    return train_step


def _moves(name: str) -> bool:
    """Return whether the schedule sets a field of `StageValues`."""
    return name in clock.current().config.schedule.moves()


def _evaluate_by_length(original: Callable[..., Any]) -> Callable[..., Any]:
    from megatron_skyladder.megatron_lm.evaluate import with_lengths

    by_length = with_lengths(original)

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        config = clock.current().config
        same_settings.check(config)  # under --skip-train nobody has
        return (by_length if config.eval_lengths else original)(*args, **kwargs)

    return evaluate


def _without_skyladder(original: Callable[..., Any]) -> Callable[..., Any]:
    def train_or_evaluate(*args: Any, **kwargs: Any) -> Any:
        same_settings.check(None)
        return original(*args, **kwargs)

    return train_or_evaluate


def _with_input_in_one_piece(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare(gradient: Any, layer_input: Any, *args: Any, **kwargs: Any) -> Any:
        return original(gradient, layer_input.contiguous(), *args, **kwargs)

    return prepare


_HYBRID_MODEL = "megatron.core.models.hybrid.hybrid_model"
_PREDICTION_HEADS = "megatron.core.transformer.multi_token_prediction"
HOOKS = (
    Hook(
        "megatron.core.models.gpt.gpt_model",
        "GPTModel.__init__",
        _gpt_with_skyladder,
        "to build its layers with SkyLadder's core attention, to draw weights as --skyladder-init "
        "says, and to let rotary embeddings follow the tokens of a context-parallel rank and the "
        "stage",
    ),
    Hook(
        _HYBRID_MODEL,
        "HybridModel.__init__",
        _hybrid_with_skyladder,
        "to do the same in a model of --hybrid-layer-pattern",
        of_hybrid_model=True,
    ),
    Hook(
        "megatron.training.training",
        "train",
        _probe_before_training,
        "to try the mask on the real model before training, under the layout chosen for it, and to "
        "refuse a model that has no windows, or ranks that have different settings",
    ),
    Hook(
        "megatron.training.training",
        "train_step",
        _training_step,
        "to average the loss over whole sequences under context parallelism, and to begin with the "
        "window and the learning rate of the step, without the masks of the one before",
    ),
    Hook(
        "megatron.training.training",
        "training_log",
        logging_metrics,
        "to log the window and what it costs beside the losses",
    ),
    Hook(
        "megatron.training.training",
        "num_floating_point_operations",
        counting_windows,
        "to count the attention that windows leave, in all of Megatron's rates",
    ),
    Hook(
        "megatron.training.training",
        "evaluate",
        _evaluate_by_length,
        "to report validation losses by context length, which all ranks have to ask for",
    ),
    Hook(
        _PREDICTION_HEADS,
        "roll_tensor",
        prediction_heads.within_fragments,
        "to keep prediction heads from tokens beyond a fragment",
        of_prediction_heads=True,
    ),
    Hook(
        "megatron.core.tensor_parallel.layers",
        "prepare_input_tensors_for_wgrad_compute",
        _with_input_in_one_piece,
        "to take the attention's output as it lies in memory; later releases do",
        only_in=("0.11",),
    ),
)
STAGES = {  # by the field of `StageValues` that stages set
    "rate_factor": Hook(
        "megatron.core.optimizer_param_scheduler",
        "OptimizerParamScheduler.get_lr",
        stage_rates.with_factor,
        "to multiply the learning rate by the stage's factor",
    ),
}
_ANEW = "to start the state anew where attention ends"
_GATED_DELTA_NET = "megatron.core.ssm.gated_delta_net.gdn"
_FLASH_LINEAR_ATTENTION = "flash-linear-attention"
STATES = {  # by symbol of --hybrid-layer-pattern, with --skyladder-recurrent-state
    layer_pattern.MAMBA: (
        Hook(
            "megatron.core.ssm.mamba_layer",
            "MambaLayer.forward",
            recurrent.with_cut_state(recurrent.MAMBA),
            "to note the mask that comes along",
        ),
        Hook(
            "megatron.core.ssm.mamba_mixer",
            "mamba_split_conv1d_scan_combined",
            recurrent.scanning,
            _ANEW,
            package="mamba_ssm",
        ),
    ),
    layer_pattern.GATED_DELTA_NET: (
        Hook(
            _GATED_DELTA_NET,
            "GatedDeltaNet.forward",
            recurrent.with_cut_state(recurrent.GATED_DELTA_NET),
            "to note the mask that comes along",
        ),
        Hook(
            _GATED_DELTA_NET,
            "causal_conv1d",
            recurrent.convolving,
            _ANEW,
            package=_FLASH_LINEAR_ATTENTION,
        ),
        Hook(
            _GATED_DELTA_NET,
            "chunk_gated_delta_rule",
            recurrent.applying_rule,
            _ANEW,
            package=_FLASH_LINEAR_ATTENTION,
        ),
    ),
}
_ON_EVERY_RANK = "to refuse ranks some of which have SKYLADDER_END_LADDER"
ENDED = (  # where a variable ends the ladder, which another node may lack
    Hook("megatron.training.training", "train", _without_skyladder, _ON_EVERY_RANK),
    Hook("megatron.training.training", "evaluate", _without_skyladder, _ON_EVERY_RANK),
)
GUARDS = (  # installed without any flag of ours, too: they look for what is missing
    Hook(
        "megatron.training.checkpointing",
        "check_checkpoint_args",
        resume.checking_the_schedule,
        "to refuse a resume under another schedule, or without one",
    ),
    Hook(
        "megatron.training.checkpointing",
        "_load_base_checkpoint",
        resume.leaving_with_an_error,
        "to leave with an error where a checkpoint cannot be read",
    ),
    Hook(
        "megatron.training.training",
        "load_checkpoint",
        resume.loading,
        "to leave with an error where what was read cannot be used, and to compare the schedule of "
        "a checkpoint of Megatron Bridge",
    ),
)
