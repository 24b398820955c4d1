"""At start-up, whether the documents of a run's data can be separated; see `data_files`."""

from __future__ import annotations

from typing import Any

from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.megatron_lm import compat
from megatron_skyladder.runtime import data_files


def check(config: SkyLadderConfig, options: Any) -> None:
    """Say where documents are to be masked and their ends are not in the data.

    Args:
        config: the checked configuration.
        options: Megatron's validated arguments.

    Raises:
        UsageError: it is so, and --skyladder-require-documents was given.
    """
    if not data_files.is_due(config):
        return
    eod = compat.eod_token()
    pads = getattr(options, "allow_ambiguous_pad_tokens", False) and compat.pad_token() == eod
    data = data_files.TrainingData(
        compat.training_data(options), eod, options.tokenizer_type, overwritten=pads
    )
    data_files.check(config, data)
