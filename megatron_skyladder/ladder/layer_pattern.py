"""The layers of Megatron's HybridModel, one symbol each: ``--hybrid-layer-pattern``.

A layer of a GPT is two of them, ``*-`` or ``*E``. ``|`` ends a pipeline stage; what follows ``/``
are heads of multi-token prediction.
"""

from __future__ import annotations

ATTENTION, MLP, EXPERTS = "*", "-", "E"
MAMBA, GATED_DELTA_NET = "M", "G"
LATENT_ATTENTION, SPARSE_ATTENTION = "+", "D"
STAGE_END, PREDICTION_HEADS = "|", "/"
RECURRENT = MAMBA + GATED_DELTA_NET  # a state runs along the sequence, in place of attention


def layers(pattern: str) -> str:
    """Return the symbols of the model's layers in order: no heads, no ends of stages."""
    return pattern.partition(PREDICTION_HEADS)[0].replace(STAGE_END, "")


def num_blocks(pattern: str) -> int:
    """Return how many layers of a GPT it stands for: each has one that mixes tokens."""
    mixers = ATTENTION + LATENT_ATTENTION + SPARSE_ATTENTION + RECURRENT
    return sum(symbol in mixers for symbol in layers(pattern))
