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

from collections.abc import Callable, Sequence

import numpy as np

from megatron_skyladder.study.settings import CUE

BATCH = 4  # sequences of a forward pass


def sequences(text: np.ndarray, spans: np.ndarray, *, seq_length: int, distance: int) -> np.ndarray:
    """Return sequences with each span twice.

    Args:
        text: int, [samples, seq_length], what stands around the spans.
        spans: int, [samples, span].
        seq_length: tokens of a sequence.
        distance: tokens from the first copy to the second; `settings.Copying.check` says which fit.

    Returns:
        int, [samples, seq_length].

    """
    span = spans.shape[1]
    first = seq_length - span - distance
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
