"""Documents that are to be masked and cannot be found: said aloud, once, or refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from runs import EOD, Run, Trainer

from megatron_skyladder.data.indexed import IndexedWriter, read_counts
from megatron_skyladder.data.record import write_record
from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron

RUN = (
    "--train-samples 16 --micro-batch-size 2 --skyladder-schedule constant "
    "--skyladder-intra-document"
)
STRICT = "--skyladder-require-documents"
NOT_IN_THE_DATA = r"do not end in the tokenizer's end-of-document token \(NullTokenizer: {eod}\)"
NO_SEQUENCE = r"none of the first 8 sequences has the end-of-document token {eod},"
HOW_TO_LOOK = r"To look: skyladder inspect {prefix} --eod-id {eod}"


def copied(documents: Path, folder: Path, settings: dict[str, object]) -> Path:
    """Return a copy of the data, with the record of ``skyladder prepare``."""
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{documents}{suffix}", folder / f"recorded{suffix}")
    found = read_counts(documents)
    settings = {"dtype": found.dtype.name, **settings}
    counts = {"tokens": found.num_tokens, "documents": found.num_documents}
    write_record(f"{folder}/recorded", {"settings": settings, **counts})
    return folder / "recorded"


def written(documents: Path, folder: Path, lengths: list[int], end: int | None) -> Path:
    """Return data of random documents that end in ``end``, or in any token."""
    generator = np.random.default_rng(0)
    with IndexedWriter(folder / "written", np.dtype(np.uint16)) as writer:
        for length in lengths:
            tokens = generator.integers(0, EOD, length)
            tokens[-1] = tokens[-1] if end is None else end
            writer.add_document(tokens)
    return folder / "written"


@dataclass(frozen=True)
class Case:
    """Data and flags, and what has to be said before training and after the first batch."""

    before: str | None
    after: str | None
    flags: str = ""
    eod: int = EOD
    data: Callable[[Path, Path], Path] = lambda documents, folder: documents


ANOTHER = {"flags": f"--vocab-size {EOD + 2}", "eod": EOD + 1}  # the vocabulary's last token
SHORT, LONG = [20] * 400, [5000, 5000]
CASES = {
    "fine": Case(None, None),
    "another token": Case(
        rf"{NOT_IN_THE_DATA}[^:]*:\n  \S+: 0 of 400 sampled documents end in it; 400 end in 126",
        NO_SEQUENCE,
        **ANOTHER,
    ),
    "another token, as recorded": Case(
        rf"{NOT_IN_THE_DATA}[^:]*:\n  \S+: prepared with the end-of-document token 126",
        NO_SEQUENCE,
        data=lambda documents, folder: copied(documents, folder, {"eod": EOD, "append_eod": True}),
        **ANOTHER,
    ),
    "no token": Case(
        rf"{NOT_IN_THE_DATA}[^:]*:\n  \S+: 0 of 400 sampled documents end in it; "
        "they were written without an end-of-document token",
        NO_SEQUENCE,
        data=lambda documents, folder: written(documents, folder, SHORT, None),
    ),
    "overwritten as padding": Case(
        r"padding token is its end-of-document token \({eod}\), and with "
        "--allow-ambiguous-pad-tokens Megatron's dataset overwrites it",
        NO_SEQUENCE,
        flags=f"--null-tokenizer-pad-id {EOD} --allow-ambiguous-pad-tokens",
    ),
    "longer than sequences": Case(
        None, NO_SEQUENCE, data=lambda documents, folder: written(documents, folder, LONG, EOD)
    ),
}


def train(trainer: Trainer, case: Case, folder: Path, flags: str = "", **options: object) -> Run:
    data = case.data(trainer.documents, folder)
    return trainer.train(
        f"{RUN} --data-path {data} --data-cache-path {folder} {case.flags} {flags}", **options
    )


def times_said(pattern: str, case: Case, run: Run, rank: int = 0) -> int:
    return len(re.findall(pattern.replace("{eod}", str(case.eod)), run.log(rank)))


@pytest.mark.parametrize("name", CASES)
def test_it_is_said_once(trainer: Trainer, name: str, tmp_path: Path) -> None:
    case = CASES[name]
    layout = "--tensor-model-parallel-size 2" if name == "another token" else ""  # two readers
    run = train(trainer, case, tmp_path, layout, num_processes=4 if layout else 1)
    said = [pattern for pattern in (case.before, case.after) if pattern]
    assert [times_said(pattern, case, run) for pattern in said] == [1] * len(said)
    assert run.log().count("(--skyladder-require-documents refuses such a run.)") == len(said)
    for rank in range(1, len(run.exit_codes)):
        assert "end-of-document" not in run.log(rank)
    if case.before and "padding" not in name:
        assert times_said(HOW_TO_LOOK.replace("{prefix}", r"/\S+"), case, run) == 1
    if case.after:
        assert times_said(HOW_TO_LOOK.replace("{prefix}", "PREFIX"), case, run) == 1


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_on_request(trainer: Trainer, name: str, tmp_path: Path) -> None:
    case = CASES[name]
    run = train(
        trainer,
        case,
        tmp_path,
        STRICT,
        exit_codes=(2,) if case.after else (0,),
        environment={"SKYLADDER_TRACEBACK": ""},
    )
    expected = case.before or case.after
    if expected is not None:
        refusal = rf"error: --skyladder-require-documents: [^\n]*{expected}"
        assert times_said(refusal, case, run) == 1
        assert len(run.of("step")) == (1 if case.before is None else 0)
