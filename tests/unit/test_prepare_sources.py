"""Reading: every format, in order, from any place, and loud where a file is damaged."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_skyladder.data import identity as identity_module
from megatron_skyladder.data import sources
from megatron_skyladder.data.identity import differences, digest, identity
from megatron_skyladder.data.sources import (
    Batch,
    Place,
    compression_of,
    find_inputs,
    read_batches,
)

LINES = [json.dumps({"text": f"document {i} " + "x" * (i % 7)}) for i in range(40)]


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("pyarrow").Codec("zstd").compress(data, asbytes=True)


def write_parquet(path: Path, rows: list[dict[str, Any]], row_group_size: int = 7) -> Path:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def read(inputs: list[str], start: Place = sources.START, **options: Any) -> list[Batch]:
    files = find_inputs(inputs, options.pop("input_format", None))
    return list(read_batches(files, ["text"], start, batch_bytes=100, **options))


def contents(batches: list[Batch]) -> list[Any]:
    """Return what the batches hold as one list of (where, raw document)."""
    found: list[Any] = []
    for batch in batches:
        payload = batch.payload
        items = payload.splitlines() if isinstance(payload, bytes) else payload
        found += [(batch.locate(item), raw) for item, raw in enumerate(items)]
    return found


def make_all_kinds(folder: Path) -> list[str]:
    """Write one file of each kind and return them in an order that mixes kinds."""
    data = "".join(line + "\n" for line in LINES).encode()
    (folder / "a.jsonl").write_bytes(data)
    (folder / "b.json.gz").write_bytes(gzip.compress(data[:500]) + gzip.compress(data[500:]))
    (folder / "c.jsonl.zst").write_bytes(zstd(data[:700]) + zstd(data[700:]))
    write_parquet(folder / "d.parquet", [json.loads(line) for line in LINES])
    for i in range(9):
        (folder / f"e{i}.txt").write_text(f"a whole file, number {i}\n")
    (folder / "f.txt.gz").write_bytes(gzip.compress(b"a compressed one"))
    (folder / "g.ndjson").write_bytes(data.rstrip(b"\n"))  # no newline at the end
    return sorted(str(path) for path in folder.iterdir())


def test_every_kind_in_order(tmp_path: Path) -> None:
    found = contents(read(make_all_kinds(tmp_path)))
    encoded = [line.encode() for line in LINES]
    for name in ("a.jsonl", "b.json.gz", "c.jsonl.zst", "g.ndjson"):
        of_file = [each for each in found if each[0].startswith(f"{tmp_path}/{name}:")]
        assert of_file == [(f"{tmp_path}/{name}:{i + 1}", raw) for i, raw in enumerate(encoded)]
    rows = [each for each in found if ".parquet" in each[0]]
    assert rows[0] == (f"{tmp_path}/d.parquet:row 1", json.loads(LINES[0]))
    assert [row for _, row in rows] == [json.loads(line) for line in LINES]
    texts = [each for each in found if ".txt" in each[0]]
    assert texts[3] == (f"{tmp_path}/e3.txt", b"a whole file, number 3\n")
    assert texts[-1] == (f"{tmp_path}/f.txt.gz", b"a compressed one")
    assert len(found) == 5 * 40 + 10


def test_goes_on_from_every_place(tmp_path: Path) -> None:
    inputs = make_all_kinds(tmp_path)
    batches = read(inputs)
    assert len(batches) > 40
    for number, batch in enumerate(batches):
        assert contents(read(inputs, batch.next_place)) == contents(batches[number + 1 :])


def test_parquet_goes_on_inside_a_part(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"text": str(i)} for i in range(40)], 16)
    for row in range(41):
        found = contents(read([str(path)], Place(0, row, row)))
        expected = [(f"{path}:row {i + 1}", {"text": str(i)}) for i in range(row, 40)]
        assert found == expected


def test_progress_ends_at_the_total_and_never_goes_back(tmp_path: Path) -> None:
    inputs = make_all_kinds(tmp_path)
    read_bytes = [batch.read_bytes for batch in read(inputs)]
    assert read_bytes == sorted(read_bytes)
    assert read_bytes[-1] == sum(os.path.getsize(path) for path in inputs)


def test_folder_is_sorted_and_leaves_out_what_is_no_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b/2.jsonl", "b/10.jsonl", "a.txt", ".cache/c.jsonl", "README.md", "model.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [file.name for file in find_inputs([str(tmp_path)])]
    assert names == ["a.txt", "b/10.jsonl", "b/2.jsonl"]
    assert "left out 2 files whose names tell no format, such as README.md" in caplog.text
    named = find_inputs([str(tmp_path)], "text")
    assert [file.name for file in named] == [
        *("README.md", "a.txt", "b/10.jsonl", "b/2.jsonl", "model.bin"),
    ]


def make_tree(folder: Path, *names: str) -> Path:
    """Write small files, each with its own name in it."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n")
    return folder


