"""Megatron checkpoints to Hugging Face folders and back, on the CPU, layer by layer.

Needs no trainer: checkpoints are read and written as files. `checking` alone builds Megatron's own
model, in a process of its own, to compare logits.
"""
