"""Masks as segments, each with the dense mask that they have to equal.

`Case.segments(start, stop)` is also what one rank sees under context parallelism: the queries of a
part of the row, and for each segment the keys back to its start. Its rows of the dense mask are
the truth, so the alignment to the bottom right is checked against the definition of the mask and
not against another formula of ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from megatron_skyladder.ladder.fragments import dense_mask, fragment_cu_seqlens

SEQ_LENGTH = 96


@dataclass(frozen=True)
class Case:
    """A mask over one row.

    Args:
        name: shown by pytest.
        window_len: tokens.
        document_ends: exclusive ends; empty for one document.
        sliding: the window moves along with the query.
        seq_length: tokens in the row.
    """

    name: str
    window_len: int
    document_ends: tuple[int, ...] = ()
    sliding: bool = False
    seq_length: int = SEQ_LENGTH

    def stretched(self, factor: int) -> Case:
        """Return the same mask with all its lengths multiplied."""
        return replace(
            self,
            window_len=factor * self.window_len,
            document_ends=tuple(factor * end for end in self.document_ends),
            seq_length=factor * self.seq_length,
        )

    @property
    def window_size(self) -> tuple[int, int]:
        """(left, right) for the kernels: both inclusive, -1 is unbounded, causal is right = 0."""
        return (self.window_len - 1, 0) if self.sliding else (-1, 0)

    def dense(self) -> torch.Tensor:
        """bool [S, S], True where the query (row) sees the key."""
        ends = np.array(self.document_ends) if self.document_ends else None
        return torch.from_numpy(
            dense_mask(
                self.seq_length,
                window_len=self.window_len,
                document_ends=ends,
                sliding=self.sliding,
            )
        )

    def segments(
        self, start: int = 0, stop: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, slice]:
        """Return int32 cu_seqlens of the queries start..stop, those of their keys, and the keys."""
        stop = self.seq_length if stop is None else stop
        cut = self.seq_length if self.sliding else self.window_len
        cu_seqlens = fragment_cu_seqlens(
            np.array(self.document_ends, np.int32), seq_length=self.seq_length, window_len=cut
        ).tolist()
        lengths_q, lengths_k = [], []
        for left, right in pairwise(cu_seqlens):
            if left < stop and right > start:
                lengths_q.append(min(right, stop) - max(left, start))
                lengths_k.append(min(right, stop) - left)
        first_key = stop - sum(lengths_k)
        cu_q, cu_k = (
            torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
            for lengths in (lengths_q, lengths_k)
        )
        return cu_q, cu_k, slice(first_key, stop)


CASES = [
    Case("full_causal", SEQ_LENGTH),
    Case("window_divides", 16),
    Case("window_does_not_divide", 36),
    Case("window_of_one", 1),
    Case("documents", SEQ_LENGTH, (7, 8, 50, 90, 96)),
    Case("window_and_documents", 32, (7, 40, 64, 95)),
    Case("sliding", 20, sliding=True),
    Case("sliding_and_documents", 20, (7, 60), sliding=True),
]


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The oracle: softmax over a dense mask, in the type of the inputs.

    Args:
        q: [M, H, D]; k, v: [K, G, D]; mask: bool [M, K].
    """
    per_group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(per_group, 1) for x in (k, v))
    logits = torch.einsum("mhd,khd->hmk", q, keys) * q.shape[-1] ** -0.5
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hmk,khd->mhd", weights, values)
