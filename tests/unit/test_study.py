"""The study's text, settings and tables, without training."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_study import write_study

from megatron_skyladder.cli import main
from megatron_skyladder.errors import UsageError
from megatron_skyladder.study import (
    copying,
    corpus,
    held_out,
    page,
    preparation,
    queue,
    records,
    results,
    settings,
    tables,
    timing,
    training,
)
from megatron_skyladder.study.extract import plain_text
from megatron_skyladder.study.packages import Package
from megatron_skyladder.study.records import Checked, Copied, Record
from megatron_skyladder.study.results import Arm, Figure
from megatron_skyladder.study.training import append_row, read_rows, step_seconds

REPOSITORY = Path(__file__).resolve().parents[2]
LONG = "All work and no play makes a long document that is taken. " * 10


def _record(arm: str, seed: int, losses: tuple[float, ...], seconds: tuple[float, ...]) -> Record:
    """A run of 10 steps a validation, whose held-out loss is the last of the losses."""
    checked = [
        Checked(10 * place, loss + 7, {16: loss + 8}, spent)
        for place, (loss, spent) in enumerate(zip(losses, seconds, strict=True), start=1)
    ]
    command = ["-m", "x", "--train-iters", "60", "--seed", str(seed)]
    return Record(
        *(arm, seed, False, command, "constant 128", 10 * len(losses), 1000, [(10, 5.0, 128)]),
        checked,
        {16: Copied(0.25 * seed, 3.0)},
        {16: losses[-1] + 1, 64: losses[-1]},
        [{"time": "2026-11-29T05:00:00+00:00", "event": "started", "iteration": 0, "what": ""}],
    )


def _of_study(config: Path, record: Record) -> Record:
    """The same with the command and the test that the study gives the run."""
    study = settings.read(config)
    run = next(it for it in study.runs if it.name == record.name)
    command = training.Training(run, config.parent / "study", "").command()
    return replace(record, command=command, copying_test=study.copying)


CONSTANT = Arm(
    "ladder",  # the first arm of the tiny study
    (
        _record("ladder", 1, (6.0, 5.0, 4.0), (100.0, 200.0, 300.0)),
        _record("ladder", 2, (6.2, 5.2, 4.3), (110.0, 210.0, 310.0)),
    ),
)
QUICK = Arm(
    "twin",
    (
        _record("twin", 1, (6.1, 4.9, 3.8), (50.0, 100.0, 250.0)),
        _record("twin", 3, (6.1, 4.9, 1.0), (50.0, 100.0, 250.0)),
    ),
)


def test_html_becomes_what_a_reader_sees() -> None:
    text = plain_text(
        "<!DOCTYPE html><html><head><title>T</title></head><body><nav><a>menu</a></nav>"
        "<h1>One</h1><p>two  &amp;\n three<br/>four</p><script>x()</script>"
        "<pre>a\n  b</pre><table><tr><td>c</td><td>d</td></tr></table></body></html>"
    )
    assert text == "One\n\ntwo & three\nfour\n\na\n  b\n\nc  d\n"
    assert plain_text("if a < b:\r\n    c  \n\n\n\nd") == "if a < b:\n    c\n\nd\n"
    hidden = "<html><body><nav><svg><p>never closed</nav>seen</body></html>"
    assert plain_text(hidden) == "seen\n"


def _wheel(folder: Path, name: str, files: dict[str, str]) -> Package:
    where = folder / f"packages/pypi-{name}-1.0"
    where.mkdir(parents=True)
    with zipfile.ZipFile(where / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
    return Package.parse(f"pypi {name} 1.0 *.txt *.html")


def test_documents_are_taken_once_and_held_out_as_wholes(tmp_path: Path) -> None:
    first = {f"{number}.txt": f"{number} {LONG}" for number in range(40)}
    first |= {"stub.txt": "See there.", "left.out": f"no {LONG}"}
    again = {"same.txt": f"3   {LONG}\n", "new.html": f"<html><body><p>{LONG}</p></body></html>"}
    packages = [_wheel(tmp_path, "a", first), _wheel(tmp_path, "b", again)]
    said: list[str] = []
    record = corpus.build(packages, tmp_path, 0.25, said.append)
    a, b = record["sources"]
    assert (a["documents"], a["duplicates"]) == (40, 0)
    assert (b["documents"], b["duplicates"]) == (1, 1)
    assert len(a["sha256"]) == 64 and a["file"] == "a-1.0-py3-none-any.whl"
    parts = [
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in (corpus.TRAIN, corpus.VALIDATION)
    ]
    names = [document["name"] for part in parts for document in part]
    assert len(names) == len(set(names)) == 41 and "b/new.html" in names
    assert record["validation"]["documents"] == len(parts[1]) and 3 <= len(parts[1]) <= 18
    assert record["train"]["documents"] + record["validation"]["documents"] == 41
    before = (tmp_path / corpus.TRAIN).stat().st_mtime_ns
    assert corpus.build(packages, tmp_path, 0.25, said.append)["sources"] == record["sources"]
    assert (tmp_path / corpus.TRAIN).stat().st_mtime_ns == before and len(said) == 2
    held_out = {document["text"] for document in parts[1]}
    corpus.build(packages[:1], tmp_path, 0.25, said.append)  # one package less
    fewer = (tmp_path / corpus.VALIDATION).read_text().splitlines()
    assert {json.loads(line)["text"] for line in fewer} <= held_out


def test_packages_that_give_nothing_are_named(tmp_path: Path) -> None:
    empty = _wheel(tmp_path, "a", {"a.py": LONG})
    with pytest.raises(UsageError, match=r"a 1.0 has no document that matches \*\.txt \*\.html"):
        corpus.build([empty], tmp_path, 0.1)
    few = _wheel(tmp_path, "c", {"1.txt": LONG})
    with pytest.raises(UsageError, match="none of 1 documents is left for"):
        corpus.build([few], tmp_path, 0.0)
    for line in ("pypi a 1.0", "npm a 1.0 *.txt"):
        with pytest.raises(UsageError, match=r"a package of \[corpus\] reads"):
            Package.parse(line)


def test_a_registry_that_gives_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "apt-get").write_text("#!/bin/sh\necho E: no such version >&2\nexit 100\n")
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    package = Package.parse("debian git-doc 1:9 *.txt")
    with pytest.raises(
        UsageError,
        match=r"debian gives no git-doc 1:9: E: no such version Run apt.*debian-git-doc-1%3a9",
    ):
        package.download(tmp_path / "packages")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="git-doc is a debian package, and apt-get is not here"):
        package.download(tmp_path / "packages")


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_debian_package(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "usr/share/doc").mkdir(parents=True)
    control = "Package: words\nVersion: 1:2\nArchitecture: all\nMaintainer: x <x@y>\n"
    (tree / "DEBIAN/control").write_text(f"{control}Description: x\n")
    (tree / "usr/share/doc/a.txt").write_text("first")
    (tree / "usr/share/doc/b.txt").write_text("second")
    subprocess.run(["gzip", str(tree / "usr/share/doc/b.txt")], check=True)
    folder = tmp_path / "packages/debian-words-1%3a2"
    folder.mkdir(parents=True)
    path = folder / "words_1%3a2_all.deb"
    done = ["dpkg-deb", "--root-owner-group", "--build", str(tree), str(path)]
    subprocess.run(done, check=True, capture_output=True)
    package = Package.parse("debian words 1:2 */doc/*.txt")
    assert package.download(tmp_path / "packages") == path
    assert [text for _, text in package.texts(path)] == ["first", "second"]
    path.write_bytes(b"no package")
    with pytest.raises(UsageError, match="dpkg-deb cannot unpack"):
        list(package.texts(path))


def test_the_study_of_the_repository() -> None:
    study = settings.read(REPOSITORY / "examples/study.ini")
    names = [run.name for run in study.runs if run.is_compared]
    assert names[:2] == ["constant-seed1", "linear-32-seed1"]  # the decisive pair
    assert {run.arm for run in study.runs if run.is_compared} == set(study.arms)
    for arm in ("constant", "linear-32", "linear-8", "pow2"):
        assert f"{arm}-seed2" in names
    main_run = next(run for run in study.runs if run.is_compared)
    assert main_run.value("--seed") == "1" and main_run.seq_length == 2048
    assert 8e6 <= main_run.train_iters * main_run.step_tokens <= 12e6
    assert 4e6 <= page._parameters(study) <= 8e6
    short = next(run for run in study.runs if run.arm == "constant-1680-steps")
    assert short.train_iters == 1680  # the arm's own word counts


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    study = settings.read(path)
    path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert settings.read(path) == study


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[arms]", "[arm]", r"has a section \[arm\]"),
        ("span = 8", "spam = 8", r"has spam in \[copying\]"),
        ("runs = ladder:1", "runs = lader:1", r"has lader:1 in \[queue\]"),
        ("runs = ladder:1", "runs = ladder:x", r"has ladder:x in \[queue\]"),
        ("runs = ladder:1", "runs = twin:1", "twin-seed1 in .queue. twice"),
        ("--train-iters 60", "", "gives no --train-iters"),
        ("vocab-size = 300", "vocab-size = many", "vocab-size = many is not a number"),
        ("pypi words 1.0 *.txt", "", r"gives no packages in \[corpus\]"),
        ("[copying]", "[copying", "cannot be read"),
        ("--lr 3e-3", "--lr=3e-3", r"\[training\] has --lr=3e-3. Write it as two words: --lr 3e-3"),
        (
            "fraction 0.5 --train-iters 20",
            "fraction 0.5 --train-iters=20",
            r"time in \[timing\] has",
        ),
        ("--train-iters 60", "--train-iters 6e1", "ladder has --train-iters 6e1. Give a whole"),
        ("eval-lengths 16", "eval-lengths 16,x", "ladder has --skyladder-eval-lengths x. Give"),
        ("distances = 16 32", "distances = 16 x32", "distances has x32. Give tokens"),
        (
            "distances = 16 32",
            "distances = 16 57",
            "cannot stand 57 tokens apart in a sequence of 64",
        ),
        ("span = 8", "span = 4", "Give a span above 4 tokens"),
        ("[queue]", "[against]\ntwin = lader\n[queue]", r"has lader in \[against\]"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write_study(tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UsageError, match=message):
        settings.read(path)


def test_time_of_steps_that_were_not_timed() -> None:
    """The median of four on either side; of a step that was trained twice the last time counts."""
    timed: dict[int, float | None] = {1: None, 2: 1.0, 3: 3.0, 4: None, 5: 9.0, 6: 5.0}
    rows: list[dict[str, float | None]] = [{"iteration": 5, "cpu": 90.0}]
    rows += [{"iteration": step, "cpu": spent} for step, spent in timed.items()]
    # beside step 1: 1 3 9 5; beside step 4: 1 3 | 9 5; behind step 7: 1 3 9 5
    assert step_seconds(rows, 7) == [4.0, 1.0, 3.0, 4.0, 9.0, 5.0, 4.0]
    assert step_seconds([{"iteration": 1, "cpu": None}], 1) is None


def test_rows_survive_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    append_row(path, {"iteration": 1})
    with path.open("a") as file:
        file.write('{"iterat')
    assert read_rows(path) == [{"iteration": 1}]


def test_figures_over_seeds() -> None:
    assert Figure((1.0, 6.0, 2.0)).text(1) == "3.0 (1.0, 6.0, 2.0)"  # in the order of the seeds
    assert Figure((1.01, 1.04)).text(1) == "1.0"  # no spread that can be seen
    assert Figure((-0.02,)).text(3, signed=True) == "-0.020"
    assert Figure((0.1, 0.2)).text(0, scale=100) == "15 (10, 20)"
    assert results.figure([None, None]) is None


def test_differences_are_of_pairs() -> None:
    found = results.difference(QUICK, CONSTANT, results.final_difference)
    assert found is not None and found.values == pytest.approx((-0.2,))  # seed 1 alone is in both
    assert results.difference(QUICK, Arm("x", CONSTANT.records[1:]), results.time_saved) is None
    saved = results.time_saved(QUICK.records[0], CONSTANT.records[0])
    assert saved == pytest.approx(1 - 250 / 300)


def test_what_a_difference_has_to_exceed() -> None:
    """Student's t by hand: 12.706, 4.303 and 3.182 at 95 % with 1, 2 and 3 degrees of freedom."""
    assert results.scatter([]) is None and results.scatter([None, Figure((0.3,))]) is None
    one = results.scatter([Figure((-0.1, 0.1)), Figure((5.0,))])  # 0.1^2 + 0.1^2 over 1
    assert one is not None and one.freedom == 1
    assert one.deviation == pytest.approx(math.sqrt(0.02))
    assert one.bar(1) == pytest.approx(12.706 * math.sqrt(0.02), rel=1e-4)
    assert one.bar(4) == pytest.approx(12.706 * math.sqrt(0.02) / 2, rel=1e-4)
    two = results.scatter([Figure((-0.1, 0.1)), Figure((0.5, 0.5))])
    assert two is not None and two.bar(1) == pytest.approx(4.303 * 0.1, rel=1e-3)
    three = results.scatter([Figure((-0.1, 0.1)), Figure((0.6, 0.3, 0.3))])  # 0.02 + 0.06 over 3
    assert three is not None and three.bar(1) == pytest.approx(
        3.182 * math.sqrt(0.08 / 3), rel=1e-3
    )
    equal = results.scatter([Figure((0.3, 0.3))])
    assert equal is not None and equal.bar(1) == 0.01  # what the paper counts as no difference