def names_in(folder: Path) -> list[str]:
    return [file.name for file in find_inputs([str(folder)])]


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    make_tree(tmp_path / "other", "x.jsonl", "deep/y.jsonl", ".hidden/z.jsonl")
    corpus = make_tree(tmp_path / "corpus", "a.jsonl", "n/b.jsonl")
    (corpus / "m").symlink_to(tmp_path / "other")
    (corpus / ".n").symlink_to(tmp_path / "other")
    (corpus / "z.jsonl").symlink_to(corpus / "a.jsonl")
    expected = ["a.jsonl", "m/deep/y.jsonl", "m/x.jsonl", "n/b.jsonl", "z.jsonl"]
    assert names_in(corpus) == expected
    (tmp_path / "named").symlink_to(corpus)
    assert names_in(tmp_path / "named") == expected


def test_links_to_folders_repeat_no_document(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = make_tree(tmp_path / "corpus", "b/x.jsonl", "b/c/y.jsonl", ".cache/w.jsonl")
    (corpus / "a").symlink_to(corpus / "b")  # read in its place: its name stays what it was
    (corpus / "b" / "up").symlink_to(corpus)
    assert names_in(corpus) == ["b/c/y.jsonl", "b/x.jsonl"]
    assert "left out 2 links to folders that are read under another path" in caplog.text
    assert f"such as {corpus}/a" in caplog.text
    (corpus / "d").symlink_to(corpus / ".cache")  # a hidden folder is not read in its place
    make_tree(tmp_path / "around", "q.jsonl", "in/r.jsonl")
    (tmp_path / "around" / "in" / "round").symlink_to(tmp_path)
    (corpus / "e").symlink_to(tmp_path / "around" / "in")
    expected = ["b/c/y.jsonl", "b/x.jsonl", "d/w.jsonl", "e/r.jsonl", "e/round/around/q.jsonl"]
    assert names_in(corpus) == expected


def test_order_in_a_folder_without_links_stays(tmp_path: Path) -> None:
    """An output that was begun before goes on only where files come in the same order."""
    names = ("a/b.txt", "a.txt", "a-b/c.txt", "a/b/d.jsonl", "B.txt", "a/.x/y.txt", "é/1.txt")
    corpus = make_tree(tmp_path / "corpus", *names)
    before = sorted(each for each in corpus.rglob("*") if each.is_file())
    before = [each for each in before if ".x" not in each.parts]
    assert [file.path for file in find_inputs([str(corpus)])] == before


def test_what_cannot_be_read_in_a_folder_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = make_tree(tmp_path / "corpus", "a.jsonl", "closed/b.jsonl")
    (corpus / "gone.jsonl").symlink_to(tmp_path / "not_mounted")
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("closed"):  # tests may run as root, which may read all
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert names_in(corpus) == ["a.jsonl"]
    assert "2 folders or links cannot be read and are left out, such as " in caplog.text


def test_arguments_keep_their_order_and_patterns_are_sorted(tmp_path: Path) -> None:
    for name in ("z.jsonl", "b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text("{}")
    files = find_inputs([f"{tmp_path}/z.jsonl", f"{tmp_path}/[ab].jsonl"])
    assert [file.name for file in files] == ["z.jsonl", "a.jsonl", "b.jsonl"]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file, or nothing to read in it"):
        find_inputs([str(tmp_path / "missing.jsonl")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no such file, or nothing to read in it"):
        find_inputs([str(tmp_path / "empty")])


def test_a_name_that_tells_no_format(tmp_path: Path) -> None:
    (tmp_path / "corpus").write_text("{}")
    with pytest.raises(ValueError, match="corpus: its name does not tell the format"):
        find_inputs([str(tmp_path / "corpus")])
    assert find_inputs([str(tmp_path / "corpus")], "jsonl")[0].format == "jsonl"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_was_cut_off(tmp_path: Path, suffix: str) -> None:
    data = os.urandom(200_000)
    whole = gzip.compress(data) if suffix == ".gz" else zstd(data)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"a\.jsonl\..* cannot be read: .*the work so far is kept"):
        read([str(path)])


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".parquet"])
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / (f"a{suffix}" if suffix == ".parquet" else f"a.jsonl{suffix}")
    path.write_bytes(b'{"text": "not compressed at all, and long enough"}\n' * 10)
    with pytest.raises(ValueError, match=r"cannot be read"):
        read([str(path)])


def test_a_compressed_file_that_shrank_since(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}\n"))
    with pytest.raises(ValueError, match="it is shorter than when the run began"):
        read([str(tmp_path / "a.jsonl.gz")], Place(0, 100, 10))


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"content": "x", "id": 1}])
    with pytest.raises(ValueError, match="no column 'text'; it has content, id"):
        read([str(path)])


