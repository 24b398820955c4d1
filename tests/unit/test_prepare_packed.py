"""The reference code's packed files: the token stream stays, documents end at EOS."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_skyladder.cli import main
from megatron_skyladder.data import output, packed
from megatron_skyladder.data.indexed import IndexedReader
from megatron_skyladder.data.packed import find_packed, read_documents, unpack
from megatron_skyladder.data.progress import Progress
from megatron_skyladder.data.sources import START, InputFile

EOS = 2


def write_packed(
    folder: Path, stream: str, tokens: list[int], chunk: int, code: int = 8, *, pad: bool = False
) -> None:
    """Cut tokens into files as the reference's builder does: what fills no file is not written."""
    dtype = {4: "<i4", 7: "<f8", 8: "<u2"}[code]
    if pad:  # TinyLlama's write_reminder
        tokens = tokens + [1] * (-len(tokens) % chunk)
    for number in range(len(tokens) // chunk):
        part = np.array(tokens[number * chunk : (number + 1) * chunk], dtype=dtype)
        header = b"LITPKDS" + struct.pack("<QBQ", 1, code, chunk)
        (folder / f"{stream}_{number:010d}.bin").write_bytes(header + part.tobytes())


def make_stream(seed: int, num_tokens: int = 200) -> list[int]:
    chance = np.random.default_rng(seed)
    tokens = chance.integers(3, 50, num_tokens)
    tokens[chance.random(num_tokens) < 0.06] = EOS
    return tokens.tolist()


def split(tokens: list[int]) -> list[list[int]]:
    """Cut after each EOS, the plain way."""
    documents: list[list[int]] = [[]]
    for token in tokens:
        documents[-1].append(token)
        if token == EOS:
            documents.append([])
    return [document for document in documents if document]


def unpack_all(inputs: list[str], prefix: Path) -> list[list[int]]:
    unpack(inputs, str(prefix), EOS, lambda progress: None)
    reader = IndexedReader(f"{prefix}_text_document")
    return [reader[i].tolist() for i in range(len(reader))]


@pytest.mark.parametrize("chunk", [5, 16, 200])
def test_documents_across_files(tmp_path: Path, chunk: int) -> None:
    streams = {f"train_cc_{process}": make_stream(process) for process in (0, 1, 10)}
    for name, tokens in streams.items():
        write_packed(tmp_path, name, tokens, chunk)
    expected = []
    for name in sorted(streams):
        whole = len(streams[name]) // chunk * chunk  # the rest was never written
        expected += split(streams[name][:whole])
    assert unpack_all([str(tmp_path)], tmp_path / "out") == expected


def test_a_missing_file_ends_the_document_that_would_go_on(tmp_path: Path) -> None:
    write_packed(tmp_path, "train_cc_0", [5, 6, EOS, 7, 8, 9, 10, EOS, 11, 12, 13, EOS], 4)
    (tmp_path / "train_cc_0_0000000001.bin").unlink()
    assert unpack_all([str(tmp_path)], tmp_path / "out") == [[5, 6, EOS], [7], [11, 12, 13, EOS]]


def test_padding_is_left_out_and_a_cut_off_document_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_packed(tmp_path, "train_cc_0", [5, 6, EOS], 8, pad=True)
    write_packed(tmp_path, "train_cc_1", [7, EOS, 8, 9], 4)
    flags = ["--from-packed", str(tmp_path), "--output-prefix", f"{tmp_path}/out", "--eod-id", "2"]
    assert main(["prepare", *flags]) == 0
    reader = IndexedReader(tmp_path / "out_text_document")
    assert reader.tokens.tolist() == [5, 6, EOS, 7, EOS, 8, 9]
    assert reader.document_lengths.tolist() == [3, 2, 2]
    printed = capsys.readouterr().out
    assert "cut off at a process's end, without EOS: 1, padding left out, in tokens: 5" in printed


def test_goes_on_from_every_place(tmp_path: Path) -> None:
    for process in (0, 1):
        write_packed(tmp_path, f"train_cc_{process}", make_stream(process), 7)
    files = find_packed([str(tmp_path)])
    parts = list(read_documents(files, EOS, START))
    assert len(parts) > 10
    for number, part in enumerate(parts):
        rest = list(read_documents(files, EOS, part.next_place))
        assert [p.documents.tokens.tolist() for p in rest] == [
            p.documents.tokens.tolist() for p in parts[number + 1 :]
        ]


def test_progress_up_to_each_file_without_adding_up_all_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    class Counted(InputFile):
        def __getattribute__(self, name: str) -> Any:
            nonlocal asked
            asked += name == "num_bytes"
            return super().__getattribute__(name)

    monkeypatch.setattr(packed, "InputFile", Counted)
    write_packed(tmp_path, "train_cc_0", [5, EOS, 6] * 100, 3)
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*.bin"))]
    shown: list[Progress] = []
    unpack([str(tmp_path)], f"{tmp_path}/out", EOS, shown.append)
    assert [each.read_bytes for each in shown] == [
        *(sum(sizes[: number + 1]) for number in range(100)),
        sum(sizes),  # what the last file leaves unfinished
    ]
    assert all(each.total_bytes == sum(sizes) for each in shown)
    assert asked < 10 * 100


def test_stop_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "COMMIT_SECONDS", 0)
    write_packed(tmp_path, "train_cc_0", make_stream(0), 16)
    expected = unpack_all([str(tmp_path)], tmp_path / "straight")
    calls = 0

    def stop(progress: object) -> None:
        nonlocal calls
        calls += 1
        if calls % 2 == 0:
            raise KeyboardInterrupt

    for _ in range(20):
        try:
            unpack([str(tmp_path)], f"{tmp_path}/out", EOS, stop)
            break
        except KeyboardInterrupt:
            pass
    assert calls >= 6
    assert unpack_all([str(tmp_path)], tmp_path / "out") == expected  # finished: read only
    for part in ("bin", "idx"):
        out, straight = (tmp_path / f"{name}_text_document.{part}" for name in ("out", "straight"))
        assert out.read_bytes() == straight.read_bytes()