def test_runs_of_one_command_are_repetitions() -> None:
    flags = ["-m", "x", "--lr", "1"]
    runs = [
        replace(CONSTANT.records[0], arm=name, command=[*words, "--save", f"runs/{name}"])
        for name, words in (
            ("a", flags),
            ("b", [*flags, "--seed", "2"]),
            ("c", flags),
            ("d", flags),
        )
    ]
    found = [(it.arm, first.arm) for it, first in results.repeated(runs)]
    assert found == [("c", "a"), ("d", "a")]


def test_losses_at_equal_time() -> None:
    """Runs of the reference that end after 100, 200 and 400 s at 5, 4 and 3."""
    points = [(100.0, 5.0), (200.0, 4.0), (400.0, 3.0)]
    after = [results.loss_after(points, seconds) for seconds in (100, 150, 300, 400, 475, 25)]
    assert after == pytest.approx([5.0, 4.5, 3.5, 3.0, 2.625, 5.75])  # a quarter of 300 s beyond
    assert results.loss_after(points, 476) is None and results.loss_after(points, 24) is None
    assert results.loss_after(points[:1], 100) is None
    assert results.loss_after([(100.0, None), (200.0, 4.0)], 150) is None

    long = _record("ladder", 1, (6.0, 4.0), (100.0, 300.0))
    short = _record("short", 1, (4.4,), (200.0,))
    quick = QUICK.records[0]  # 3.8 after 250 s; one nat more at 16, in all
    assert results.equal_time_difference(quick, [long, short]) == pytest.approx(3.8 - 4.2)
    assert results.equal_time_difference(quick, [long, short], 16) == pytest.approx(3.8 - 4.2)
    assert results.equal_time_difference(quick, [long, short], 32) is None
    assert results.equal_time_difference(quick, [long]) is None
    untimed = replace(quick, validations=[replace(quick.last, seconds=None)])
    assert results.equal_time_difference(untimed, [long, short]) is None


