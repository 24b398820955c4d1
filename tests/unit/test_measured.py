"""The table of measured kernels: written, read, and taken by `auto`."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import measured
from megatron_skyladder.ladder.kernels import Call
from megatron_skyladder.ladder.measured import Measured

H100 = Measured(
    "NVIDIA H100", "2026-11-29", {Call.WINDOWS: {"flash": 0.6, "fa4": 0.4125, "fa3": 0.5}}
)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "attention.json"
    other = Measured("NVIDIA A100", "2026-11-01", {Call.PACKED: {"varlen": 2.0}})
    for each in (H100, other, H100):
        assert measured.write(each, file) == file
    assert measured.read("NVIDIA H100", file) == H100
    assert measured.read("NVIDIA A100", file) == other
    assert measured.read("NVIDIA B200", file) is None
    assert [path.name for path in file.parent.iterdir()] == ["attention.json"]


def test_order_and_reason() -> None:
    assert H100.order(Call.WINDOWS) == ("fa4", "fa3", "flash")
    assert H100.order(Call.PACKED) == ()
    reason = "measured here on 2026-11-29: fa4 0.412 ms, fa3 0.5 ms, flash 0.6 ms"
    assert H100.reason(Call.WINDOWS, "fa4") == reason


def test_where_the_file_is() -> None:
    assert measured.path({"SKYLADDER_MEASURED": "/a/b.json"}) == Path("/a/b.json")
    folder = Path("/cache/megatron-skyladder/attention.json")
    assert measured.path({"XDG_CACHE_HOME": "/cache"}) == folder
    expected = Path("~/.cache/megatron-skyladder/attention.json").expanduser()
    assert measured.path({}) == expected
    assert measured.read("NVIDIA H100", Path("/nowhere/at/all")) is None


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"NVIDIA H100": {"date": "x"}}',
        '{"NVIDIA H100": {"date": "x", "milliseconds": {"FULLER": {}}}}',
        '{"NVIDIA H100": {"date": "x", "milliseconds": {"FULL": {"fa9": 1}}}}',
        '{"NVIDIA H100": {"date": "x", "milliseconds": {"FULL": {"te": "slow"}}}}',
        '{"NVIDIA H100": 3}',
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "attention.json"
    file.write_text(text)
    with pytest.raises(UsageError, match="is not a table of skyladder check-gpu"):
        measured.read("NVIDIA H100", file)
