"""What the process of test_flag_rules.py runs: Megatron's real parser, and our checks of it."""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
from pathlib import Path
from typing import Any

from flag_cases import CASES, FITS, Case


def try_all(results: str) -> None:
    """Write what training and attention say to each case, with its row and without it."""
    from megatron.training import arguments

    from megatron_skyladder.attention import limits
    from megatron_skyladder.megatron_lm import flag_rules

    options = {flag: _parsed(case) for flag, case in CASES.items()}
    models = {flag: _model(case, options[flag]) for flag, case in CASES.items() if case.model}
    whole, of_model = flag_rules.RULES, limits.RULES
    found: dict[str, Any] = {flag: {} for flag in CASES}
    for name in ("with", "without"):
        for flag in CASES:
            if name == "without":
                flag_rules.RULES = tuple(rule for rule in whole if rule.flag != flag)
                limits.RULES = tuple(rule for rule in of_model if rule.flag != flag)
            found[flag][name] = {
                "training": None if options[flag] is None else _said(options[flag]),
                "model": _said_of_model(models[flag]) if flag in models else None,
            }
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    found["flags"] = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    Path(results).write_text(json.dumps(found))


def _parsed(case: Case) -> Any:
    """Return Megatron's arguments, or None where its parser does not know the flag."""
    from megatron.core import num_microbatches_calculator
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import destroy_global_vars

    from megatron_skyladder.ladder.flags import add_arguments

    if case.parser == "unknown":
        return None
    destroy_global_vars()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    sys.argv = ["pretrain_gpt", *FITS.split(), *case.flags.split()]
    options = parse_args(add_arguments)
    if case.parser == "checks":
        validate_args(options)
    return options


def _said(options: Any) -> dict[str, Any]:
    """Return whether training would start with these arguments, and what it says."""
    from megatron_skyladder.errors import UsageError
    from megatron_skyladder.ladder.flags import config_from_args
    from megatron_skyladder.megatron_lm import hooks

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_skyladder")
    logger.addHandler(handler)
    try:
        config = config_from_args(options)
        assert config is not None
        hooks.check_options(config, options)
    except UsageError as error:
        return {"starts": False, "says": str(error)}
    finally:
        logger.removeHandler(handler)
    return {"starts": True, "says": " ".join(said)}


def _model(case: Case, options: Any) -> Any:
    """Return the TransformerConfig of the arguments, or one with the setting from elsewhere."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    value = True if options is None else getattr(options, case.model, True)
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4)
    config.attention_dropout = 0.0
    setattr(config, case.model, value)
    return copy.copy(config)


def _said_of_model(config: Any) -> str:
    from megatron_skyladder.attention import limits
    from megatron_skyladder.errors import UsageError

    try:
        limits.check_model(config)
    except UsageError as error:
        return str(error)
    return ""


def launch(flags: str) -> None:
    """Start training as torchrun does."""
    from megatron_skyladder import pretrain_gpt

    sys.argv = ["pretrain_gpt", *FITS.split(), *flags.split()]
    pretrain_gpt.main()
