"""What Megatron 0.11 to 0.16 need beside the rest, under today's torch and NumPy and on a CPU.

Part of the CPU engine. Each remedy looks for what it remedies and leaves later releases alone.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import multiprocessing
from collections.abc import Callable
from typing import Any

import numpy as np


def prepare() -> None:
    """Change Megatron in this process."""
    _keep_a_name_of_numpy()
    _know_that_there_is_no_transformer_engine()
    _route_experts_without_transformer_engine()
    _build_latent_attention_without_transformer_engine()
    _fork_the_queue_of_the_writers()
    _write_items_as_torch_wants_them()


def set_flag_defaults(set_defaults: Callable[[argparse.ArgumentParser], None]) -> None:
    """Give the parser of 0.11 other defaults: all of it is built within ``parse_args``."""
    from megatron.training import arguments, initialize

    parse = arguments.parse_args

    def parse_args(extra_args_provider: Any = None, *args: Any, **kwargs: Any) -> Any:
        def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            set_defaults(parser)
            return extra_args_provider(parser) if extra_args_provider else parser

        return parse(provider, *args, **kwargs)

    arguments.parse_args = initialize.parse_args = parse_args


def _keep_a_name_of_numpy() -> None:
    """The distributed optimizer's checkpoints need ``np.product`` (to 0.15); NumPy 2 has none."""
    if not hasattr(np, "product"):
        np.product = np.prod  # type: ignore[attr-defined]


def _know_that_there_is_no_transformer_engine() -> None:
    """Loading asks for its version (to 0.12), which raises ModuleNotFoundError."""
    from megatron.core import utils
    from packaging.version import Version

    try:
        utils.get_te_version()
    except ImportError:
        utils._te_version = Version("0.0.0")


def _route_experts_without_transformer_engine() -> None:
    """The router asks for a function of its by a name that is then not there (0.13 to 0.15)."""
    from megatron.core.transformer.moe import moe_utils

    if hasattr(moe_utils, "RouterGatingLinearFunction"):
        vars(moe_utils).setdefault("te_general_gemm", None)


def _build_latent_attention_without_transformer_engine() -> None:
    """0.16 takes it for there, as its import does not fail, and its layers for classes."""
    from megatron.core.transformer import multi_latent_attention

    if not isinstance(getattr(multi_latent_attention, "TELinear", None), type):
        multi_latent_attention.HAVE_TE = False


def _fork_the_queue_of_the_writers() -> None:
    """The process that holds it is spawned (0.13 to 0.15) and imports Megatron without the engine.

    In 0.15 that ends in an error.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if not hasattr(filesystem_async, "_get_write_results_queue"):
        return

    @functools.cache
    def queue() -> Any:
        return multiprocessing.get_context("fork").Manager().Queue()

    filesystem_async._get_write_results_queue = queue


def _write_items_as_torch_wants_them() -> None:
    """Torch's private function that writes a tensor has more parameters than 0.11 and 0.12 give."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    write = getattr(filesystem_async, "_write_item", None)
    if write is None or hasattr(filesystem_async, "inspect"):  # later ones look at its signature
        return
    from torch.distributed.checkpoint import filesystem

    if "serialization_format" not in inspect.signature(write).parameters:
        return
    transforms = filesystem._StorageWriterTransforms

    def write_item(*args: Any, **kwargs: Any) -> Any:
        if not isinstance(args[0], transforms):  # 0.11
            args = (transforms(), *args)
        kwargs.setdefault("serialization_format", filesystem.SerializationFormat.TORCH_SAVE)
        return write(*args, **kwargs)

    filesystem_async._write_item = write_item
