"""How much a token sees in real data: document lengths, and context under both masks.

Sequences are laid out as Megatron's GPT dataset does: documents shuffled, joined, cut every
``seq_length`` tokens. A sample of sequences is enough; which one depends on a fixed seed only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_skyladder.data.indexed import IndexedReader
from megatron_skyladder.ladder.local_layers import LocalLayers

SAMPLE_ROWS = 2048  # 16M tokens at 8K: the mean context is then known to about 1 %
SAMPLE_DOCUMENTS = 1_000_000
# Documents whose last token is looked at: a read from somewhere in the file each
LAST_TOKENS = 1000  # shared over the files
MIN_LAST_TOKENS = 8  # of each
SEED = 1234
MAX_WINDOWS = 256  # evaluated; between them the work is interpolated


@dataclass(frozen=True)
class PackedRows:
    """Pieces of documents, as they lie in sequences.

    Args:
        starts: int64 [num_pieces], where in its row a piece begins, in tokens.
        ends: int64 [num_pieces], its exclusive end in the same sequence.
        num_rows: sequences that the pieces fill.
        seq_length: tokens of a sequence.
    """

    starts: np.ndarray
    ends: np.ndarray
    num_rows: int
    seq_length: int

    def pairs(
        self, window_len: int, *, sliding: bool = False, own_window: int | None = None
    ) -> float:
        """Return a sequence's mean visible (query, key) pairs under documents and window.

        Args:
            window_len: tokens.
            sliding: whether the window slides.
            own_window: of a local layer; see `fragments.window_pairs`.
        """
        lengths = self.ends - self.starts
        at_most = self.seq_length if own_window is None else own_window
        if sliding:
            return float(_seen(lengths, min(at_most, window_len)).sum()) / self.num_rows
        first, last = self.starts // window_len, self.ends // window_len
        head = (first + 1) * window_len - self.starts  # up to the first edge of the grid
        tail = self.ends - last * window_len  # after the last one
        whole = (last - first - 1) * _seen(np.int64(window_len), at_most)
        cut = _seen(head, at_most) + whole + _seen(tail, at_most)
        uncut = _seen(lengths, at_most)
        return float(np.where(first == last, uncut, cut).sum()) / self.num_rows

    def pairs_by_window(
        self,
        windows: Sequence[int],
        *,
        sliding: bool = False,
        local_layers: LocalLayers | None = None,
        local_windows: Sequence[int] = (),
    ) -> Callable[..., Any]:
        """Return window -> pairs of a sequence for these windows, interpolated where they are many.

        Where layers differ, the mean over those with attention. What is returned takes an array of
        windows as well.

        Args:
            windows: tokens; where local layers have a ladder of their own, in the order of steps.
            sliding: whether the window slides.
            local_layers: of the model.
            local_windows: what a query of theirs sees at most, beside each of the windows. What is
                returned then takes it as a second number, or None for all of their own window.
        """
        if local_layers is not None and len(local_windows):
            return self._pairs_of_two(windows, local_windows, sliding, local_layers)
        known = np.unique(np.asarray(windows, dtype=np.int64))
        if known.size > MAX_WINDOWS:
            known = known[np.linspace(0, known.size - 1, MAX_WINDOWS).round().astype(int)]
        values: Any = np.array([self.pairs(int(window), sliding=sliding) for window in known])
        if local_layers is not None:
            own = local_layers.window
            local = [self.pairs(int(each), sliding=sliding, own_window=own) for each in known]
            values = local_layers.mean(values, np.array(local))

        def pairs(window: Any, local_window: None = None) -> Any:
            found = np.interp(window, known, values)
            return found if isinstance(window, np.ndarray) else float(found)

        return pairs

    def _pairs_of_two(
        self,
        windows: Sequence[int],
        local_windows: Sequence[int],
        sliding: bool,
        local_layers: LocalLayers,
    ) -> Callable[..., Any]:
        """Return (window, local window) -> pairs of a sequence.

        Interpolated along the run, between steps that lie close together, and for no other windows
        than its own: those are counted where they are asked for.
        """

        def counted(window: int, own: int) -> float:
            of_global = self.pairs(window, sliding=sliding)
            of_local = self.pairs(window, sliding=sliding, own_window=own)
            return float(local_layers.mean(of_global, of_local))

        both = np.array([windows, local_windows], dtype=np.int64).T
        places = np.unique(np.linspace(0, len(both) - 1, MAX_WINDOWS).round().astype(int))
        at_places = [counted(*both[place].tolist()) for place in places]
        keys, first = np.unique(_key(both[:, 0], both[:, 1]), return_index=True)
        values = np.interp(first, places, at_places)

        def pairs(window: Any, local_window: Any = None) -> Any:
            own = local_layers.window if local_window is None else local_window
            asked = np.atleast_1d(_key(np.asarray(window), np.asarray(own)))
            found = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
            result = values[found]
            for place in np.flatnonzero(keys[found] != asked):
                result[place] = counted(*divmod(int(asked[place]), _KEY))
            return result if isinstance(window, np.ndarray) else float(result[0])

        return pairs

    def context_quantile(self, share: float) -> int:
        """Return how many tokens a token sees under document masks alone, at this share of tokens.

        A piece of n tokens has one that sees 1 token, itself, and so on up to one that sees n.
        """
        lengths = np.sort(self.ends - self.starts)
        tokens_before = np.concatenate(([0], np.cumsum(lengths)))
        wanted = share * tokens_before[-1]
        low, high = 1, int(lengths[-1])
        while low < high:
            context = (low + high) // 2
            shorter = int(np.searchsorted(lengths, context, side="right"))
            see_at_most = tokens_before[shorter] + (lengths.size - shorter) * context
            low, high = (low, context) if see_at_most >= wanted else (context + 1, high)
        return low


@dataclass(frozen=True)
class Documents:
    """What was measured in a data set.

    Args:
        num_documents: in all its files.
        num_tokens: in all its files.
        lengths: int64, tokens of each document of a sample, ascending.
        longest: tokens of the longest document of all its files.
        rows: a sample of packed sequences.
        same_end: whether the documents looked at all end with one and the same token.
    """

    num_documents: int
    num_tokens: int
    lengths: np.ndarray
    longest: int
    rows: PackedRows
    same_end: bool


def measure(data_path: Sequence[str], seq_length: int, *, flag: str = "--data-path") -> Documents:
    """Measure the documents of Megatron's ``--data-path``: prefixes, or weights and prefixes.

    Args:
        data_path: its words.
        seq_length: tokens of a sequence.
        flag: that gave them, for messages.

    Raises:
        ValueError: a file is missing or empty, or the weights are not numbers above 0.
    """
    weights, prefixes = weights_and_prefixes(data_path, flag)
    readers = [IndexedReader(prefix) for prefix in prefixes]
    for reader in readers:
        if not reader.num_tokens:
            raise ValueError(f"{reader.prefix}.bin holds no tokens. Give a data set that has some.")
    shares = weights or [float(reader.num_tokens) for reader in readers]
    generator = np.random.default_rng(SEED)
    starts, ends, num_rows, lengths, longest = [], [], 0, [], 0
    looked_at = max(MIN_LAST_TOKENS, LAST_TOKENS // len(readers))
    for reader, share in zip(readers, shares, strict=True):
        rows = max(1, round(SAMPLE_ROWS * share / sum(shares)))
        of_all = reader.document_lengths
        longest = max(longest, int(of_all.max()))
        packed = pack(_sample(of_all, generator), seq_length, rows)
        starts.append(packed.starts)
        ends.append(packed.ends)
        num_rows += packed.num_rows
        lengths.append(_sample(of_all, generator))
    return Documents(
        num_documents=sum(len(reader) for reader in readers),
        num_tokens=sum(reader.num_tokens for reader in readers),
        lengths=np.sort(np.concatenate(lengths)),
        longest=longest,
        rows=PackedRows(np.concatenate(starts), np.concatenate(ends), num_rows, seq_length),
        same_end=len({each for reader in readers for each in _last_tokens(reader, looked_at)}) == 1,
    )


def weights_and_prefixes(data_path: Sequence[str], flag: str) -> tuple[list[float], list[str]]:
    """Split ``--data-path`` as Megatron does: one prefix, several, or weight prefix weight ...

    Args:
        data_path: its words.
        flag: that gave them, for messages.

    Raises:
        ValueError: the weights are not numbers above 0.
    """
    try:
        weights = [float(word) for word in data_path[::2]]
    except ValueError:
        return [], list(data_path)
    if len(data_path) % 2 or min(weights) <= 0:
        raise ValueError(
            f"{flag} {' '.join(data_path)} is not a list of weight and prefix. Give PREFIX, "
            "PREFIX PREFIX ..., or WEIGHT PREFIX WEIGHT PREFIX ... with weights above 0."
        )
    return weights, list(data_path[1::2])


def pack(lengths: np.ndarray, seq_length: int, num_rows: int) -> PackedRows:
    """Lay documents out in sequences, in the given order, over again where they are too few.

    Args:
        lengths: tokens of each document, integers [documents]; one above 0 at least.
        seq_length: tokens of a sequence.
        num_rows: sequences.
    """
    lengths = lengths[lengths > 0]
    needed = seq_length * num_rows
    repeats = -(-needed // int(lengths.sum()))
    document_ends = np.cumsum(np.tile(lengths, repeats), dtype=np.int64)
    cuts = np.union1d(document_ends[document_ends < needed], np.arange(num_rows + 1) * seq_length)
    starts = cuts[:-1] % seq_length
    return PackedRows(starts, starts + np.diff(cuts), num_rows, seq_length)


def _sample(lengths: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    if lengths.size > SAMPLE_DOCUMENTS:
        return lengths[generator.integers(0, lengths.size, SAMPLE_DOCUMENTS)]
    return generator.permutation(lengths)


def _last_tokens(reader: IndexedReader, count: int) -> set[int]:
    """Return the last tokens of documents spread over the file."""
    documents = np.unique(np.linspace(0, len(reader) - 1, count).astype(int))
    return {int(reader[index][-1]) for index in documents if reader[index].size}


_KEY = 2**31  # above all windows


def _key(window: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Return one number for two windows."""
    return window.astype(np.int64) * _KEY + own


def _seen(length: Any, at_most: int) -> Any:
    """Count the pairs of pieces whose tokens see so many at most."""
    beyond = np.maximum(length - at_most, 0)
    return length * (length + 1) // 2 - beyond * (beyond + 1) // 2
