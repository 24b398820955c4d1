"""What SkyLadder cannot be combined with in Megatron Bridge: one table, asked before the model is.

What the attention cannot do, and what Megatron's own flags mean, stands in `attention.limits` and
in the table of Megatron-LM's flags, and is asked of the model's provider as well.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_skyladder.attention import limits
from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.flags import name_of
from megatron_skyladder.megatron_bridge.spelling import in_bridges_words
from megatron_skyladder.megatron_lm import flag_rules

_PACKED = "it packs sequences of several lengths and brings masks of its own"
_INSTEAD = "To keep documents apart, use skyladder.intra_document=true instead."
_PRETRAINING = "Train on GPTDatasetConfig, as the pretrain recipes do."


@dataclass(frozen=True)
class Refusal:
    """One row of the table.

    Args:
        setting: what was set, by its name in Bridge's configuration; ``{value}`` is filled in.
        value: returns what is set there, or a false value where that is fine.
        why: the reason, as the second half of a sentence.
        do: what to do instead.
        finished: whether it is known only once Bridge has finished the configuration.
    """

    setting: str
    value: Callable[[Any], Any]
    why: str
    do: str
    finished: bool = False

    def __str__(self) -> str:
        """Return the message, without the value."""
        return f"{self.setting} cannot be combined with SkyLadder: {self.why}. {self.do}"


def check(cfg: Any, *, finished: bool) -> None:
    """Refuse what cannot be combined with SkyLadder, all of it at once.

    Args:
        cfg: Bridge's ConfigContainer.
        finished: whether Bridge has finished and validated it.

    Raises:
        UsageError: one refusal on a line, in Bridge's words.
    """
    lines = [*_table(cfg, finished), *_models_rules(cfg)]
    if lines:
        raise UsageError("\n".join(dict.fromkeys(lines)))


_STAGES = {  # by the field of `StageValues`
    "batch": "batch, but Bridge has no schedule of batches that could follow",
    "rate_factor": "lr, but Bridge's scheduler sets the learning rate, and SkyLadder changes "
    "nothing inside Bridge",
    "rope": "rope, but Bridge's checkpoints name one rotary base, and its export would write that",
    "yarn": "yarn, but Bridge's checkpoints name one factor of YaRN's",
}


def check_stages(config: SkyLadderConfig) -> None:
    """Refuse stages that set more than the window.

    Raises:
        UsageError: one reason on a line.
    """
    moves = config.schedule.moves()
    lines = [f"skyladder.stages sets {why}." for name, why in _STAGES.items() if name in moves]
    if lines:
        raise UsageError(
            "\n".join(lines) + "\nTrain through megatron_skyladder.pretrain_gpt, or let the stages "
            "set windows alone."
        )


def check_layout(options: Any) -> None:
    """Refuse a layout that is asked for and not supported; without one it is zigzag, and logged.

    Args:
        options: of `settings.options_of`.

    Raises:
        UsageError: it is the balanced one, under context parallelism.
    """
    asked = getattr(options, name_of("context_parallel_layout"), None)
    if asked == "balanced" and options.context_parallel_size > 1:
        raise UsageError(
            "skyladder.context_parallel_layout=balanced is not supported in Megatron Bridge, whose "
            "forward step does not reorder sequences: context parallelism keeps Megatron's zigzag. "
            "Leave it out, or train through megatron_skyladder.pretrain_gpt."
        )


def _table(cfg: Any, finished: bool) -> Iterator[str]:
    for refusal in REFUSALS:
        if refusal.finished and not finished:
            continue
        value = refusal.value(cfg)
        if value:
            yield str(refusal).replace("{value}", str(value))


def _models_rules(cfg: Any) -> Iterator[str]:
    """Yield what Megatron's flags would be refused for, where the provider sets the same."""
    for finding in limits.find(flag_rules.RULES, cfg.model):
        if finding.rule.effect.stops:
            yield in_bridges_words(str(finding))


def noted(cfg: Any) -> list[str]:
    """Return what is accepted, with something to know."""
    found = limits.find(flag_rules.RULES, cfg.model)
    return [str(each) for each in found if each.rule.effect is limits.Effect.NOTED]


def _foreign_model(cfg: Any) -> str | None:
    from megatron.bridge.models.gpt_provider import GPTModelProvider

    kind = type(cfg.model)
    if issubclass(kind, GPTModelProvider) and kind.provide is GPTModelProvider.provide:
        return None
    return kind.__name__


def _spec_object(cfg: Any) -> bool:
    return dataclasses.is_dataclass(getattr(cfg.model, "transformer_layer_spec", None))


def _local_attention(cfg: Any) -> bool:
    backend = getattr(cfg.model, "attention_backend", None)
    return getattr(backend, "name", backend) == "local"


_OTHER_DATASETS = (  # by name: some import packages that need not be there
    *("GPTSFTDatasetConfig", "DirectHFSFTDatasetConfig", "EnergonDatasetConfig"),
    *("MockVLMSFTDatasetConfig", "GPTFIMDatasetConfig"),
)


def _other_dataset(cfg: Any) -> str | None:
    kind = type(cfg.dataset)
    names = [each.__name__ for each in kind.__mro__]
    return kind.__name__ if {*_OTHER_DATASETS} & {*names} else None


def _short_pipeline(cfg: Any) -> Any:
    model = cfg.model
    if model.pipeline_model_parallel_size != 2 or getattr(model, "overlap_p2p_comm", False):
        return None
    return model.virtual_pipeline_model_parallel_size


