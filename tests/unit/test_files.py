"""Files are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_skyladder.files import whole, write_text


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "before")
    with whole(path) as partial:
        partial.write_text("äfter", encoding="utf-8")
        assert path.read_text() == "before"
        assert partial.parent == path.parent  # a rename does not go from disk to disk
    assert path.read_bytes() == "äfter".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "before")
    with pytest.raises(RuntimeError), whole(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "nowhere" / "a", "x")
    assert not (tmp_path / "nowhere").exists()
