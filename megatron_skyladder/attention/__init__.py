"""The core-attention module and its kernels: torch and megatron.core, no trainer."""