def _other_eval_cp(cfg: Any) -> Any:
    size = cfg.dist.eval_context_parallel_size
    return None if size == cfg.model.context_parallel_size else size


def _weights_from_where_it_saves(cfg: Any) -> str | None:
    """Return the folder where a stopped run would begin again rather than go on.

    Bridge sets ``finetune`` itself where it falls back to ``pretrained_checkpoint``, which it does
    only if there is nothing to load.
    """
    from megatron.bridge.training.utils.checkpoint_utils import checkpoint_exists

    checkpoint = cfg.checkpoint
    load, save = checkpoint.load, checkpoint.save
    if not checkpoint.finetune or not load or not save:
        return None
    same = os.path.abspath(load) == os.path.abspath(save)
    return load if same and checkpoint_exists(load) else None


def _is_set(section: str, name: str) -> Callable[[Any], Any]:
    return lambda cfg: getattr(getattr(cfg, section), name, None)


REFUSALS = (
    Refusal(
        "model={value}",
        _foreign_model,
        "it does not build its model as Bridge's GPTModelProvider does, and its layers, its "
        "attention or its forward step are its own",
        "Use a recipe of a GPT model such as Llama or Qwen.",
    ),
    Refusal(
        "model.transformer_layer_spec, a ModuleSpec object,",
        _spec_object,
        "run_config.yaml would name SkyLadder's attention, which export and inference do not load",
        "Give the function that returns the spec.",
    ),
    Refusal(
        "model.attention_backend=local",
        _local_attention,
        "it puts Megatron's own attention in the place of SkyLadder's after the layers were chosen",
        "Drop it; for layers without Transformer Engine set "
        "model.transformer_layer_spec=local_layer_spec.",
    ),
    Refusal(
        "model.virtual_pipeline_model_parallel_size={value} with "
        "model.pipeline_model_parallel_size=2",
        _short_pipeline,
        "without overlapped messages two of one pair of ranks are mixed up, which Megatron-LM "
        "refuses and Bridge does not: gradients are wrong",
        "Set model.overlap_p2p_comm=true and model.batch_p2p_comm=false.",
        finished=True,  # comm_overlap may set it
    ),
    Refusal(
        "peft={value}",
        lambda cfg: cfg.peft and type(cfg.peft).__name__,
        "adapters are for finetuning, which sees whole sequences",
        "Drop it.",
    ),
    Refusal(
        "dataset={value}",
        _other_dataset,
        "it lays out sequences, masks or the order of tokens itself",
        _PRETRAINING,
    ),
    Refusal(
        "dataset.enable_offline_packing=true",
        _is_set("dataset", "enable_offline_packing"),
        _PACKED,
        _INSTEAD,
    ),
    Refusal(
        "dataset.enable_in_batch_packing=true",
        _is_set("dataset", "enable_in_batch_packing"),
        _PACKED,
        _INSTEAD,
    ),
    Refusal(
        "dataset.dataloader_type=batch",
        lambda cfg: getattr(cfg.dataset, "dataloader_type", None) == "batch",
        "it is for finetuning and reads a global batch at a time, of any length",
        "Set dataset.dataloader_type=single.",
    ),
    Refusal(
        "dataset.skip_getting_attention_mask_from_dataset=false",
        lambda cfg: getattr(cfg.dataset, "skip_getting_attention_mask_from_dataset", True) is False,
        "a dense mask would stand where SkyLadder's document mask travels",
        "Set it to true.",
    ),
    Refusal(
        "dataset.reset_attention_mask=true",
        _is_set("dataset", "reset_attention_mask"),
        "it is Megatron's dense mask of documents",
        _INSTEAD,
    ),
    Refusal(
        "dist.eval_context_parallel_size={value}",
        _other_eval_cp,
        "evaluation would swap the process groups of all modules, and the attention keeps its own",
        "Drop it.",
    ),
    Refusal(
        "dist.use_decentralized_pg=true",
        _is_set("dist", "use_decentralized_pg"),
        "process groups that Megatron's parallel state does not know have not been tested",
        "Set it to false.",
    ),
    Refusal(
        "model.mtp_num_layers={value}",
        _is_set("model", "mtp_num_layers"),
        "its heads would be shown tokens beyond a fragment, from which nothing keeps them there",
        "Drop it, or train with megatron_skyladder.pretrain_gpt.",
    ),
    Refusal(
        "model.multi_latent_attention=true",
        _is_set("model", "multi_latent_attention"),
        "it has not been tested in Megatron Bridge",
        "Train with megatron_skyladder.pretrain_gpt.",
    ),
    Refusal(
        "checkpoint.finetune=true",
        _weights_from_where_it_saves,
        "it takes the weights alone from {value}, where this run saves, so a run that was stopped "
        "begins again, and its ladder too",
        "To go on, leave it out: Bridge sets it when it begins from pretrained_checkpoint. To "
        "begin again, save in another folder.",
    ),
    Refusal(
        "inprocess_restart.enabled=true",
        lambda cfg: cfg.inprocess_restart and cfg.inprocess_restart.enabled,
        "restarting within the process has not been tested",
        "Let the launcher restart the job.",
    ),
    Refusal(
        "train.rampup_batch_size={value}",
        _is_set("train", "rampup_batch_size"),
        "the length of the run in samples, which decides the schedule, is not counted for it",
        "Drop it.",
    ),
)
