"""Which layout context parallelism has, and that it says why where it is not the balanced one."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.clock import Clock
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.schedules import WindowSchedule
from megatron_skyladder.ladder.sequence_layout import Kind
from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron

skyladder: Any = None


def patched(data_iterator: Any, model: Any) -> Any:
    return skyladder.watch_sequences(data_iterator, model)


def patched_long_ago(data_iterator: Any, model: Any) -> Any:
    return skyladder.watch(data_iterator)


@functools.wraps(patched)
def wrapped(*args: Any) -> Any:
    return patched(*args)


@pytest.fixture
def choose(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[..., tuple[Kind, str]]]:
    caplog.set_level(logging.INFO)

    def choose(
        forward_step: Any = None, fused: bool = False, latent: str = "", **given: Any
    ) -> tuple[Kind, str]:
        """Return the layout and what was said."""
        from megatron_skyladder import pretrain_gpt
        from megatron_skyladder.megatron_lm import layout_choice

        names = {"context_parallel_layout", "mask", "intra_document", "recurrent_state"}
        of_config = names & given.keys()
        config = {"context_parallel_layout": "balanced"}
        config |= {name: given.pop(name) for name in of_config}
        schedule = WindowSchedule(schedule="constant", final_window=8)
        active: Clock = clock.install(
            SkyLadderConfig(schedule=schedule, seq_length=16, step_samples=1, **config),
            lambda: 0,
        )
        options = {
            "context_parallel_size": 2,
            "micro_batch_size": 1,
            "position_embedding_type": "rope",
        }
        of_model = {"multi_latent_attention": bool(latent), "rope_type": latent or "rope"}
        model = SimpleNamespace(config=SimpleNamespace(apply_rope_fusion=fused, **of_model))
        forward_step = forward_step or pretrain_gpt.forward_step
        caplog.clear()
        layout_choice.choose(SimpleNamespace(**options | given), [model], forward_step)
        return active.layout_kind, caplog.text

    yield choose
    clock.uninstall()


def test_by_the_window_or_by_documents(choose: Any) -> None:
    assert choose()[0] is Kind.WINDOW
    assert choose(forward_step=patched)[0] is Kind.WINDOW
    assert choose(forward_step=wrapped)[0] is Kind.WINDOW
    assert choose(intra_document=True)[0] is Kind.SEQUENCE
    assert choose(intra_document=True, fused=True)[0] is Kind.SEQUENCE
    assert choose(intra_document=True, micro_batch_size=2)[0] is Kind.SEQUENCE
    assert choose(mask="sliding", intra_document=True)[0] is Kind.WINDOW
    for rope in ("rope", "yarn"):
        assert choose(intra_document=True, latent=rope)[0] is Kind.SEQUENCE


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"fused": True, "micro_batch_size": 2}, "Add --micro-batch-size 1 or --no-rope-fusion"),
        ({"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel-comm makes"),
    ],
)
def test_documents_that_share_one_order(choose: Any, given: dict[str, Any], reason: str) -> None:
    kind, said = choose(intra_document=True, **given)
    assert kind is Kind.WINDOW
    assert "by the window alone, because" in said and reason in said


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"forward_step": patched_long_ago}, "patch the checkout (again)"),
        ({"forward_step": lambda iterator, model: None}, "-m megatron_skyladder.pretrain_gpt"),
        ({"recurrent_state": "fragments"}, "recurrent layers of the pattern"),
        ({"position_embedding_type": "mrope"}, "--position-embedding-type mrope"),
        ({"latent": "yarn", "fused": True}, "Add --no-rope-fusion to balance work"),
        ({"logits_load_dir": "teacher"}, "--logits-load-dir"),
        ({"logits_save_dir": "teacher"}, "--logits-save-dir"),
        ({"moe_routing_trace_path": "trace"}, "--moe-routing-trace-path"),
        ({"save_activations_interval": 100}, "--save-activations-interval"),
        ({"save_dgrads_interval": 100}, "--save-dgrads-interval"),
    ],
)
def test_what_keeps_zigzag_is_said(choose: Any, given: dict[str, Any], reason: str) -> None:
    kind, said = choose(**given)
    assert kind is Kind.ZIGZAG
    assert "keeps Megatron's zigzag, because" in said and reason in said


def test_zigzag_that_was_asked_for_is_no_news(choose: Any) -> None:
    for given in ({"context_parallel_layout": "zigzag"}, {"context_parallel_size": 1}):
        assert choose(**given) == (Kind.ZIGZAG, "")
