"""What the fork server of these tests imports once: Megatron Bridge, 10 seconds and more."""

import importlib

from megatron_skyladder.cpu import bridge

bridge.install()
for name in (
    "megatron.bridge.training.pretrain",
    "megatron.bridge.recipes.common",
    "megatron.bridge.recipes.llama",
    "megatron_skyladder.megatron_bridge.callbacks",
    "megatron_skyladder.megatron_bridge.ladder",
    "megatron_skyladder.megatron_bridge.layers",
):
    importlib.import_module(name)
