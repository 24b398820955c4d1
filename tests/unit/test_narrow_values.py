"""Heads whose keys are wider than their values: which kernel takes them, and padding where not."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder.kernels import KERNELS, value_width
from megatron_skyladder.testing import requires_megatron

DEEPSEEK = (192, 128)
HOPPER, BLACKWELL, AMPERE, CONSUMER = (9, 0), (10, 0), (8, 0), (12, 0)


@pytest.mark.parametrize(
    ("name", "heads", "capability", "width"),
    [
        ("sdpa", DEEPSEEK, AMPERE, 128),
        ("te", DEEPSEEK, HOPPER, 128),
        ("te", DEEPSEEK, BLACKWELL, 128),
        ("te", (96, 64), BLACKWELL, 64),
        ("te", (192, 64), BLACKWELL, 128),
        ("te", DEEPSEEK, AMPERE, None),
        ("te", DEEPSEEK, CONSUMER, None),
        ("te", (96, 64), CONSUMER, 64),
        ("te", (96, 64), (11, 0), 64),
        ("flash", DEEPSEEK, AMPERE, 192),
        ("varlen", DEEPSEEK, HOPPER, 192),
        ("flash", (576, 512), HOPPER, None),
        ("fa3", DEEPSEEK, HOPPER, 128),
        ("fa3", (96, 64), HOPPER, 96),
        ("fa3", (64, 96), HOPPER, 96),
        ("fa3", (192, 64), HOPPER, 128),
        ("fa3", (128, 104), HOPPER, 128),  # pairs with values up to 128 begin above keys of 128
        ("fa3", (160, 96), HOPPER, 128),  # and above values of 96
        ("fa4", DEEPSEEK, HOPPER, 128),
        ("fa4", DEEPSEEK, BLACKWELL, 128),
        ("fa4", (128, 96), BLACKWELL, 128),  # 96 would be read in steps that do not divide it
        ("fa4", (128, 64), BLACKWELL, 64),
        ("fa4", (160, 128), BLACKWELL, None),
        ("fa4", DEEPSEEK, (11, 0), 128),
        ("fa4", DEEPSEEK, CONSUMER, None),
        ("fa4", (96, 64), CONSUMER, 96),  # one size for both there
        ("flash", (64, 96), AMPERE, None),  # values may be padded, keys are not
    ],
)
def test_how_wide_values_have_to_be(
    name: str, heads: tuple[int, int], capability: tuple[int, int], width: int | None
) -> None:
    assert value_width(name, *heads, capability) == width


@pytest.mark.parametrize("name", KERNELS)
def test_equal_heads_stay_as_they_are(name: str) -> None:
    assert value_width(name, 128, 128, HOPPER) == 128
    # wider than the libraries' kernels are; Megatron's own call and sdpa say for themselves
    assert value_width(name, 320, 320, HOPPER) == (320 if name in ("te", "sdpa") else None)


@requires_megatron
def test_what_has_no_kernel_is_refused_or_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_skyladder.attention.backends import choose

    monkeypatch.setattr(choose, "missing", lambda name: None)
    monkeypatch.setattr(choose, "_te_has_flash_attention", lambda: True)
    monkeypatch.setattr(choose.cpu_engine, "is_installed", lambda: False)
    monkeypatch.setattr(choose.cpu_engine, "is_requested", lambda: False)
    heads = choose.Heads(*DEEPSEEK)
    for capability, names in (
        (AMPERE, ("flash", "flash", "flash")),
        (HOPPER, ("te", "fa3", "fa3")),
        (BLACKWELL, ("te", "fa4", "fa4")),
        (CONSUMER, ("flash", "flash", "flash")),
    ):
        monkeypatch.setattr(choose, "_capability", lambda capability=capability: capability)
        choose._choose.cache_clear()
        assert tuple(it.name for it in choose.choose_backends("auto", heads=heads)) == names
    message = "keys of 192 channels and values of 128 on compute capability 12.0: it has no kernel"
    with pytest.raises(UsageError, match=message):
        choose.choose_backends("te", heads=heads)
    choose._choose.cache_clear()


@requires_megatron
@pytest.mark.parametrize("value_size", [3, 5, 8])
def test_padding_changes_nothing(value_size: int) -> None:
    """Outputs and gradients, of all kinds of calls, against the softmax of all logits."""
    from megatron_skyladder.attention.backends.base import WidenedValues, from_thd, to_thd
    from megatron_skyladder.attention.backends.sdpa import SdpaBackend
    from megatron_skyladder.attention.segments import Rows, grid_segments

    length, size, scale = 24, 8, 0.3
    generator = torch.Generator().manual_seed(value_size)
    shapes = [(length, 2, 4, size), (length, 2, 4, size), (length, 2, 4, value_size)]
    tensors = [torch.randn(shape, generator=generator).double() for shape in shapes]
    direction = torch.randn(length, 2, 4 * value_size, generator=generator).double()

    def gradients(attend, tensors):
        inputs = [each.clone().requires_grad_() for each in tensors]
        out = attend(*inputs)
        out.backward(direction)
        return [out.detach(), *(each.grad for each in inputs)]

    def densely(query, key, value, window):
        at = torch.arange(length)
        seen = (at[:, None] >= at) & (at[:, None] // window == at // window)
        logits = torch.einsum("qbhd,kbhd->bhqk", query, key) * scale
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)

    for window in (length, 7):
        segments = grid_segments(Rows(length, 2, window, False, torch.device("cpu")))
        inner = SdpaBackend(scale)
        expected = gradients(partial(densely, window=window), tensors)
        for backend in (inner, WidenedValues(inner, size)):
            calls = (
                backend.attend_windows,
                backend.attend_full,
                lambda *x, b=backend: from_thd(b(*map(to_thd, x[:3]), x[3]), 2),
            )
            for call in calls:
                found = gradients(lambda *x, call=call, s=segments: call(*x, s), tensors)
                for got, wanted in zip(found, expected, strict=True):
                    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
