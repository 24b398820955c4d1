"""Megatron's training loop without a GPU (``SKYLADDER_DEVICE=cpu``)."""