def test_a_shorter_run_of_the_reference_is_known_by_its_flags() -> None:
    flags = ["-m", "x", "--train-iters", "60", "--seed", "1"]
    folder = ["--save", "runs/a", "--load", "runs/a", "--save-retain-interval", "600"]
    other = ["--save", "runs/b", "--load", "runs/b", "--save-retain-interval", "400"]
    long = replace(CONSTANT.records[0], command=[*flags, *folder])
    for words, expected in (
        ([*flags, "--train-iters", "40", *other], True),
        ([*flags, "--lr", "1", *other], False),
        ([*flags[:-1], "2", *other], False),
    ):
        assert results.is_shorter(replace(long, command=words), long) == expected


def test_held_out_losses_by_hand() -> None:
    """Two sequences of 6; a model whose loss is how many tokens it has not seen of its last 4."""
    tokens = np.arange(15)
    seen: list[tuple[int, ...]] = []

    def loss_sum(given: np.ndarray, wanted: np.ndarray) -> float:
        assert (wanted == given + 1).all()
        seen.extend(tuple(row) for row in given)
        return float(sum(max(0, 3 - place) for row in given for place in range(len(row))))

    found = held_out.measure(loss_sum, tokens, (2, 4, 6), seq_length=6)
    # a block of 6: 3 + 2 + 1 + 0 + 0 + 0; of 4: 6, and the 2 left over: 5; of 2: 5, three times
    assert found == {2: 2 * 15 / 12, 4: 2 * 11 / 12, 6: 2 * 6 / 12}
    assert seen[:6] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)]
    assert seen[6:10] == [(0, 1, 2, 3), (6, 7, 8, 9), (4, 5), (10, 11)]
    assert seen[10:] == [tuple(range(6)), tuple(range(6, 12))]
    with pytest.raises(ValueError, match="too few for a sequence of 15"):
        held_out.measure(loss_sum, tokens, (2,), seq_length=15)


