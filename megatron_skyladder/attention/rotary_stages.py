"""Rotary embeddings, plain or YaRN's, where the stages of a run move their base or their factor.

Megatron makes the frequencies once, and keeps the embedding by the sequence's length alone
(``lru_cache`` around ``forward``). A hook on the module compares numbers on the host before each
forward pass of the model; in the first one of a stage it makes the frequencies anew and forgets
what was kept. Recompute does not come here: the embedding is an argument of the layers, made before
them.

YaRN's factor also enters where a layer turns queries and keys: it multiplies their cosines and
sines by a concentration, which each attention keeps from when it was built. These get the stage's
at the same time; recompute, in the same step, reads it again.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings import YarnRotaryEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.schedules import Rotary

_CONCENTRATION = "_yarn_concentration_factor"  # of Megatron's attention, from 0.19 on


class RotaryStages:
    """Gives a model's rotary embedding the base and the factor of the stage.

    Args:
        rotary: Megatron's rotary embedding, plain or YaRN's, as it was built.
        base: that it was built with; stages that set none have it.
        attentions: those of the model that keep a concentration of YaRN's.
    """

    def __init__(self, rotary: RotaryEmbedding, base: float, attentions: list[Any]) -> None:
        self._clock = clock.current()
        self._own = self._now = Rotary(base, getattr(rotary, "scaling_factor", None))
        self._attentions = attentions
        self._made_on = rotary.inv_freq.device  # powers differ in the last bit between devices
        self._dim = 2 * rotary.inv_freq.numel()
        self._yarn_dim = getattr(rotary, "dim", 0)
        self._check(rotary)
        rotary.register_forward_pre_hook(self._follow)

    def _check(self, rotary: Any) -> None:
        """Refuse frequencies or concentrations that base and factor do not make as here.

        Raises:
            UsageError: such as frequencies of --use-rope-scaling, which depend on a length as well.
        """
        same = all(
            torch.equal(made, getattr(rotary, name).to(made.device))
            for name, made in self._frequencies(self._own).items()
        )
        if same and self._own.factor is not None:
            kept = {getattr(attention, _CONCENTRATION) for attention in self._attentions}
            same = kept <= {rotary.get_emb(1)[1]}
        if not same:
            raise UsageError(
                f"stages move rotary embeddings, but this model's are not what its base of "
                f"{self._own.base} makes of them: it has --use-rope-scaling or another scaling, "
                "which is made for one base and one length. Drop it, or leave rope and yarn out of "
                "--skyladder-stages."
            )

    def _frequencies(self, wanted: Rotary) -> dict[str, torch.Tensor]:
        """Return the angles per position by their names in the module, each fp32 [dim / 2].

        Computed as Megatron does. YaRN's module keeps them with the factor and without, and mixes
        the two in each forward pass, by weights that depend on the base.
        """
        made = {"inv_freq": self._powers(self._dim, wanted.base)}
        if wanted.factor is not None:
            made["inv_freq_extra"] = self._powers(self._yarn_dim, wanted.base)
            made["inv_freq_inter"] = self._powers(self._yarn_dim, wanted.base, wanted.factor)
        return made

    def _powers(self, dim: int, base: Any, factor: float = 1.0) -> torch.Tensor:
        places = torch.arange(0, dim, 2, dtype=torch.float32, device=self._made_on)
        return 1.0 / (factor * base ** (places / dim))

    def _follow(self, rotary: Any, _: Any) -> None:
        base, factor = self._clock.rotary(training=rotary.training)
        wanted = Rotary(base or self._own.base, factor or self._own.factor)
        if wanted == self._now:
            return
        for name, made in self._frequencies(wanted).items():
            device = getattr(rotary, name).device
            setattr(rotary, name, made.to(device, non_blocking=True))
        if wanted.factor is not None:
            rotary.rotary_base, rotary.scaling_factor = wanted  # read where frequencies are mixed
            rotary.max_seq_len_cached = 0  # so cosines are made anew where somebody asks for them
            _, concentration = rotary.get_emb(1)
            for attention in self._attentions:
                setattr(attention, _CONCENTRATION, concentration)
        type(rotary).forward.cache_clear()
        self._now = wanted


def follow_stages(model: torch.nn.Module, base: float, moves: set[str]) -> None:
    """Let a model's rotary embedding follow the stages; see `RotaryStages`.

    Args:
        model: a GPTModel or HybridModel.
        base: of its rotary embedding.
        moves: which fields of `StageValues` the stages set, of which this is about rope and yarn.

    Raises:
        UsageError: it has none that could follow.
    """
    rotary = getattr(model, "rotary_pos_emb", None)
    is_plain = type(rotary) is RotaryEmbedding and "yarn" not in moves
    is_yarn = type(rotary) is YarnRotaryEmbedding and hasattr(rotary, "get_emb")  # from 0.16 on
    latent = getattr(model.config, "multi_latent_attention", False)
    if latent or not (is_plain or is_yarn):
        kind = "none" if rotary is None else type(rotary).__name__
        kind += " under multi-latent attention" if latent else ""
        needed = "YaRN's" if "yarn" in moves else "a plain one or YaRN's"
        raise UsageError(
            f"stages move rotary embeddings, but this model has {kind} where {needed} is needed: "
            "multimodal ones depend on more, and in multi-latent attention the softmax's scale is "
            "made of YaRN's factor when a layer is built. Give --position-embedding-type rope "
            "(yarn, where stages set yarn), or leave rope and yarn out of --skyladder-stages."
        )
    attentions = [module for module in model.modules() if hasattr(module, _CONCENTRATION)]
    RotaryStages(rotary, base, attentions)