def test_files_that_changed_without_changing_their_size(tmp_path: Path) -> None:
    write_packed(tmp_path, "train_cc_0", [5, 6, EOS, 7, 8, EOS], 6)
    unpack_all([str(tmp_path)], tmp_path / "out")
    write_packed(tmp_path, "train_cc_0", [5, 6, EOS, 7, 9, EOS], 6)
    with pytest.raises(ValueError, match="the packed files are others"):
        unpack_all([str(tmp_path)], tmp_path / "out")


def test_the_token_type_stays(tmp_path: Path) -> None:
    write_packed(tmp_path, "train_cc_0", [70000, EOS], 2, code=4)
    unpack_all([str(tmp_path)], tmp_path / "out")
    assert IndexedReader(tmp_path / "out_text_document").dtype.name == "int32"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"XXXXXXX" + raw[7:], "does not start with LITPKDS"),
        (lambda raw: raw[:10], "does not start with LITPKDS"),
        (lambda raw: raw[:7] + b"\2" + raw[8:], "has version 2 and token type 8"),
        (lambda raw: raw[:15] + b"\7" + raw[16:], "has version 1 and token type 7"),
        (lambda raw: raw[:-2], r"has 30 bytes where 32 are needed"),
    ],
)
def test_damaged_files(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    write_packed(tmp_path, "train_cc_0", [1, 2, 3, EOS], 4)
    path = tmp_path / "train_cc_0_0000000000.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        find_packed([str(tmp_path)])


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no packed \.bin files there"):
        find_packed([str(tmp_path)])


def test_several_data_sets_or_types_are_refused(tmp_path: Path) -> None:
    write_packed(tmp_path, "train_cc_0", [5, EOS], 2)
    write_packed(tmp_path, "train_cc_1", [5, EOS], 2)
    write_packed(tmp_path, "valid_cc_0", [5, EOS], 2)
    with pytest.raises(ValueError, match="belong to 2 data sets: train_cc, valid_cc"):
        find_packed([str(tmp_path)])
    assert len(find_packed([f"{tmp_path}/train_*"])) == 2
    write_packed(tmp_path, "train_cc_2", [5, EOS], 2, code=4)
    with pytest.raises(ValueError, match="hold int32 and uint16 tokens"):
        find_packed([f"{tmp_path}/train_*"])


def test_renamed_files_are_taken_one_by_one(tmp_path: Path) -> None:
    write_packed(tmp_path, "train_cc_0", [5, 6, 7, EOS], 2)
    for number, name in enumerate(("a", "b")):
        (tmp_path / f"train_cc_0_{number:010d}.bin").rename(tmp_path / f"{name}.bin")
    assert unpack_all([f"{tmp_path}/b.bin"], tmp_path / "out") == [[7, EOS]]


def test_an_eos_that_is_nowhere(tmp_path: Path) -> None:
    write_packed(tmp_path, "train_cc_0", [5, 6, 7, 8], 4)
    with pytest.raises(ValueError, match="token 2 is nowhere in the packed files"):
        unpack([str(tmp_path)], f"{tmp_path}/out", EOS, lambda progress: None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "needs the token that ends a document"),
        (["--eod-id", "2", "--workers", "3"], "--workers does not go with --from-packed"),
        (["--eod-id", "2", "--no-append-eod"], "--append-eod does not go with --from-packed"),
    ],
)
def test_flags_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    write_packed(tmp_path, "train_cc_0", [5, EOS], 2)
    arguments = ["--from-packed", str(tmp_path), "--output-prefix", f"{tmp_path}/out", *flags]
    assert main(["prepare", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_the_tokenizer_can_name_the_eos(tmp_path: Path) -> None:
    write_packed(tmp_path, "train_cc_0", [5, EOS, 6, EOS], 4)
    flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "9"]
    arguments = ["--from-packed", str(tmp_path), "--output-prefix", f"{tmp_path}/out", *flags]
    assert main(["prepare", *arguments, "--null-tokenizer-eod-id", "2"]) == 0
    assert len(IndexedReader(tmp_path / "out_text_document")) == 2
