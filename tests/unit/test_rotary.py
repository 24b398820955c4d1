"""Rotary embeddings follow the layout: Megatron's own modules, and after a change of window."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.clock import Clock
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.schedules import WindowSchedule
from megatron_skyladder.ladder.sequence_layout import Kind, by_fragments, by_window, zigzag
from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron

LENGTH, SIZE, RANK = 48, 2, 1
GROUP = SimpleNamespace(size=lambda: SIZE, rank=lambda: RANK)


class Model(torch.nn.Module):
    """What a GPTModel is here: it makes the embedding and returns it."""

    def __init__(self, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.rotary_pos_emb = rotary

    def forward(self, input_ids: Any, position_ids: Any, attention_mask: Any) -> Any:
        return self.rotary_pos_emb(LENGTH, packed_seq=False)


def of_megatrons_cut(embedding: torch.Tensor, *_: Any) -> torch.Tensor:
    return embedding[torch.from_numpy(zigzag(LENGTH, SIZE).positions(RANK))]


@pytest.fixture(params=["plain", "yarn"])
def rotary(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    from megatron.core.models.common.embeddings import rotary_pos_embedding as plain
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn

    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    for module in (plain, yarn):
        monkeypatch.setattr(module, "get_pos_emb_on_this_cp_rank", of_megatrons_cut)
    if request.param == "plain":
        return plain.RotaryEmbedding(8, 1.0, cp_group=GROUP)
    return yarn.YarnRotaryEmbedding(
        8, cp_group=GROUP, scaling_factor=4.0, original_max_position_embeddings=LENGTH
    )


@pytest.fixture
def active() -> Iterator[Clock]:
    """A clock whose window is set by `Clock.override`, under layouts by the window."""
    config = SkyLadderConfig(
        schedule=WindowSchedule(schedule="constant", final_window=LENGTH),
        seq_length=LENGTH,
        step_samples=1,
    )
    active = clock.install(config, lambda: 0)
    active.layout_kind = Kind.WINDOW
    yield active
    clock.uninstall()


def followed(rotary: Any, **options: Any) -> Model:
    from megatron_skyladder.attention.rotary import RotaryPositions

    model = Model(rotary)
    RotaryPositions(model, GROUP, checks_ids=True, **options)
    return model


def ids(*layouts: Any) -> torch.Tensor:
    return torch.from_numpy(np.stack([layout.positions(RANK) for layout in layouts]))


def embedding_at(rotary: Any, positions: torch.Tensor) -> torch.Tensor:
    """By definition: [s, b, 1, d] of positions [b, s]."""
    whole = rotary.get_emb(LENGTH)
    whole = whole[0] if isinstance(whole, tuple) else whole
    return torch.stack([whole[row, 0] for row in positions], dim=1)


def tensor_of(output: Any, rotary: Any) -> torch.Tensor:
    """The embedding; YaRN's factor is the one that Megatron returns."""
    whole = rotary.get_emb(LENGTH)
    if not isinstance(whole, tuple):
        return output
    assert output[1] == whole[1]
    return output[0]


def test_each_window_has_its_own_positions(rotary: Any, active: Clock) -> None:
    model = followed(rotary)
    for window in (20, 7, 7, LENGTH, 20, 48, 13):
        positions = ids(by_window(LENGTH, SIZE, window))
        with active.override(window):
            found = tensor_of(model(None, positions, None), rotary)
        assert torch.equal(found, embedding_at(rotary, positions)), window