def test_records_of_another_study_are_refused(tmp_path: Path) -> None:
    config = write_study(tmp_path, "ladder:1 twin:1")
    study = settings.read(config)
    one, two = (
        replace(_of_study(config, it), corpus="text")
        for it in (CONSTANT.records[0], QUICK.records[0])
    )
    records.check([one, two], study, tmp_path)
    command = [*one.command[:2], *one.command[4:], *one.command[2:4]]  # another order
    command[command.index("--save") + 1] = "runs/name-of-then"
    overruled = [*command[:2], "--lr", "1", *command[2:]]
    records.check([replace(one, command=overruled), two], study, tmp_path)
    command[command.index("--lr") + 1] = "7"
    with pytest.raises(UsageError, match=r"ladder-seed1.json is of .* other flags \(--lr\)"):
        records.check([replace(one, command=command), two], study, tmp_path)
    with pytest.raises(UsageError, match=r"twin-seed1.json is of a run with other text"):
        records.check([one, replace(two, corpus="other")], study, tmp_path)
    with pytest.raises(UsageError, match=r"ladder-seed1.json is of a run with other text"):
        records.check([one, two], study, tmp_path, "mine")


@pytest.mark.parametrize(
    ("old", "new", "then"),
    [
        ("span = 8", "span = 12", "span = 8"),
        ("samples = 4", "samples = 5", "samples = 4"),
        ("distances = 16 32", "distances = 16", "distances = 16 32"),
        ("distances = 16 32", "distances =", "distances = 16 32"),
        ("distances = 16 32\nspan = 8", "distances = 24\nspan = 9", "distances = 16 32, span = 8"),
    ],
)
def test_figures_of_another_test_are_not_relabelled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, then: str
) -> None:
    config = write_study(tmp_path, "ladder:1")
    output = tmp_path / "study"
    path = records.write(_of_study(config, CONSTANT.records[0]), output / queue.RECORDS)
    text = config.read_text()
    for what in ("--status", "--write"):
        config.write_text(text.replace(old, new))
        assert main(["study", str(config), what, "--output", str(output)]) == 1
        message = " ".join(capsys.readouterr().err.split())
        assert "ladder-seed1.json was measured with other values in [copying]" in message
        assert f"Give those of then ({then}), or move the record away: --run measures" in message
    config.write_text(text.replace("16 32", "32 16"))  # the order decides nothing
    assert main(["study", str(config), "--status", "--output", str(output)]) == 0
    records.write(replace(records.read(path), losses={}), output / queue.RECORDS)
    config.write_text(text.replace(old, new))  # trained, and not measured yet
    assert main(["study", str(config), "--status", "--output", str(output)]) == 0


def test_records_that_do_not_say_how_copying_was_tested(tmp_path: Path) -> None:
    """As earlier versions wrote them: those in docs/experiments had these values."""
    path = records.write(CONSTANT.records[0], tmp_path)
    values = json.loads(path.read_text())
    del values["copying_test"]
    path.write_text(json.dumps(values))
    assert records.read(path).copying_test == settings.Copying((16,), 32, 64)
    study = settings.read(REPOSITORY / "examples/study.ini")
    found = [it for it in records.read_all(REPOSITORY / study.records) if it.losses]
    assert {it.copying_test for it in found} == {study.copying}


def test_status_of_a_run_with_other_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_study(tmp_path)
    output = tmp_path / "study"
    records.write(_of_study(config, CONSTANT.records[0]), output / queue.RECORDS)
    command = ["study", str(config), "--status", "--output", str(output)]
    assert main(command) == 0
    assert "1 of 4 runs are finished" in capsys.readouterr().out
    config.write_text(config.read_text().replace("--lr 3e-3", "--lr 1e-3"))
    assert main(command) == 1
    assert "ladder-seed1.json is of a run with other flags (--lr)" in capsys.readouterr().err


def _ramp(seconds: list[float], *flags: str) -> Record:
    """A timing run of windows 16, 64, 64, 128, 128, 128."""
    windows = (16, 64, 64, 128, 128, 128)
    curve = [(step, 5.0, window) for step, window in enumerate(windows, start=1)]
    record = replace(CONSTANT.records[0], arm="time", curve=curve, steps=6, command=list(flags))
    return replace(record, is_timing=True, step_seconds=seconds)