def test_missing_pyarrow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="zst needs pyarrow: pip install pyarrow"):
        read([str(tmp_path / "a.jsonl.zst")])


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "gzip": gzip.compress,
    "zstd": lambda data: zstd(data),
    "lz4": lambda data: pytest.importorskip("pyarrow").Codec("lz4").compress(data, asbytes=True),
    "zip": lambda data: archive(data, "zip"),
    "tar": lambda data: archive(data, "tar"),
}


def archive(data: bytes, kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("a.jsonl", data)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as file:
            entry = tarfile.TarInfo("a.jsonl")
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


ENDINGS = ["xz", "bz2", "lz4", "lzma", "br", "Z", "zip", "7z", "rar", "tar", "tar.gz", "tgz", "XZ"]


@pytest.mark.parametrize("input_format", [None, "jsonl", "lines"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_names_of_compressions_that_are_not_read(
    tmp_path: Path, ending: str, input_format: str | None
) -> None:
    """As a file, among others in a folder, and where the format is given."""
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(b"x")
    (tmp_path / "b.jsonl").write_text("{}\n")
    for given in (path, tmp_path, tmp_path / "*"):
        with pytest.raises(ValueError, match=r"a\.jsonl\..* not read here.* \(\.gz\) or .*\.zst"):
            find_inputs([str(given)], input_format)


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_compressed_whatever_the_name_says(tmp_path: Path, kind: str) -> None:
    data = "".join(line + "\n" for line in LINES).encode()
    (tmp_path / "a.jsonl").write_bytes(COMPRESSORS[kind](data))
    with pytest.raises(ValueError, match=r"a\.jsonl: it is compressed"):
        read([str(tmp_path / "a.jsonl")])
    assert compression_of(data) is None


def test_parquet_is_not_read_from_within_another_compression(tmp_path: Path) -> None:
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    with pytest.raises(ValueError, match="Parquet compresses its columns itself"):
        find_inputs([str(tmp_path)])


def test_endings_in_capitals_and_in_mid_name(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(b"{}\n"))
    (tmp_path / "v1.zip.jsonl").write_bytes(b"{}\n")
    assert [raw for _, raw in contents(read([str(tmp_path)]))] == [b"{}", b"{}"]


# --- whether the input is the same ----------------------------------------------------------------


def settings_of(folder: Path) -> dict[str, Any]:
    return identity(find_inputs([str(folder)]))


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "txt"])
def test_content_of_equal_size_counts(tmp_path: Path, kind: str, place: str) -> None:
    """Also where the file's time is what it was, as after rsync or a checkout."""
    path, other = tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"
    data = bytearray(os.urandom(50_000))
    path.write_bytes(data)
    other.write_bytes(b"1")
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    before = settings_of(tmp_path)
    assert settings_of(tmp_path) == before
    data[{"first": 0, "middle": 25_000, "last": -1}[place]] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=times)
    assert differences(before, settings_of(tmp_path), same_input=True) == [
        "the input files are others (names, sizes, order or content)"
    ]


