"""What the probe asks: hidden tokens must be out of reach of the whole model, seen ones within."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from megatron_skyladder.ladder.clock import Clock
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.fragments import dense_mask
from megatron_skyladder.ladder.schedules import WindowSchedule
from megatron_skyladder.runtime.probe import questions


def clock_of(length, window, mask, documents):
    config = SkyLadderConfig(
        schedule=WindowSchedule("constant", start_window=window, final_window=window),
        seq_length=length,
        step_samples=1,
        mask=mask,
        intra_document=documents,
    )
    return Clock(config, lambda: 0)


@pytest.mark.parametrize("mask", ["local", "sliding"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("length", "window"), [(16, 1), (16, 2), (33, 8), (64, 33), (64, 63), (64, 64), (7, 7)]
)
@pytest.mark.parametrize("num_layers", [1, 3])
def test_hidden_is_out_of_reach_and_seen_is_seen(length, window, mask, documents, num_layers):
    asked = questions(clock_of(length, window, mask, documents), num_layers)
    assert len(asked) == 1 + documents
    for question in asked:
        ends = [] if question.document_end is None else [question.document_end]
        visible = dense_mask(
            length,
            window_len=question.window_len,
            document_ends=np.array(ends),
            sliding=mask == "sliding",
        )
        reached = np.linalg.matrix_power(visible.astype(np.int64), num_layers) > 0
        start, stop = question.queries
        assert question.hidden.any()
        assert not reached[start:stop, question.hidden].any()
        after = range(max(start, question.seen + 1), stop)
        assert len(after) > 0
        assert all(visible[query, question.seen] for query in after)
