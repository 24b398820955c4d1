"""The table of measured kernels: written, read, and taken by `auto`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
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
    names = sorted(path.name for path in file.parent.iterdir())
    assert names == [".attention.json.lock", "attention.json"]


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


def test_a_table_that_cannot_be_read_is_no_reason_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A home folder that this node cannot read: one of many may be so, and `auto` only likes it."""

    def refuse(self: Path, **_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert measured.read("NVIDIA H100", tmp_path / "a.json") is None
    assert f"{tmp_path / 'a.json'} cannot be read (Permission denied), so" in caplog.text

    def nobody(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    assert measured.path({}) == Path("~/.cache/megatron-skyladder/attention.json")


def test_two_kinds_of_gpu_at_once(tmp_path: Path) -> None:
    """Each adds its own: none of 20 is lost."""
    file = tmp_path / "attention.json"
    with ThreadPoolExecutor(10) as pool:
        made = [Measured(f"GPU {number}", "2026-11-30", H100.milliseconds) for number in range(20)]
        assert set(pool.map(lambda each: measured.write(each, file), made)) == {file}
    assert all(measured.read(each.device, file) == each for each in made)


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
