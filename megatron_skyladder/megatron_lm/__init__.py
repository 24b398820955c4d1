"""Megatron-LM's trainer: the only place that knows its releases, signatures and hooks."""