def test_arms_have_the_time_of_timing_runs() -> None:
    """By hand: 1 s at 16, 3 s (median of 2, 4) at 64, 5 s (of 9, 5, 4) at 128, linear between."""
    ramp = _ramp([1.0, 2.0, 4.0, 9.0, 5.0, 4.0])
    costs = timing.costs_of(timing.clock([ramp, CONSTANT.records[0]]))
    assert list(costs) == [("local", False)]
    assert list(costs[("local", False)].of([8, 16, 40, 64, 96, 128, 999])) == [1, 1, 2, 3, 4, 5, 5]

    # windows of 30 steps: 16 until the 10th, then linear to 64 at the 20th, and 128 at the 30th
    arm = replace(CONSTANT.records[0], curve=[(10, 5.0, 16), (20, 5.0, 64), (30, 5.0, 128)])
    first, second = 10 * 1.0, sum(1 + 0.2 * step for step in range(1, 11))
    third = sum(3 + 0.2 * step for step in range(1, 11))
    times = [it.seconds for it in timing.retimed(arm, costs[("local", False)]).validations]
    assert times == pytest.approx([first, first + second, first + second + third])


def test_arms_on_different_clocks_are_not_compared() -> None:
    """One machine's timing runs are the clock; an arm of a kind that it has not has no time."""
    plain, other = CONSTANT.records[0], replace(QUICK.records[0], command=["--skyladder-mask"])
    other = replace(other, command=["--skyladder-mask", "sliding", "--skyladder-intra-document"])
    assert timing.kind_of(plain) == ("local", False)
    assert timing.kind_of(other) == ("sliding", True)

    def times(*found: Record) -> list[float | None] | None:
        runs = timing.retime(found)
        return None if runs is None else [it.last.seconds for it in runs]

    ramp, twice = _ramp([1.0] * 6), _ramp([2.0] * 6, *other.command)
    assert times(plain, other) is None
    assert times(plain, other, twice, ramp) == [30, 60]
    assert times(plain, other, ramp) == [30, None]
    elsewhere = replace(_ramp([5.0] * 6), machine={"processor": "another"})
    assert times(plain, other, elsewhere, ramp, twice) == [30, 60]
    assert times(plain, plain, other, elsewhere, twice) == [150, 150, None]
    assert times(plain, other, other, elsewhere, twice) == [None, 60, 60]


def test_copying_is_exact() -> None:
    """A model that looks back as far as the distance copies all; one that cannot gets nothing."""
    text = np.arange(40)[None] % 7
    spans = np.array([[11, 12, 13, 14, 15, 16]])
    filled = copying.sequences(text, spans, seq_length=40, distance=10)
    assert filled[0, 24:30].tolist() == filled[0, 34:40].tolist() == [11, 12, 13, 14, 15, 16]
    assert filled[0, :24].tolist() == text[0, :24].tolist()
    for distance in (5, 35):
        with pytest.raises(UsageError, match="Give distances from 6 to 34"):
            settings.Copying((10, distance), span=6).check(40)

    def predict(sequences: np.ndarray, count: int) -> np.ndarray:
        """Look 16 tokens back for the token before, and say what followed it there."""
        logits = np.zeros((len(sequences), count, 500))
        for row, sequence in enumerate(sequences):
            for place in range(count):
                here = len(sequence) - count + place
                for back in range(1, 17):
                    if sequence[here - 1 - back] == sequence[here - 1]:
                        logits[row, place, sequence[here - back]] = 50.0
                        break
        return logits

    found = copying.measure(
        predict,
        np.zeros(200, dtype=np.uint16),
        (8, 24),
        span=8,
        samples=6,
        seq_length=40,
        vocab_size=500,
        left_out=3,
    )
    assert found[8]["accuracy"] == 1.0 and found[24]["accuracy"] == 0.0
    assert found[24]["loss"] > found[8]["loss"]


def test_scores_leave_the_cue_out() -> None:
    logits = np.zeros((1, 6, 4))
    logits[0, 4, 2], logits[0, 5, 1] = 1.0, 1.0
    accuracy, loss = copying.scores(logits, np.array([[0, 0, 0, 0, 2, 3]]))
    assert accuracy == 0.5
    total = math.log(3 + math.e)
    assert loss == pytest.approx((total - 1 + total) / 2)


def test_the_learning_rate_on_the_page(tmp_path: Path) -> None:
    """A better one is said; the longest runs decide, of one window, and in order of the rate."""
    pytest.importorskip("matplotlib")
    config = write_study(tmp_path, "other:1 ladder:1 high:1 short:1 short-high:1")
    ladder = "--skyladder-start-window 8 --skyladder-expand-fraction 0.5"
    sweep = f"""
[sweep]
high = {ladder} --lr 6e-3
other = --skyladder-schedule constant --lr 6e-3
short = {ladder} --train-iters 30
short-high = {ladder} --lr 6e-3 --train-iters 30

[arms]"""
    config.write_text(config.read_text().replace("\n[arms]", sweep))

    def add(*runs: tuple[str, float]) -> str:
        for arm, loss in runs:
            record = replace(_record(arm, 1, (9.0, loss), (1.0, 2.0)), is_sweep=arm != "ladder")
            records.write(_of_study(config, record), tmp_path / "study" / queue.RECORDS)
        assert main(["study", str(config), "--write", "--output", str(tmp_path / "study")]) == 0
        return " ".join((tmp_path / "docs/experiments.md").read_text().split())

    text = add(("short", 5.0), ("short-high", 4.0), ("high", 1.0), ("other", 0.5))
    assert "**With the learning rate 6e-3, `ladder` came to a lower loss in 30 steps than" in text
    text = add(("ladder", 0.9))
    assert "came to a lower loss" not in text
    assert "all arms train with 3e-3." in text
    table = text[text.index("| run | steps | learning rate") :].partition(" ## ")[0]
    assert table.split(" | --- | ")[-1].endswith(
        "| `short` | 30 | 3e-3 | 12.0000 | | `short-high` | 30 | 6e-3 | 11.0000 | "
        "| `ladder` | 60 | 3e-3 | 7.9000 | | `other` | 60 | 6e-3 | 7.5000 | "
        "| `high` | 60 | 6e-3 | 8.0000 |"
    )


