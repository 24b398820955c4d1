"""Megatron checkpoints to Hugging Face folders and back, on the CPU, layer by layer.

Needs no trainer: checkpoints are read and written as files. `checking` alone builds Megatron's own
model, in a process of its own, to compare logits.
"""

import importlib.util
from collections.abc import Sequence

NEEDED = ("torch", "safetensors")


def require(needed: Sequence[str] | None = None) -> None:
    """Say what is not installed, before an import fails.

    Args:
        needed: packages, by the names that are imported; ``NEEDED`` unless given.

    Raises:
        ValueError: a package is missing.
    """
    missing = [name for name in needed or NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"this needs {' and '.join(missing)}: pip install {' '.join(missing)}, or all that "
            "models in and out need: pip install megatron-skyladder[evaluate]."
        )
