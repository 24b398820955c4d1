"""What AutoBridge makes of a checkpoint and of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path


def export(*, folder: str, data: str, checkpoint: str, config: str) -> None:
    """Export an iteration with AutoBridge into ``folder``/exported.

    Args:
        folder: of the run.
        data: unused.
        checkpoint: an iteration's folder.
        config: a folder with the model's config.json.
    """
    from megatron.bridge import AutoBridge
    from transformers import AutoConfig

    bridge = AutoBridge.from_hf_config(AutoConfig.from_pretrained(config))
    bridge.export_ckpt(checkpoint, str(Path(folder, "exported")), show_progress=False)
