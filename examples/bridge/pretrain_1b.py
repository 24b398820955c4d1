"""Pretrain a 1B model at 8K with SkyLadder in Megatron Bridge: the three lines in a script.

torchrun --nproc-per-node 8 examples/bridge/pretrain_1b.py dataset.data_path=/data/cc_text_document
"""

from __future__ import annotations

import sys

from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides
from recipes import pretrain_1b_8k

from megatron_skyladder import megatron_bridge as skyladder


def main() -> None:
    cfg = process_config_with_overrides(pretrain_1b_8k(), cli_overrides=sys.argv[1:] or None)
    ladder = skyladder.apply(cfg, preset="1b-8k", intra_document=True)  # after all overrides
    pretrain(cfg, ladder.forward_step, callbacks=ladder.callbacks)


if __name__ == "__main__":
    main()
