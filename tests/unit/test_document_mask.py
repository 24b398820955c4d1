"""The document mask of a micro-batch, from the sequences to offsets; tests/distributed sends it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from megatron_skyladder.ladder.config import SkyLadderConfig  # noqa: E402
from megatron_skyladder.ladder.fragments import dense_mask  # noqa: E402
from megatron_skyladder.ladder.schedules import WindowSchedule  # noqa: E402
from megatron_skyladder.runtime import document_mask, trainer  # noqa: E402
from megatron_skyladder.testing.trainer import PlainTrainer  # noqa: E402

LENGTH, EOD = 12, 9


def config(mask: str = "local") -> SkyLadderConfig:
    schedule = WindowSchedule(start_window=4, final_window=LENGTH, alpha=1)
    return SkyLadderConfig(schedule, LENGTH, 1, intra_document=True, mask=mask)


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    trainer.install(config(), PlainTrainer(seq_length=LENGTH, end_of_document=EOD))
    yield
    trainer.uninstall()


def sequences(*ends: tuple[int, ...]) -> dict[str, torch.Tensor]:  # type: ignore[name-defined]
    """Return sequences in which documents end after the given numbers of tokens."""
    tokens = torch.ones(len(ends), LENGTH, dtype=torch.int64)
    for row, of_row in enumerate(ends):
        for end in of_row:
            tokens[row, end - 1] = EOD
    return {"tokens": tokens}


def offsets(batch: dict[str, torch.Tensor], mask: str, window: int) -> list[int]:  # type: ignore[name-defined]
    return document_mask.fragment_offsets(batch, config(mask), window)[0].tolist()


def test_offsets_of_each_sequence_lie_one_after_the_other() -> None:
    """Worked out by hand: windows of 4, documents of 5 and 7 tokens, and of 12."""
    found = offsets(sequences((5, 12), (12,)), "local", 4)
    assert found == [0, 4, 5, 8, 12, 16, 20, 24]


def test_a_document_goes_on_where_no_token_ends_it() -> None:
    assert offsets(sequences((), (3,)), "local", LENGTH) == [0, 12, 15, 24]


def test_sequences_with_a_documents_end_are_counted() -> None:
    batch = sequences((), (3,), (12,), (1, 12))
    assert document_mask.fragment_offsets(batch, config(), LENGTH)[1] == 3
    given = {**batch, "cu_seqlens": torch.tensor([[0, 12]] * 4)}  # there is no token to look for
    assert document_mask.fragment_offsets(given, config(), LENGTH)[1] == 4


def test_the_sliding_mask_is_cut_at_documents_alone() -> None:
    assert offsets(sequences((5,)), "sliding", 4) == [0, 5, 12]


@pytest.mark.parametrize("window", [1, 3, 5, 12])
def test_they_are_the_fragments_of_the_dense_mask(window: int) -> None:
    found = np.array(offsets(sequences((2, 7)), "local", window))
    same = np.searchsorted(found, np.arange(LENGTH), side="right")
    dense = dense_mask(LENGTH, window_len=window, document_ends=np.array([2, 7, 12]))
    visible = (same[:, None] == same[None, :]) & np.tri(LENGTH, dtype=bool)
    np.testing.assert_array_equal(visible, dense)


def test_what_the_dataset_says_of_its_documents_is_taken() -> None:
    """With trailing entries as padding; the tokens are not looked at."""
    batch = sequences((5,)) | {"cu_seqlens": torch.tensor([[0, 3, 12, 12, 12]])}
    assert offsets(batch, "local", LENGTH) == [0, 3, 12]


def test_the_tap_keeps_the_latest_sequences_and_hands_on_a_copy_of_the_dict() -> None:
    rows = [sequences((3,)), sequences((4,))]
    tap = document_mask.HostTap(iter(rows))
    assert tap.latest is None
    given = next(tap)
    given["tokens"] = given["tokens"].float()  # as Megatron moves tensors to the device in place
    assert tap.latest is not None and tap.latest["tokens"].dtype == torch.int64
    assert next(iter(tap))["tokens"] is rows[1]["tokens"]
    with pytest.raises(StopIteration):
        next(tap)
