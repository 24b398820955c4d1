"""What layers keep of other ranks' keys: counted by hand, by layer, and as a run says it.

Sequences of 64 tokens; two ranks hold 0..15 with 48..63, and 16..47. tests/unit/test_parallel.py
has the same for `skyladder plan`.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from megatron_skyladder.attention.core_attention import SkyLadderAttention  # noqa: E402
from megatron_skyladder.ladder.clock import Clock  # noqa: E402
from megatron_skyladder.ladder.config import SkyLadderConfig  # noqa: E402
from megatron_skyladder.ladder.schedules import WindowSchedule  # noqa: E402
from megatron_skyladder.ladder.sequence_layout import Kind  # noqa: E402
from megatron_skyladder.runtime import kept_keys  # noqa: E402

LENGTH = 64


def layer(
    number: int = 1,
    *,
    own_window: int | None = None,
    head_sizes: tuple[int, int] = (8, 8),
    **changes: Any,
) -> SkyLadderAttention:
    """Return an attention layer that says what it is, and cannot attend."""
    values = {
        "context_parallel_size": 2,
        "tensor_model_parallel_size": 1,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "params_dtype": torch.bfloat16,
        "multi_latent_attention": False,
        "recompute_granularity": None,
        "recompute_method": None,
        "recompute_num_layers": None,
        "recompute_modules": None,
    }
    made = SkyLadderAttention.__new__(SkyLadderAttention)
    torch.nn.Module.__init__(made)
    made.config = SimpleNamespace(**{**values, **changes})
    made.layer_number, made.own_window, made.head_sizes = number, own_window, head_sizes
    return made


def linear(final_window: int = LENGTH) -> WindowSchedule:
    return WindowSchedule("linear", 8, final_window, alpha=1)


def clock_of(schedule: WindowSchedule, *, kind: Kind = Kind.ZIGZAG, mask: str = "local") -> Clock:
    made = Clock(SkyLadderConfig(schedule, LENGTH, 1, mask=mask), lambda: 0)
    made.layout_kind = kind
    return made


@pytest.mark.parametrize(
    ("of_layer", "final_window", "of_clock", "tokens", "groups"),
    [
        ({"context_parallel_size": 1}, 64, {}, 0, 4),
        ({}, 64, {}, 64, 4),  # the last query, of rank 0, sees all keys
        ({"context_parallel_size": 4}, 64, {}, 16 + 56, 4),  # rank 1's 8..15 and 48..55
        ({"tensor_model_parallel_size": 2}, 64, {}, 64, 2),
        ({"tensor_model_parallel_size": 8}, 64, {}, 64, 1),  # groups are copied
        ({"multi_latent_attention": True}, 64, {}, 64, 8),  # each head has its own keys
        ({}, 32, {"mask": "sliding"}, 47, 4),  # rank 1's 16..46 see keys before 16, from 0 on
        ({"own_window": 16}, 64, {}, 15 + 15, 4),
        ({}, 32, {"kind": Kind.WINDOW}, 0, 4),  # whole windows on each rank
        ({}, 32, {"kind": Kind.SEQUENCE}, 0, 4),  # without documents the same
    ],
)
def test_what_a_layer_keeps(
    of_layer: dict[str, Any],
    final_window: int,
    of_clock: dict[str, Any],
    tokens: int,
    groups: int,
) -> None:
    """Keys and values of 8 numbers each, of 2 bytes."""
    found = kept_keys.kept_bytes(layer(**of_layer), clock_of(linear(final_window), **of_clock))
    assert found == tokens * groups * (8 + 8) * 2


def test_keys_that_are_wider_than_values_and_float32() -> None:
    wide = layer(head_sizes=(24, 16), params_dtype=torch.float32)
    assert kept_keys.kept_bytes(wide, clock_of(linear())) == 64 * 4 * (24 + 16) * 4


@pytest.mark.parametrize(
    ("recompute", "numbers"),
    [
        ({}, [1, 2, 3]),
        ({"granularity": "full", "method": "uniform", "num_layers": 1}, []),
        ({"granularity": "full", "method": "block", "num_layers": 1}, [2, 3]),
        ({"granularity": "selective"}, []),
        ({"granularity": "selective", "modules": ["mlp", "core_attn"]}, []),
        ({"granularity": "selective", "modules": ["mlp"]}, [1, 2, 3]),
    ],
)
def test_a_layer_that_is_recomputed_keeps_nothing(
    recompute: dict[str, Any], numbers: list[int]
) -> None:
    """Of a block of recomputed layers: those behind it keep."""
    changes = {f"recompute_{name}": value for name, value in recompute.items()}
    layers = [layer(number, **changes) for number in (1, 2, 3)]
    chunk = torch.nn.ModuleList([torch.nn.Linear(1, 1), *layers])
    assert [each.layer_number for each in kept_keys._that_keep(chunk)] == numbers
    assert kept_keys._that_keep(torch.nn.Linear(1, 1)) == []  # a stage without attention


STAGED = WindowSchedule("staged", final_window=24, stages="8:0.5 24:0.5", total_steps=4)
POINTS = WindowSchedule("points", final_window=24, points="0:8 1:24", total_steps=4)


@pytest.mark.parametrize(
    ("schedule", "window", "tokens"),
    [
        (linear(), 64, 64),
        # rank 1's 16..23 see 0..23; of windows 24..47 and 48..63 each rank has all that it sees
        (WindowSchedule("constant", final_window=24), 24, 24),
        (STAGED, 24, 24),
        (POINTS, 24, 24),
        (WindowSchedule("constant", final_window=8), 8, 0),  # ends with the ranks' parts
    ],
)
def test_a_run_says_it_of_its_longest_window(
    schedule: WindowSchedule, window: int, tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Not of the default start window of 32, which these schedules but the first do not use."""
    chunks = [torch.nn.ModuleList([layer(1), layer(2)]), layer(3)]
    with caplog.at_level(logging.INFO):
        kept_keys.announce(chunks, clock_of(schedule))
    megabytes = 3 * tokens * 4 * (8 + 8) * 2 / 1e6
    expected = f"at a window of {window} tokens, keys and values of other ranks take up to "
    expected += f"{megabytes:.3g} MB on a rank for each sequence of a micro-batch, in 3 layers"
    assert [expected in text for text in caplog.messages] == ([True] if tokens else [])
