"""What a trained model can do, measured in a process of its own: held-out losses, and copying."""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from megatron_skyladder.files import write_text
from megatron_skyladder.study import copying, held_out


def main() -> None:
    """Measure a run's last checkpoint and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoints", required=True)
    parser.add_argument("--data", required=True, help="prefix of .bin and .idx")
    parser.add_argument("--seq-length", type=int, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="of the context")
    parser.add_argument("--distances", type=int, nargs="*", default=[], help="of copies")
    parser.add_argument("--span", type=int, required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    from megatron_skyladder.data.indexed import IndexedReader
    from megatron_skyladder.hugging_face.exporting import export

    logging.basicConfig(level=logging.WARNING)
    tokens = IndexedReader(args.data).tokens
    with tempfile.TemporaryDirectory(dir=Path(args.out).parent) as scratch:
        model = _Model(export(args.checkpoints, Path(scratch) / "model").folder)
        losses = held_out.measure(model.loss_sum, tokens, args.lengths, seq_length=args.seq_length)
        copied = copying.measure(
            model.predict,
            tokens,
            args.distances,
            span=args.span,
            samples=args.samples,
            seq_length=args.seq_length,
            vocab_size=model.vocab_size,
            left_out=model.end_of_document,
        )
    write_text(args.out, json.dumps({"losses": losses, "copying": copied}) + "\n")


class _Model:
    """A model of transformers, in float32 on the CPU.

    Args:
        folder: of Hugging Face files.
    """

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.vocab_size = int(self._model.config.vocab_size)
        self.end_of_document = int(self._model.config.eos_token_id)

    def predict(self, sequences: np.ndarray, count: int) -> np.ndarray:
        """Return the logits of the predictions of the last tokens, see `copying.measure`."""
        with self._torch.no_grad():
            # the last token predicts what is not there
            given = self._torch.from_numpy(sequences)[:, :-1]
            logits: np.ndarray = self._model(given, logits_to_keep=count).logits.numpy()
            return logits

    def loss_sum(self, given: np.ndarray, wanted: np.ndarray) -> float:
        """Return the sum of the losses of what follows each token, see `held_out.measure`."""
        with self._torch.no_grad():
            logits = self._model(self._torch.from_numpy(given)).logits
            losses = self._torch.nn.functional.cross_entropy(
                logits.flatten(0, 1),
                self._torch.from_numpy(wanted).flatten(),
                reduction="sum",
            )
            return float(losses)


if __name__ == "__main__":
    main()
