"""The paper's four figures for how calmly a run trained (arXiv:2503.15450, section 4.6, Table 9).

Of the training losses L(1), ..., L(N) and the gradient norms before clipping G(1), ..., G(N):

* loss volatility: mean over t of the standard deviation of L(t-9), ..., L(t);
* loss smoothness: mean of |L(t) - L(t-1)|;
* mean loss ratio: mean over t > 1 of L(t) / min(L(1), ..., L(t-1));
* mean gradient norm: mean of min(G(t), 1), 1 being where the paper clips.

Lower is calmer in all of them. The paper takes single steps, the first 30,000; here t counts log
lines, each a mean over its interval, of the whole run. So a longer log interval lowers the figures,
and only runs with the same interval and batch can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

VOLATILITY_WIDTH = 10
CLIPPED_AT = 1.0


@dataclass(frozen=True)
class Stability:
    """The four figures; NaN where a run is too short, or did not log what they are made of."""

    volatility: float
    smoothness: float
    mean_loss_ratio: float
    mean_grad_norm: float


def stability(losses: np.ndarray, grad_norms: np.ndarray) -> Stability:
    """Return the figures of a run from its records, [num_records] each, NaN where not logged."""
    losses, norms = _finite(losses), _finite(grad_norms)
    return Stability(
        volatility=_volatility(losses),
        smoothness=_mean(np.abs(np.diff(losses))),
        mean_loss_ratio=_mean(_finite(loss_ratios(losses))),
        mean_grad_norm=_mean(np.minimum(norms, CLIPPED_AT)),
    )


def loss_ratios(losses: np.ndarray) -> np.ndarray:
    """Return L(t) / min(L(1), ..., L(t-1)) for t = 2, 3, ..., without the losses that are NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):  # of a loss that is 0
        return losses[1:] / np.fmin.accumulate(losses)[:-1]


def _volatility(losses: np.ndarray) -> float:
    if losses.size < VOLATILITY_WIDTH:
        return float("nan")
    windows = np.lib.stride_tricks.sliding_window_view(losses, VOLATILITY_WIDTH)
    return _mean(windows.std(axis=1))


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
