"""What Megatron refuses or gets wrong on a CPU, without Transformer Engine and Apex, put right.

Part of the CPU engine; `prepare()` runs once, when the engine is installed.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import sysconfig
from typing import Any

import torch

from megatron_skyladder.cpu import hybrid, older_megatron

# Megatron's defaults that need a GPU, by argparse destination. A flag given still wins.
CPU_DEFAULTS = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "no_persist_layer_norm": True,
}


def prepare() -> None:
    """Change Megatron in this process."""
    _set_flag_defaults()
    _skip_building_helpers()
    _allow_norms_under_sequence_parallel()
    _resume_distributed_optimizer()
    _move_splits_to_numpy()
    attend_with_narrower_values()
    _build_prediction_heads_without_inference_layers()
    older_megatron.prepare()
    hybrid.prepare()


def set_argument_defaults(parser: argparse.ArgumentParser) -> None:
    """Give Megatron's parser defaults that work without a GPU; flags still override them."""
    known = {action.dest for action in parser._actions}
    parser.set_defaults(**{k: v for k, v in CPU_DEFAULTS.items() if k in known})


def _set_flag_defaults() -> None:
    from megatron.training import arguments

    if not hasattr(arguments, "add_megatron_arguments"):
        older_megatron.set_flag_defaults(set_argument_defaults)
        return
    original = arguments.add_megatron_arguments

    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        set_argument_defaults(parser)
        return parser

    arguments.add_megatron_arguments = add_megatron_arguments


def _skip_building_helpers() -> None:
    """The wheel has the compiled helpers but no Makefile, and make's failure ends the process.

    Checkouts build them. Up to 0.16 for the Python whose python3-config comes first on the path: a
    virtual environment has none, and what is built for another Python cannot be imported.
    """
    from megatron.core.datasets import utils

    folder = os.path.dirname(utils.__file__)
    if not os.path.exists(os.path.join(folder, "Makefile")):
        utils.compile_helpers = lambda: None
        return
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    os.environ["MAKEFLAGS"] = f"{os.environ.get('MAKEFLAGS', '')} LIBEXT={suffix}".strip()


def _allow_norms_under_sequence_parallel() -> None:
    from megatron.core.transformer import torch_norm

    make_norm = torch_norm.WrappedTorchNorm.__new__

    def make_norm_under_sequence_parallel(
        cls: Any, config: Any, *args: Any, **kwargs: Any
    ) -> torch.nn.Module:
        sequence_parallel = config.sequence_parallel
        config.sequence_parallel = False  # the only thing the original looks at it for is to refuse
        try:
            norm = make_norm(cls, config, *args, **kwargs)
        finally:
            config.sequence_parallel = sequence_parallel
        for parameter in norm.parameters():  # so that Megatron sums its gradient over the TP ranks
            parameter.sequence_parallel = sequence_parallel
        return norm

    torch_norm.WrappedTorchNorm.__new__ = make_norm_under_sequence_parallel


def _resume_distributed_optimizer() -> None:
    """Let the distributed optimizer load a checkpoint with torch's own Adam.

    Without Apex and Transformer Engine, Megatron asks torch's Adam for its step before it has taken
    one, which fails; gives all parameters one step tensor, which each of them counts up; and looks
    for the step among the tensors of a checkpoint, where it is missing or that of before loading.
    The right one is in the parameter groups.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    shard, load = DistributedOptimizer.sharded_state_dict, DistributedOptimizer.load_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = self.optimizer
        if not inner.state and isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
            for group in inner.param_groups:
                for parameter in group["params"]:
                    inner.state[parameter] = {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return shard(self, *args, **kwargs)

    def load_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():  # in fp32 it writes into views of parameters
            load(self, *args, **kwargs)
        for group in self.optimizer.param_groups:
            for parameter in group["params"] if "step" in group else ():
                self.optimizer.state[parameter]["step"] = torch.tensor(float(group["step"]))

    def set_main_param_and_optimizer_states(self: Any, parameter: Any, tensors: Any) -> None:
        set_states(self, parameter, {"step": torch.zeros(()), **tensors})

    DistributedOptimizer.sharded_state_dict = sharded_state_dict
    DistributedOptimizer.load_state_dict = load_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states


def _move_splits_to_numpy() -> None:
    """Let token dispatchers turn their counts into lists, as they do with what comes from a GPU.

    Megatron's function does nothing to a tensor that is not on a GPU, although NumPy's array was
    asked for, and the counts of an all-to-all then stay tensors, which torch refuses.
    """
    from megatron.core.transformer.moe import token_dispatcher

    move = getattr(token_dispatcher, "maybe_move_tensor_to_cpu", None)
    if move is None:  # 0.11
        return

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, **kwargs: Any) -> Any:
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return move(tensor, as_numpy, **kwargs)

    token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _build_prediction_heads_without_inference_layers() -> None:
    """Main asks whether a linear layer is one for inference; without their package none is a class.

    What stands for Transformer Engine's classes makes no class of those that are derived.
    """
    try:
        from megatron.core.transformer import multi_token_prediction
    except ImportError:  # 0.11
        return
    ask = getattr(multi_token_prediction, "is_inference_column_parallel_linear", None)
    if ask is None:
        return
    layers = ask.__globals__
    for name in ("InferenceColumnParallelLinear", "InferenceLayerNormColumnParallelLinear"):
        if not isinstance(layers.get(name), type):
            layers[name] = type(name, (), {})


def attend_with_narrower_values() -> None:
    """Let Megatron's plain attention be built for multi-latent attention.

    Its forward pass takes values of any width; only its constructor, which Transformer Engine's
    stands for on a GPU, does not know the arguments that say so.
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    original = DotProductAttention.__init__
    if "v_channels" in inspect.signature(original).parameters:
        return

    @functools.wraps(original)
    def __init__(
        self: Any,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        original(self, *args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    DotProductAttention.__init__ = __init__
