"""`export-hf` against Bridge's own converter: the same checkpoint, the same tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bridge_bodies import SEQ, VOCAB
from bridge_runs import LADDER, BridgeRuns
from safetensors.torch import load_file

from megatron_skyladder.hugging_face.exporting import export


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sp": True}, {"pp": 2}], ids=str)
def test_autobridge_exports_the_same_tensors(
    runs: BridgeRuns, layout: dict[str, int], tmp_path: Path
) -> None:
    run = runs.bridge(2 if layout else 1, ladder=LADDER, save_interval=4, exit_interval=4, **layout)
    ours = export(run.checkpoint, tmp_path / "ours", without_tokenizer=True, vocab_size=VOCAB)
    window = runs.reference(LADDER).steps()[4]["window"]
    assert f"the checkpoint stands at a window of {window} of {SEQ} tokens" in ours.notes[0]
    other = runs.start(
        "export",
        body_module="bridge_oracle",
        checkpoint=str(run.checkpoint / "iter_0000004"),
        config=str(ours.folder),
    )
    found, expected = weights(ours.folder), weights(other.folder / "exported")
    assert found.keys() == expected.keys() and len(found) == 4 * 9 + 3
    for name, tensor in expected.items():
        assert torch.equal(found[name].float(), tensor.float()), name