def test_a_record_comes_back_whole(tmp_path: Path) -> None:
    record = CONSTANT.records[0]
    assert records.read(records.write(record, tmp_path)) == record
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad.json is no record of a run"):
        records.read(tmp_path / "bad.json")


def test_the_page_with_nothing_finished(tmp_path: Path) -> None:
    config = write_study(tmp_path)
    assert main(["study", str(config), "--write", "--output", str(tmp_path / "study")]) == 0
    text = (tmp_path / "docs/experiments.md").read_text()
    assert "0 of 3 runs have finished. Nothing can be compared yet." in text
    assert text.count("not finished") == 4 and "losses.png" not in text
    assert "What scale this is" in text and "The text has not been made yet." in text


def test_the_page_of_some_runs(tmp_path: Path) -> None:
    """Its figures by hand; what failed and what is missing are there."""
    pytest.importorskip("matplotlib")
    config = write_study(tmp_path, "ladder:1 ladder:2 twin:1 broken:1")
    config.write_text(config.read_text().replace("twin = ", "twin = --lr 1e-3 "))
    output = tmp_path / "study"
    for record in (*CONSTANT.records, QUICK.records[0]):
        records.write(_of_study(config, record), output / queue.RECORDS)
    failure = {"time": "2026-11-29T06:00:00+00:00", "run": "broken-seed1", "what": "exit code 2"}
    append_row(output / queue.RECORDS / records.FAILURES, failure)
    assert main(["study", str(config), "--write", "--output", str(output)]) == 0
    text = (tmp_path / "docs/experiments.md").read_text()
    words = " ".join(text.split())
    assert "3 of 4 runs have finished. **With the learning rate 1e-3, `ladder` came to" in words
    assert "No arm has several seeds yet, so nothing says which differences are noise." in words
    verdict = text[text.index("- `twin` against") :].partition("\n\n")[0]
    assert " ".join(verdict.split()) == (
        "- `twin` against `ladder`, one seed: -0.200 nats at equal tokens; 17 % less time."
    )
    assert "| `ladder` | 0.0 | 2 | 5.150 (5.000, 5.300) | 4.150 (4.000, 4.300) |" in text
    assert "| `twin` | 0.07 | +17 | - | - |" in text
    assert "The arms ran beside other work" not in text and "more than one machine" not in text
    assert "*Equal time* needs constant runs of two lengths" in text
    assert "| `ladder` | 37.5 (25.0, 50.0) |" in text  # copying
    assert "none has learnt to copy" not in text
    assert "- 2026-11-29 06:00, `broken-seed1`: exit code 2" in text
    assert "| `broken` | 1 | - | not finished |" in text
    assert "the timing runs, which put all arms on one clock, have not" in text.replace("\n", " ")
    assert (tmp_path / "docs/records/losses.png").exists()


