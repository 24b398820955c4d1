"""At start-up, whether the documents of a run's data can be separated; see `data_files`."""

from __future__ import annotations

from typing import Any

from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.runtime import data_files


def check(config: SkyLadderConfig, cfg: Any, end_of_document: int) -> None:
    """Say where documents are to be masked and their ends are not in the data.

    Args:
        config: the checked configuration.
        cfg: Bridge's ConfigContainer, with the tokenizer in its dataset.
        end_of_document: the token that ends a document.

    Raises:
        UsageError: it is so, and documents are required.
    """
    if not data_files.is_due(config):
        return
    dataset = cfg.dataset
    pads = getattr(dataset, "allow_ambiguous_pad_tokens", False)
    data = data_files.TrainingData(
        _prefixes(dataset),
        end_of_document,
        cfg.tokenizer.tokenizer_type,
        overwritten=bool(pads and _pad(dataset.tokenizer) == end_of_document),
    )
    data_files.check(config, data)


def _prefixes(dataset: Any) -> list[str]:
    """Return the paths of the training data; none where it is not made of .bin/.idx pairs."""
    blend = getattr(dataset, "blend", None)
    training = blend or (getattr(dataset, "blend_per_split", None) or [None])[0]
    return [str(prefix) for prefix in training[0]] if training else []


def _pad(tokenizer: Any) -> int | None:
    try:
        return tokenizer.pad
    except Exception:  # what a tokenizer without one raises is its own affair
        return None
