"""Four figures for how smoothly a run trained, after the paper's Table 9 (arXiv:2503.15450).

All are of the training losses l(1), l(2), ... as logged, and of the gradient norms:

* volatility: standard deviation of l within windows of `VOLATILITY_RECORDS` consecutive records
  around their linear trend, averaged over all windows. Falling fast is not volatile;
* smoothness: mean of |l(t) - l(t-1)|; lower is smoother;
* mean loss ratio: mean over t > 1 of l(t) / min(l(1), ..., l(t-1)), the instability measure of
  Li et al. (arXiv:2108.06084): above 1 where the loss has been lower before;
* mean gradient norm: before clipping.

A longer log interval averages the losses and lowers all of these, and so does a larger batch:
compare runs with the same of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

VOLATILITY_RECORDS = 50


@dataclass(frozen=True)
class Stability:
    """The four figures; lower is calmer. NaN where a run is too short, or did not log it."""

    volatility: float
    smoothness: float
    mean_loss_ratio: float
    mean_grad_norm: float


def stability(losses: np.ndarray, grad_norms: np.ndarray) -> Stability:
    """Return the figures of a run from its records, [num_records] each, NaN where not logged."""
    losses = losses[np.isfinite(losses)]
    norms = grad_norms[np.isfinite(grad_norms)]
    return Stability(
        volatility=_volatility(losses),
        smoothness=float(np.abs(np.diff(losses)).mean()) if losses.size > 1 else float("nan"),
        mean_loss_ratio=float(loss_ratios(losses).mean()) if losses.size > 1 else float("nan"),
        mean_grad_norm=float(norms.mean()) if norms.size else float("nan"),
    )


def loss_ratios(losses: np.ndarray) -> np.ndarray:
    """Return l(t) / min(l(1), ..., l(t-1)) for t = 2, 3, ..."""
    return losses[1:] / np.minimum.accumulate(losses)[:-1]


def _volatility(losses: np.ndarray) -> float:
    width = min(VOLATILITY_RECORDS, losses.size)
    if width < 3:
        return float("nan")
    windows = np.lib.stride_tricks.sliding_window_view(losses, width)
    centred = windows - windows.mean(axis=1, keepdims=True)
    steps = np.arange(width) - (width - 1) / 2
    slopes = centred @ steps / (steps @ steps)
    residuals = centred - slopes[:, None] * steps
    return float(np.sqrt((residuals**2).mean(axis=1)).mean())
