"""The demo's last step: each trained model as a Hugging Face folder, and a line that it writes."""

from __future__ import annotations

from pathlib import Path

PROMPT = "import os\n\ndef "
NEW_TOKENS = 24


def export_run(checkpoints: Path, folder: Path) -> Path:
    """Export a run's latest checkpoint, once.

    Args:
        checkpoints: Megatron's --save.
        folder: the Hugging Face folder to make.
    """
    from megatron_skyladder.hugging_face.exporting import export

    return export(checkpoints, folder).folder


def line_of(folder: Path, prompt: str = PROMPT) -> str:
    """Return what a model makes of a prompt, greedily, on one line."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    given = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        made = model.generate(
            given.input_ids,
            attention_mask=given.attention_mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
    text: str = tokenizer.decode(made[0], skip_special_tokens=True)
    return text.replace("\n", "\\n")