def test_a_layout_inside_megatrons_cache_would_come_back_stale(
    rotary: Any, active: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hook that lies near at hand: choose positions where Megatron does."""
    model = Model(rotary)

    def of_layout(embedding: torch.Tensor, *_: Any) -> torch.Tensor:
        rule = active.layout_rule(LENGTH, SIZE, training=True)
        return embedding[torch.from_numpy(rule.layouts(1)[0].positions(RANK))]

    monkeypatch.setitem(
        type(rotary).forward.__wrapped__.__globals__, "get_pos_emb_on_this_cp_rank", of_layout
    )
    right = []
    for window in (20, 7):
        positions = ids(by_window(LENGTH, SIZE, window))
        with active.override(window):
            found = tensor_of(model(None, positions, None), rotary)
        right.append(torch.equal(found, embedding_at(rotary, positions)))
    assert right == [True, False]


def test_evaluation_keeps_megatrons(rotary: Any, active: Clock) -> None:
    model = followed(rotary)
    positions = ids(zigzag(LENGTH, SIZE))
    model.eval()
    with active.override(20):
        found = tensor_of(model(None, positions, None), rotary)
    assert torch.equal(found, embedding_at(rotary, positions))


def test_documents_have_an_order_for_each_sequence(rotary: Any, active: Clock) -> None:
    active.layout_kind = Kind.SEQUENCE
    model = followed(rotary)
    for lengths in (([30, 18], [5, 25, 18]), ([48], [24, 24]), ([1, 46, 1], [30, 18])):
        positions = ids(*(by_fragments(each, SIZE) for each in lengths))
        offsets = np.cumsum([0, *lengths[0], *lengths[1]], dtype=np.int32)
        found = tensor_of(model(None, positions, torch.from_numpy(offsets)), rotary)
        assert torch.equal(found, embedding_at(rotary, positions)), lengths


class LatentAttention(torch.nn.Module):
    """What a layer of multi-latent attention is here: it makes its own embedding."""

    def __init__(self, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.rotary_pos_emb = rotary

    def forward(self, hidden_states: Any, attention_mask: Any = None) -> Any:
        return self.rotary_pos_emb(LENGTH, packed_seq=False)


class LatentModel(torch.nn.Module):
    """A model without an embedding of its own."""

    def __init__(self, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.layer = LatentAttention(rotary)

    def forward(self, input_ids: Any, position_ids: Any, attention_mask: Any) -> Any:
        return self.layer(None, attention_mask=attention_mask)


def test_a_layers_own_embedding_follows_the_mask_that_travels(rotary: Any, active: Clock) -> None:
    """Recomputed, a layer is called with the mask of its micro-batch, not with the latest."""
    from megatron_skyladder.attention.rotary import RotaryPositions, WrongPositionsError

    active.layout_kind = Kind.SEQUENCE
    model = LatentModel(rotary)
    RotaryPositions(model, GROUP, checks_ids=True)
    batches = []
    for lengths in ([30, 18], [5, 25, 18], [48]):
        positions = ids(by_fragments(lengths, SIZE))
        mask = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
        batches.append((positions, mask))
        found = tensor_of(model(None, positions, mask), rotary)
        assert torch.equal(found, embedding_at(rotary, positions))
    for positions, mask in batches:
        found = tensor_of(model.layer(None, attention_mask=mask), rotary)
        assert torch.equal(found, embedding_at(rotary, positions))
    RotaryPositions.compares_always = True
    try:
        with pytest.raises(WrongPositionsError):
            model(None, batches[0][0], batches[1][1])
    finally:
        RotaryPositions.compares_always = False


def test_a_batch_in_another_order_is_found_at_each_change(rotary: Any, active: Clock) -> None:
    from megatron_skyladder.attention.rotary import WrongPositionsError

    model = followed(rotary)
    message = r"sequence 0 of the micro-batch has position \d+ in place \d+ .* zigzag"
    with active.override(20):
        with pytest.raises(WrongPositionsError, match=message):
            model(None, ids(zigzag(LENGTH, SIZE)), None)
        right = ids(by_window(LENGTH, SIZE, 20))
        model(None, right, None)
        second = right.repeat(2, 1)
        second[1, 3] += 1
    with active.override(7):
        with pytest.raises(WrongPositionsError, match="sequence 0"):
            model(None, right, None)  # of the window before
        right = ids(by_window(LENGTH, SIZE, 7)).repeat(2, 1)
        right[1, 3] += 1
    with active.override(8), pytest.raises(WrongPositionsError, match=r"sequence 1 .* place 3"):
        right = ids(by_window(LENGTH, SIZE, 8)).repeat(2, 1)
        right[1, 3] += 1
        model(None, right, None)


def test_a_cut_that_is_megatrons_is_not_compared(rotary: Any, active: Clock) -> None:
    """Under zigzag nobody but Megatron, or a fork of it, cuts."""
    active.layout_kind = Kind.ZIGZAG
    followed(rotary)(None, ids(by_window(LENGTH, SIZE, 20)), None)


def test_a_model_called_by_name(rotary: Any, active: Clock) -> None:
    """Its mask says which order is right, and its ids are compared."""
    from megatron_skyladder.attention.rotary import WrongPositionsError

    active.layout_kind = Kind.SEQUENCE
    model = followed(rotary)
    positions = ids(*(by_fragments(each, SIZE) for each in ([30, 18], [5, 25, 18])))
    mask = torch.tensor([0, 30, 48, 53, 78, 96], dtype=torch.int32)
    named = {"input_ids": None, "position_ids": positions, "attention_mask": mask}
    assert torch.equal(tensor_of(model(**named), rotary), embedding_at(rotary, positions))
    wrong = ids(zigzag(LENGTH, SIZE), zigzag(LENGTH, SIZE))
    with active.override(20), pytest.raises(WrongPositionsError):
        model(**{**named, "position_ids": wrong})


def test_a_recomputed_layer_has_no_ids(
    rotary: Any, active: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mask may be of a micro-batch before the one whose ids the model got last."""
    from megatron_skyladder.attention.rotary import RotaryPositions

    monkeypatch.setattr(RotaryPositions, "compares_always", True)
    active.layout_kind = Kind.SEQUENCE
    model = LatentModel(rotary)
    RotaryPositions(model, GROUP, checks_ids=True)
    latest, earlier = (torch.tensor(each, dtype=torch.int32) for each in ([0, 30, 48], [0, 5, 48]))
    model(None, ids(by_fragments([30, 18], SIZE)), latest)
    found = tensor_of(model.layer(None, attention_mask=earlier), rotary)
    assert torch.equal(found, embedding_at(rotary, ids(by_fragments([5, 43], SIZE))))


def test_ids_that_begin_anew_are_not_compared(rotary: Any, active: Clock) -> None:
    from megatron_skyladder.attention.rotary import RotaryPositions

    model = Model(rotary)
    RotaryPositions(model, GROUP, checks_ids=False)
    with active.override(20):
        found = tensor_of(model(None, torch.zeros(1, 24, dtype=torch.int64), None), rotary)
    assert torch.equal(found, embedding_at(rotary, ids(by_window(LENGTH, SIZE, 20))))


def test_a_later_stage_has_no_ids(rotary: Any, active: Clock) -> None:
    model = followed(rotary)
    with active.override(20):
        found = tensor_of(model(None, None, None), rotary)
    assert torch.equal(found, embedding_at(rotary, ids(by_window(LENGTH, SIZE, 20))))
