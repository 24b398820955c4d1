"""Does a model repeat random tokens that stand some way back? Exact, and by distance.

Held-out text fills a sequence. A span of random tokens is written into it twice: at the very end,
and as many tokens before as the distance says. Nothing but the first copy says what the second one
goes on with, so a model that predicts it looks back that far:

    ... text text  q7 k2 z9 x1 ...  text text ... text  q7 k2 z9 x1 ...
                   `--- distance ----------------------'

The first tokens of the second copy are the cue and do not count. Every distance has the same text
and the same spans.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_skyladder.errors import UsageError
from megatron_skyladder.files import write_text

CUE = 4  # tokens of the second copy that do not count
BATCH = 4  # sequences of a forward pass


def sequences(text: np.ndarray, spans: np.ndarray, *, seq_length: int, distance: int) -> np.ndarray:
    """Return sequences with each span twice.

    Args:
        text: int, [samples, seq_length], what stands around the spans.
        spans: int, [samples, span].
        seq_length: tokens of a sequence.
        distance: tokens from the first copy to the second, at least a span.

    Returns:
        int, [samples, seq_length].

    Raises:
        UsageError: the copies overlap, or do not fit.
    """
    span = spans.shape[1]
    first = seq_length - span - distance
    if distance < span or first < 0:
        raise UsageError(
            f"[copying]: a span of {span} tokens cannot stand {distance} tokens apart in a "
            f"sequence of {seq_length}. Give distances from {span} to {seq_length - span}."
        )
    filled = text[:, :seq_length].copy()
    filled[:, first : first + span] = spans
    filled[:, seq_length - span :] = spans
    return filled


def scores(logits: np.ndarray, spans: np.ndarray) -> tuple[float, float]:
    """Return accuracy and loss of the second copies, the cue left out.

    Args:
        logits: float, [samples, span, vocabulary]; row i is the prediction of span token i.
        spans: int, [samples, span].
    """
    given, wanted = logits[:, CUE:].astype(np.float64), spans[:, CUE:]
    right = given.argmax(axis=-1) == wanted
    highest = given.max(axis=-1, keepdims=True)
    total = highest[..., 0] + np.log(np.exp(given - highest).sum(axis=-1))
    chosen = np.take_along_axis(given, wanted[..., None], axis=-1)[..., 0]
    return float(right.mean()), float((total - chosen).mean())


def measure(
    predict: Callable[[np.ndarray, int], np.ndarray],
    tokens: np.ndarray,
    distances: Sequence[int],
    *,
    span: int,
    samples: int,
    seq_length: int,
    vocab_size: int,
    left_out: int,
) -> dict[int, dict[str, float]]:
    """Return accuracy and loss by distance.

    Args:
        predict: takes sequences [batch, seq_length] and a count n, and returns the logits of the
            predictions of the last n tokens, [batch, n, vocabulary].
        tokens: int, [any], held-out text.
        distances: in tokens.
        span: tokens of a span.
        samples: sequences.
        seq_length: tokens of a sequence.
        vocab_size: random tokens are below it.
        left_out: a token that ends documents, and is not among the random ones.
    """
    chance = np.random.default_rng(0)
    starts = chance.integers(0, len(tokens) - seq_length, samples)
    text = np.stack([tokens[start : start + seq_length] for start in starts]).astype(np.int64)
    spans = chance.integers(0, vocab_size - 1, (samples, span))
    spans += spans >= left_out
    found = {}
    for distance in distances:
        filled = sequences(text, spans, seq_length=seq_length, distance=distance)
        parts = [predict(filled[i : i + BATCH], span) for i in range(0, samples, BATCH)]
        accuracy, loss = scores(np.concatenate(parts), spans)
        found[distance] = {"accuracy": accuracy, "loss": loss}
    return found


def main() -> None:
    """Measure a run's last checkpoint and write the result, as a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoints", required=True)
    parser.add_argument("--data", required=True, help="prefix of .bin and .idx")
    parser.add_argument("--distances", type=int, nargs="+", required=True)
    parser.add_argument("--span", type=int, required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--seq-length", type=int, required=True)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    from megatron_skyladder.data.indexed import IndexedReader
    from megatron_skyladder.hugging_face.exporting import export

    logging.basicConfig(level=logging.WARNING)
    tokens = IndexedReader(args.data).tokens
    with tempfile.TemporaryDirectory(dir=Path(args.out).parent) as scratch:
        folder = export(args.checkpoints, Path(scratch) / "model").folder
        predict, vocab_size, eod = _loaded(folder)
        found = measure(
            predict,
            tokens,
            args.distances,
            span=args.span,
            samples=args.samples,
            seq_length=args.seq_length,
            vocab_size=vocab_size,
            left_out=eod,
        )
    write_text(args.out, json.dumps(found) + "\n")


def _loaded(folder: Path) -> tuple[Callable[[np.ndarray, int], np.ndarray], int, int]:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def predict(sequences: np.ndarray, count: int) -> np.ndarray:
        with torch.no_grad():
            # the last token predicts what is not there
            given = torch.from_numpy(sequences)[:, :-1]
            logits: np.ndarray = model(given, logits_to_keep=count).logits.numpy()
            return logits

    return predict, int(model.config.vocab_size), int(model.config.eos_token_id)


if __name__ == "__main__":
    main()