def test_large_files_are_sampled_and_their_times_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity_module, "FILE_BYTES", (64 * 1024, 128 * 1024))
    path = tmp_path / "a.jsonl"
    data = bytearray(os.urandom(1_000_000))

    def after(place: int | None, seconds: int) -> dict[str, Any]:
        changed = bytearray(data)
        if place is not None:
            changed[place] ^= 1
        path.write_bytes(changed)
        os.utime(path, (seconds, seconds))
        return settings_of(tmp_path)

    before = after(None, 1000)
    assert after(None, 1000) == before
    for place in (0, 999_999):  # in the sample
        assert after(place, 1000)["inputs"] != before["inputs"]
    outside = after(17_000, 2000)  # not in it: the time tells
    assert outside["inputs"] == before["inputs"]
    (asked,) = differences(before, outside, same_input=False)
    assert "say so with --same-input" in asked
    assert differences(before, outside, same_input=True) == []


@pytest.mark.parametrize("files_at_once", [1, 2, 3, 1000])
def test_what_is_noted_of_files_stays_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files_at_once: int
) -> None:
    """Half-finished outputs hold these: with others no run of an earlier version would go on."""
    monkeypatch.setattr(identity_module, "FILES_AT_ONCE", files_at_once)
    monkeypatch.setattr(identity_module, "FILE_BYTES", (64 * 1024, 64 * 1024))
    for number in range(5):
        (tmp_path / f"{number}.txt").write_bytes(f"document {number} é\n".encode() * 10)
    assert settings_of(tmp_path) == {
        "inputs": "52ccaaa8bfdb8d4c",
        "names": "ca78f4b61b211f4b",
        "modified": None,
    }
    for number in (1, 3):  # sampled
        path = tmp_path / f"{number}.txt"
        path.write_bytes(bytes(range(256)) * 300)
        os.utime(path, (1000 + number, 1000 + number))
    assert settings_of(tmp_path) == {
        "inputs": "a628770db919fa34",
        "names": "ef05a074e564a3ad",
        "modified": "523926d6e18bff9c",
    }
    assert digest([]) == "e3b0c44298fc1c14"


def test_many_files_are_hashed_without_holding_something_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity_module, "FILES_AT_ONCE", 50, raising=False)
    (tmp_path / "a.txt").write_text("a document\n")
    files = find_inputs([str(tmp_path)]) * 2000
    tracemalloc.start()
    try:
        identity(files)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 500_000  # a Future and a line for each: 3.3 MB


def test_what_an_earlier_version_noted_still_counts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    now = {**settings_of(tmp_path), "eod": 1}
    before = {"inputs": now["names"], "eod": 1}
    assert differences(before, now, same_input=False) == []
    assert differences({**before, "inputs": "other"}, now, same_input=False) != []
    assert differences({**before, "eod": 2}, now, same_input=False) == ["eod was 2 and is 1"]


def test_digest_tells_inputs_apart(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "b.jsonl").write_text("{}\n")
    a, b = f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"
    before = digest(find_inputs([a, b]))
    assert digest(find_inputs([b, a])) != before  # the order decides the output
    assert digest(find_inputs([a, b], "lines")) != before
    (tmp_path / "b.jsonl").write_text("{}\n{}\n")
    assert digest(find_inputs([a, b])) != before


def test_a_name_that_is_not_utf8_has_a_digest(tmp_path: Path) -> None:
    """Latin-1 from an old archive; names in UTF-8 have the digest that they had."""
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")).write_text("{}\n")
    except OSError:
        pytest.skip("this file system has UTF-8 names alone")
    odd = digest(find_inputs([str(tmp_path)]))
    (tmp_path / "\udce9.jsonl").write_text("{}\n")
    assert odd != digest(find_inputs([str(tmp_path)]))
    other = make_tree(tmp_path / "other", "café.jsonl")
    (file,) = find_inputs([str(other)])
    content = hashlib.blake2b(file.path.read_bytes(), digest_size=16).hexdigest()
    line = f"{file.name}\t{file.num_bytes}\t{file.format}\n{content}"
    assert digest([file]) == hashlib.sha256(line.encode()).hexdigest()[:16]


def test_digest_does_not_change_when_the_folder_moves(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text("{}\n")
    one, two = (digest(find_inputs([str(tmp_path / folder)])) for folder in ("one", "two"))
    assert one == two
