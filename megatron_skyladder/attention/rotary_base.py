"""The base of rotary embeddings, where the stages of a run move it.

Megatron makes the frequencies once, and keeps the embedding by the sequence's length alone
(``lru_cache`` around ``forward``). A hook on the module compares two numbers on the host before
each forward pass of the model; in the first one of a stage it makes the frequencies anew and
forgets what was kept. Recompute does not come here: the embedding is an argument of the layers,
made before them.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import clock


class RotaryBase:
    """Gives a model's rotary embedding the base of the stage.

    Args:
        rotary: Megatron's plain rotary embedding, as it was built.
        base: that it was built with; stages that set none have it.
    """

    def __init__(self, rotary: RotaryEmbedding, base: float) -> None:
        self._clock = clock.current()
        self._own = self._base = base
        self._made_on = rotary.inv_freq.device  # powers differ in the last bit between devices
        self._dim = 2 * rotary.inv_freq.numel()
        self._check(rotary)
        rotary.register_forward_pre_hook(self._follow)

    def _check(self, rotary: RotaryEmbedding) -> None:
        """Refuse frequencies that are not what this module would make of the base.

        Raises:
            UsageError: such as those of --use-rope-scaling, which depend on a length as well.
        """
        if not torch.equal(self._frequencies(self._own), rotary.inv_freq):
            raise UsageError(
                f"stages move the base of rotary embeddings, but this model's frequencies are not "
                f"the plain powers of its base of {self._own}: it has --use-rope-scaling or another"
                " scaling, which is made for one base and one length. Drop it, or leave rope out of"
                " --skyladder-stages."
            )

    def _frequencies(self, base: float) -> torch.Tensor:
        """Return the angles per position, fp32 [dim / 2], as Megatron computes them."""
        places = torch.arange(0, self._dim, 2, dtype=torch.float32, device=self._made_on)
        return 1.0 / (base ** (places / self._dim))

    def _follow(self, rotary: Any, _: Any) -> None:
        base = self._clock.rotary_base(training=rotary.training) or self._own
        if base == self._base:
            return
        rotary.inv_freq = self._frequencies(base).to(rotary.inv_freq.device, non_blocking=True)
        type(rotary).forward.cache_clear()
        self._base = base


def follow_base(model: Any, base: float) -> None:
    """Let a model's rotary embedding follow the stages; see `RotaryBase`.

    Args:
        model: a GPTModel or HybridModel.
        base: of its rotary embedding.

    Raises:
        UsageError: it has none whose base can be moved.
    """
    rotary = getattr(model, "rotary_pos_emb", None)
    if type(rotary) is not RotaryEmbedding:
        kind = "none" if rotary is None else type(rotary).__name__
        raise UsageError(
            f"stages move the base of rotary embeddings, but this model has {kind} where a plain "
            "one is needed: YaRN, multimodal and multi-latent embeddings depend on more than the "
            "base. Give --position-embedding-type rope, or leave rope out of --skyladder-stages."
        )
    RotaryBase(rotary, base)