def test_status_without_and_with_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_study(tmp_path)
    output = tmp_path / "study"
    command = ["study", str(config), "--status", "--output", str(output)]
    assert main(command) == 0
    assert capsys.readouterr().out.count("waiting") == 4
    folder = output / "runs/ladder-seed1"
    folder.mkdir(parents=True)
    append_row(folder / "events.jsonl", {"event": "started"})
    for iteration, spent in ((1, None), (2, 60.0), (3, 120.0)):
        append_row(folder / "steps.jsonl", {"iteration": iteration, "cpu": spent})
    twin = _of_study(config, replace(CONSTANT.records[0], arm="twin"))
    records.write(twin, output / queue.RECORDS)
    before = sorted(output.rglob("*"))
    failed = output / "runs/broken-seed1"
    failed.mkdir()
    append_row(failed / "events.jsonl", {"event": "failed", "what": "exit code 2", "iteration": 0})
    assert main(command) == 0
    shown = capsys.readouterr().out
    words = {line.split()[0]: line.split() for line in shown.splitlines() if "seed1" in line}
    assert words["ladder-seed1"][1:3] == ["begun", "3/60"] and "90.00" in words["ladder-seed1"]
    assert words["twin-seed1"][1:3] == ["finished", "60/60"]
    assert "broken-seed1 failed: exit code 2" in shown
    # 57 steps of the first and 60 of the failed one, 20 of the timing run, at 90 s each
    assert f"About {(57 + 60 + 20) * 90 / 3600:.1f} core hours are left" in shown
    assert "1 of 4 runs are finished." in shown
    assert sorted(output.rglob("*")) == sorted([*before, failed, failed / "events.jsonl"])
    records.write(replace(twin, losses={}), output / queue.RECORDS)
    append_row(folder / "events.jsonl", {"event": "finished"})
    assert main(command) == 0
    shown = capsys.readouterr().out
    words = {line.split()[0]: line.split()[1] for line in shown.splitlines() if "seed1" in line}
    assert words["ladder-seed1"] == "trained" and words["twin-seed1"] == "waiting"


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No queue runs there; what is there can be looked at."""

    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with (
        pytest.raises(UsageError, match=f"cannot lock {tmp_path} against .* Give a folder on"),
        queue.locked(tmp_path),
    ):
        pass
    assert not queue.is_locked(tmp_path)


def test_what_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(tmp_path / "none.ini"), "--status"]) == 1
    assert "there is no" in capsys.readouterr().err
    config = write_study(tmp_path)
    assert main(["study", str(config), "--run", "--workers", "0"]) == 1
    assert "--workers=0: give 1 or more" in capsys.readouterr().err
    assert main(["study", str(config), "--run", "--nice", "20"]) == 1
    assert "--nice=20: give 0 (as others) to 19" in capsys.readouterr().err


def test_equal_time_on_the_page(tmp_path: Path) -> None:
    """The reference at 60 and at 40 steps: 4.0 after 300 s, 4.4 after 200; the twin 3.8 at 250."""
    config = write_study(tmp_path, "ladder:1 twin:1 short:1")
    text = config.read_text().replace("twin = ", "short = --train-iters 40\ntwin = --lr 1e-3 ")
    flags = "--skyladder-start-window 8 --skyladder-expand-fraction 0.5"
    config.write_text(text.replace("short = ", f"short = {flags} "))
    for record in (
        CONSTANT.records[0],
        _record("short", 1, (4.4,), (200.0,)),
        QUICK.records[0],
    ):
        record = replace(record, copying={16: Copied(0.009, 8.0)})
        records.write(_of_study(config, record), tmp_path / "study" / queue.RECORDS)
    pytest.importorskip("matplotlib")
    assert main(["study", str(config), "--write", "--output", str(tmp_path / "study")]) == 0
    shown = (tmp_path / "docs/experiments.md").read_text()
    words = " ".join(shown.split())
    assert "linear between `ladder` and `short`, runs of 30 and 10 steps, and extrapolated" in words
    assert "No model gets more than 0 of 16 tokens right at any distance: at this" in words
    assert "17 % less time; -0.400 at equal time." in words
    assert "| `twin` | 0.07 | +17 | -0.400 | -0.400 |" in shown
    assert "| `short` | 0.06 | +33 |  |  |" in shown
    config.write_text(
        config.read_text().replace("ladder:1 twin:1", "ladder:1 ladder:2 twin:1 twin:2")
    )
    for record in (CONSTANT.records[1], replace(QUICK.records[0], seed=2)):
        records.write(_of_study(config, record), tmp_path / "study" / queue.RECORDS)
    assert main(["study", str(config), "--write", "--output", str(tmp_path / "study")]) == 0
    words = " ".join((tmp_path / "docs/experiments.md").read_text().split())
    assert "against `ladder`, 2 seeds: -0.350 (-0.200, -0.500) nats at equal tokens, inc" in words
    assert "-0.400 at equal time, one seed, inconclusive." in words
    assert "0.02 to 0.04 nats, is too small to be seen here." in words


def test_a_machine_is_called_by_name_and_instructions(tmp_path: Path) -> None:
    """An early record has no word of the instructions, a later one had them in the name."""
    shown = {
        "AMD Ryzen 7 PRO with Radeon Graphics": "AMD Ryzen 7 PRO with Radeon Graphics "
        "(instructions not recorded), torch 2.15.0",
        "AMD EPYC with avx2": "AMD EPYC with avx2, torch 2.15.0",
    }
    for name, text in shown.items():
        record = replace(CONSTANT.records[0], machine={"processor": name, "torch": "2.15.0"})
        assert tables.machine_of(records.read(records.write(record, tmp_path))) == text
    for found, text in (("", "Neoverse-N1"), ("avx512f", "Neoverse-N1 with avx512f")):
        machine = {"processor": "Neoverse-N1", records.INSTRUCTIONS: found}
        record = replace(CONSTANT.records[0], machine=machine)
        assert tables.machine_of(records.read(records.write(record, tmp_path))) == text
    assert {"processor", records.INSTRUCTIONS, "torch"} <= records.machine().keys()


def test_a_seed_without_a_difference_is_not_extrapolated(tmp_path: Path) -> None:
    """Seed 1 ends between the budgets; seed 2 so far beyond that it has no figure at all."""
    budgets = {
        seed: [
            _record("ladder", seed, (6.0, 5.0, 4.0), (100.0, 200.0, 300.0)),
            _record("short", seed, (4.4,), (200.0,)),
        ]
        for seed in (1, 2)
    }
    given: Any = SimpleNamespace(budgets=budgets.__getitem__)
    times = [_record("other", 1, (3.9,), (250.0,)), _record("other", 2, (3.9,), (900.0,))]
    found = tables.at_equal_time(given, Arm("other", tuple(times)))
    assert found is not None and len(found.values) == 1
    assert not tables.is_extrapolated(given, Arm("other", tuple(times)))
    near = Arm("other", (times[0], _record("other", 2, (3.9,), (310.0,))))
    assert tables.is_extrapolated(given, near)


def test_arms_on_the_page_against_what_they_vary(tmp_path: Path) -> None:
    """Two seeds of two arms, two machines, a run that was repeated, a time beyond the budgets."""
    config = write_study(
        tmp_path, "ladder:1 ladder:2 short:1 twin:1 twin:2 other:1 other:2 again:1"
    )
    ladder = "--skyladder-start-window 8 --skyladder-expand-fraction 0.5"
    text = config.read_text().replace(
        "[arms]",
        f"[sweep]\nagain = {ladder}\n\n[against]\nother = twin\n\n[arms]",
    )
    arms = f"short = {ladder} --train-iters 40\nother = --lr 2e-3\ntwin = --lr 1e-3 "
    config.write_text(text.replace("twin = ", arms))
    runs = [
        *CONSTANT.records,
        _record("short", 1, (4.4,), (200.0,)),
        *(
            _record("twin", *it, (90.0, 180.0, 280.0))
            for it in ((1, (6, 5, 4.1)), (2, (6, 5, 4.4)))
        ),
        *(
            _record("other", *it, (60.0, 120.0, 180.0))
            for it in ((1, (6, 5, 3.5)), (2, (6, 5, 3.81)))
        ),
        replace(_record("again", 1, (4.25,), (1.0,)), is_sweep=True, machine={"processor": "new"}),
    ]
    for record in runs:
        records.write(_of_study(config, record), tmp_path / "study" / queue.RECORDS)
    pytest.importorskip("matplotlib")
    command = ["study", str(config), "--write", "--output", str(tmp_path / "study")]
    assert main(command) == 0
    shown = (tmp_path / "docs/experiments.md").read_text()
    words = " ".join(shown.split())
    # +0.1 and +0.1 for the twin, -0.5 and -0.49 for the other: 5e-5 over 2, times 4.303
    assert "scatters by 0.01 nats (2 degrees of freedom): below 0.02 with one seed and" in words
    assert "`twin` against `ladder`, 2 seeds: +0.100 nats at equal tokens, worse;" in words
    assert "`other` against `ladder`, 2 seeds: -0.495 (-0.500, -0.490) nats at equal to" in words
    # 180 s: before the first of the budgets, 200 s
    assert "better; 41 % less time; -0.980 at equal time, one seed, extrapolated, better." in words
    assert (
        "`other` against `twin`, 2 seeds: -0.595 (-0.600, -0.590) nats at equal tokens, b" in words
    )
    assert words.count("too small to be seen here") == 0  # 0.02 nats could be
    # the line from 4.4 after 200 s to 4.0 after 300 s, extrapolated to 180 s
    assert "| `other` | 0.05 | +41 (+40, +42) | -0.980* | -0.980* |" in shown
    assert "| `twin` | 0.08 | +8 (+7, +10) | +0.020 | +0.020 |" in shown
    assert "| `again` | 1 | B | finished |" in shown
    assert (
        "`again-seed1` is the command of `ladder-seed1` once more, on B in place of A: its "
        in words
    )
    assert "last validation is +0.2500 nats from that." in words
    twin = replace(runs[4], machine={"processor": "new"})  # an arm now, and no clock
    records.write(_of_study(config, twin), tmp_path / "study" / queue.RECORDS)
    assert main(command) == 0
    shown = (tmp_path / "docs/experiments.md").read_text()
    assert "The arms ran on more than one machine, so that their times cannot" in shown
    assert "less time" not in shown and "| `other` | - | - | - | - |" in shown
    words = " ".join(shown.split())
    assert "`twin` against `ladder`, 2 seeds, one on two machines: +0.100" in words
    assert "`other` against `twin`, 2 seeds, one on two machines: -0.595" in words
    assert "`other` against `ladder`, 2 seeds: -0.495" in words
    assert "B: new (instructions not recorded)" in words


def test_records_of_the_page_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_study(tmp_path, "ladder:1 twin:1")
    study, output = settings.read(config), tmp_path / "study"
    record = replace(_of_study(config, CONSTANT.records[0]), corpus="text")
    path = records.write(record, study.records)
    assert main(["study", str(config), "--status", "--output", str(output)]) == 0
    assert "1 more have records in" in capsys.readouterr().out
    assert main(["study", str(config), "--status", "--continue"]) == 1
    assert "--continue goes with --run" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"docs/records/ladder-seed1.json is of .* other text"):
        queue.take(study, output, "other")
    (output / queue.RECORDS).mkdir()
    append_row(study.records / records.FAILURES, {"run": "ladder-seed1", "what": "exit code 2"})
    assert queue.take(study, output, "text") == 1 and queue.take(study, output, "text") == 0
    assert read_rows(output / queue.RECORDS / records.FAILURES)[0]["what"] == "exit code 2"
    taken = output / queue.RECORDS / path.name
    assert taken.read_bytes() == path.read_bytes() and queue.is_finished(study.runs[0], output)
    assert main(["study", str(config), "--status", "--output", str(output)]) == 0
    assert "1 of 2 runs are finished" in capsys.readouterr().out


def test_an_arm_without_a_clock_is_named_on_the_page(tmp_path: Path) -> None:
    config = write_study(tmp_path, "ladder:1 twin:1 time:1")
    text = config.read_text().replace("twin = ", "twin = --skyladder-intra-document ")
    config.write_text(text)
    for record in (CONSTANT.records[0], QUICK.records[0], _ramp([1.0] * 6)):
        records.write(_of_study(config, record), tmp_path / "study" / queue.RECORDS)
    pytest.importorskip("matplotlib")
    assert main(["study", str(config), "--write", "--output", str(tmp_path / "study")]) == 0
    shown = (tmp_path / "docs/experiments.md").read_text()
    assert "No timing run of their masks has finished on the same machine: `twin`." in " ".join(
        shown.split()
    )
    assert "| `twin` | - | - | - | - |" in shown


def test_the_page_of_a_queue_without_arms(tmp_path: Path) -> None:
    config = write_study(tmp_path, "time:1")
    assert main(["study", str(config), "--write", "--output", str(tmp_path / "study")]) == 0
    assert "0 of 0 runs have finished." in (tmp_path / "docs/experiments.md").read_text()


def test_text_of_other_settings_is_refused(tmp_path: Path) -> None:
    config = write_study(tmp_path)
    output = tmp_path / "study"
    made = preparation.make(settings.read(config), output, lambda text: None)
    assert preparation.make(settings.read(config), output, lambda text: None) == made
    text = config.read_text()
    config.write_text(text.replace("= 300", "= 320").replace("share = 0.3", "share = 0.2"))
    with pytest.raises(UsageError, match="made with other validation-share and vocab-size in"):
        preparation.make(settings.read(config), output, lambda text: None)
