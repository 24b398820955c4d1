"""docs/experiments.md: what came out, from the records of finished runs and nothing else."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path

from megatron_skyladder.files import write_text
from megatron_skyladder.planning import model_flags, run_flags
from megatron_skyladder.study import records, results, timing, verdicts
from megatron_skyladder.study.markdown import date, folded, listed, table, wrapped
from megatron_skyladder.study.preparation import TOKENIZER_CHARACTERS
from megatron_skyladder.study.settings import Study
from megatron_skyladder.study.tables import (
    BEYOND,
    Given,
    copying_part,
    losses,
    machine_of,
    machines,
    rates,
    runs,
    times,
)
from megatron_skyladder.study.training import read_rows

PICTURE = "losses.png"

HEAD = """\
# Experiments

The paper's comparison at a scale that two CPU cores can rerun: one small model, one text, and arms
that differ in their windows. `skyladder study --write` makes this page from the records in
`{records}/`, one file for each finished run; `{config}` says what is run.

"""

LIMITS = """\
**What scale this is**: a model of {parameters} million parameters, {tokens} million tokens for each
run, sequences of {seq_length:,} tokens, on one CPU core each. That is {per_parameter} tokens for
each parameter; in the paper it is 33 (3 billion parameters, 100 billion tokens) to 833 (120
million), in sequences of 8,192 and more. So these runs end where the paper's have hardly begun.
{context} What is below does not show whether ladders help in a real run, or by how much, that an
order among schedules holds at another scale, or anything about benchmarks and the speed of a GPU.
"""

HOW_TO_READ = """\
Losses are nats per token of the trained models, lower is better, by how many tokens of context they
see; every model reads the same tokens, all of the held-out text. It sees other documents too, also
where it was trained with documents masked. Figures in parentheses are the seeds, the lowest number
first. Differences are between runs of the same seed, which start from the same weights and read the
same text in the same order."""

TIMED = """\
Time is that of training alone, on one core of machine {machine}: each step counts what steps with
such a window and mask took in the timing runs ({names}), their median, linear between windows that
were timed and below the shortest as that one. The arms ran beside other work, so
what they took themselves, in the table of runs, says less about their windows. There is one timing
run for each mask: a saving is good to a few percent, less is none, and it is of this processor."""

UNTIMED = """\
Time is the CPU time of the training process, validation and checkpoints left out. The runs shared
caches and memory with other work, which moves it by a tenth and more; the timing runs, which put
all arms on one clock, have not finished."""

SEVERAL_MACHINES = """\
The arms ran on more than one machine, so that their times cannot be compared; the timing runs,
which put all arms on one clock, have not finished."""

NOT_TIMED = """\
No timing run of their masks has finished on the same machine: {names}."""

EQUAL_TIME = """\
*Equal time* is the difference to a constant run that ends after the same time with a whole
learning-rate schedule: linear between `{names}`, runs of {steps} steps, and extrapolated where the
time is not between theirs ({mark})."""

NO_EQUAL_TIME = """\
*Equal time* needs constant runs of two lengths at least, which have not finished."""

PICTURED = """\
Above: the trained models, a point for each seed; grey is what one seed leaves inconclusive. Below:
one seed of each arm against `{reference}` of that seed, along the run and by how much context the
trained model sees."""

REPEATED = """\
`{name}` is the command of `{first}` once more, {where}: its last validation is
{difference:+.4f} nats from that."""


RERUN = """\
## Rerun it

In a checkout of the repository, where the packages above can be had in these versions (`apt-get
download` gets Debian's from a machine's own sources; where those have newer ones, the message says
where the `.deb` files of snapshot.debian.org go):

```
pip install '.[training,data,plot]' safetensors
skyladder study --run       # nice 19, one core for each run; Ctrl-C saves, the same command goes on
skyladder study --status    # how far, and how many core hours are left
skyladder study --write     # this page, from the records
skyladder study --run --continue  # in place of --run: goes on from this page's records
```
"""


def read(study: Study) -> Given:
    """Read the records of a study.

    Raises:
        UsageError: see `records.check`.
    """
    names = [run.name for run in study.runs]
    found = [it for it in records.read_all(study.records, names) if it.name in names]
    records.check(found, study, study.records)
    corpus = study.records / records.CORPUS
    return Given(
        study,
        found,
        read_rows(study.records / records.FAILURES),
        json.loads(corpus.read_text(encoding="utf-8")) if corpus.exists() else None,
    )


def write(study: Study, config: Path) -> None:
    """Write the page and its picture from the records.

    Args:
        study: with the folder of records and the name of the page.
        config: the study's file, which the page names.

    Raises:
        UsageError: as `read`.
    """
    given, picture = read(study), None
    if given.reference is not None and len(given.arms) > 1:
        from megatron_skyladder.study.pictures import draw

        picture = study.records / PICTURE
        draw(given, picture)
    text = page(given, config, _beside(picture, study.page) if picture else None)
    study.page.parent.mkdir(parents=True, exist_ok=True)
    write_text(study.page, text)


def page(given: Given, config: Path, picture: str | None) -> str:
    """Return the page as Markdown."""
    study = given.study
    parts = [
        HEAD.format(records=study.records.as_posix(), config=config.as_posix()),
        _limits(given),
        "\n## What came out\n\n",
        verdicts.text(given, study.arms),
        verdicts.of_families(given),
        verdicts.missing(given),
    ]
    if given.arms:
        parts += [
            f"\n{HOW_TO_READ}\n\n",
            table(losses(given)),
            f"\n{_clock(given)}\n",
            table(times(given)),
            copying_part(given),
        ]
    if picture:
        about = "Differences to the constant window: at the end, along the run, by context"
        parts.append(f"\n![{about}]({picture})\n")
        parts.append(f"\n{wrapped(PICTURED.format(reference=given.arms[0].name))}")
    parts += [
        "\n## Runs\n\n",
        table(runs(given)),
        _machines(given),
        _failures(given),
        "\n## The learning rate\n\n",
        _sweep(given),
        "\n## Text\n\n",
        _text(given),
        "\n## Commands\n\n",
        _commands(given),
        f"\n{RERUN}",
    ]
    return "".join(parts)


def _clock(given: Given) -> str:
    text = UNTIMED if given.is_of_one_machine else SEVERAL_MACHINES
    if given.retimed is not None:
        clock = timing.clock(given.found)
        names = list(dict.fromkeys(record.arm for record in clock))
        machine = dict(machines(given))[machine_of(clock[0])]
        text = TIMED.format(names=listed(names), machine=machine)
        lacking = [arm.name for arm in given.arms if all(it.seconds is None for it in arm.records)]
        if lacking:
            text += " " + NOT_TIMED.format(names=listed(lacking))
    return wrapped(f"{text} {_equal_time(given)}")


def _equal_time(given: Given) -> str:
    arms = [arm for arm in given.arms if given.is_reference(arm)]
    if len(arms) < 2:
        return NO_EQUAL_TIME
    steps = " and ".join(f"{arm.records[0].steps:,}" for arm in arms)
    names = "` and `".join(arm.name for arm in arms)
    return EQUAL_TIME.format(names=names, steps=steps, mark=BEYOND)


def _limits(given: Given) -> str:
    main = given.study.main
    parameters, tokens = _parameters(given.study), main.train_iters * main.step_tokens
    text = LIMITS.format(
        parameters=f"{parameters / 1e6:.1f}",
        tokens=f"{tokens / 1e6:.1f}",
        per_parameter=f"{tokens / parameters:.1f}",
        seq_length=main.seq_length,
        context=verdicts.context(given),
    )
    return wrapped(text)


def _parameters(study: Study) -> int:
    """Count the weights as ``skyladder plan`` does, embedding and output included."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    run_flags.add_run_flags(parser)
    words = [*study.main.flags, "--vocab-size", str(study.vocab_size)]
    flags, _ = parser.parse_known_args(words)
    return model_flags.decoder_shape(run_flags.complete(flags), []).num_parameters


def _failures(given: Given) -> str:
    if not given.failures:
        return "\nNo start of a run has failed.\n"
    lines = ["\nStarts that failed (a failed run goes on from its last checkpoint):\n"]
    names = {run.name for run in given.study.runs}
    for failure in given.failures:
        gone = "" if failure["run"] in names else " (no longer in the queue)"
        lines.append(f"- {date([failure['time']])}, `{failure['run']}`{gone}: {failure['what']}")
    return "\n".join(lines) + "\n"


def _machines(given: Given) -> str:
    """Return which machine each letter is, and how far the same run ended apart on two."""
    letters = dict(machines(given))
    if not letters:
        return ""
    text = "\n" + wrapped("; ".join(f"{letter}: {name}" for name, letter in letters.items()) + ".")
    if len(letters) > 1:
        text += wrapped(
            "Machines round differently, and small differences grow in training: a pair on two "
            "machines may differ by more than its arms."
        )
    for record, first in results.repeated(given.found):
        here, there = (letters[machine_of(it)] for it in (record, first))
        where = f"on {here}" if here == there else f"on {here} in place of {there}"
        difference = record.last.loss - first.last.loss
        name, before = record.name, first.name
        text += wrapped(
            REPEATED.format(name=name, first=before, where=where, difference=difference)
        )
    return text


def _sweep(given: Given) -> str:
    rows = rates(given)
    if len(rows) == 1:
        return "No other rate was tried.\n"
    text = (
        f"Chosen for the constant window, so that it is not handicapped: all arms train with "
        f"{given.study.main.value('--lr')}. No other arm was tuned. Each run, of one seed, has a "
        "whole learning-rate schedule; losses are the last validations, which are of the same text "
        "for runs of as many steps."
    )
    return f"{wrapped(text)}\n{table(rows)}"


def _text(given: Given) -> str:
    if given.corpus is None:
        return "The text has not been made yet.\n"
    train, held_out = given.corpus["train"], given.corpus["validation"]
    tokens = given.corpus["tokens"]
    rows = [["package", "version", "documents", "MB", "duplicates left out", "SHA-256"]]
    for source in given.corpus["sources"]:
        rows.append(
            [
                f"{source['kind']} {source['name']}",
                *(source["version"], f"{source['documents']:,}"),
                f"{source['num_bytes'] / 1e6:.1f}",
                *(f"{source['duplicates']:,}", f"`{source['sha256'][:16]}`"),
            ]
        )
    share = train["characters_in_long"] / train["characters"]
    text = (
        f"{train['documents']:,} documents for training ({train['bytes'] / 1e6:.0f} MB, "
        f"{tokens['train'] / 1e6:.1f} million tokens of a byte-level BPE with "
        f"{given.study.vocab_size:,} entries, trained on the first "
        f"{TOKENIZER_CHARACTERS / 1e6:.0f} million characters), {held_out['documents']:,} held out "
        f"({tokens['validation'] / 1e6:.2f} million tokens), chosen by a hash of their text. Only "
        "equal documents are left out as duplicates; passages may be alike. "
        f"Documents of 8,192 characters or more hold {100 * share:.0f} % of the text."
    )
    return f"{wrapped(text)}\n{table(rows)}"


def _commands(given: Given) -> str:
    rows = [["run", "its own flags"]]
    others = {run.arm: run.own for run in given.study.runs if not run.is_compared}
    rows += [[f"`{name}`", f"`{flags}`"] for name, flags in (given.study.arms | others).items()]
    about = (
        "Every run is Megatron's trainer in one process, with `SKYLADDER_DEVICE=cpu` and "
        "`OMP_NUM_THREADS=1`, in the study's folder; `skyladder study --run` starts it. Each "
        "record holds its whole command. The flags of all:"
    )
    text = (
        f"{wrapped(about)}\n```\n"
        + folded(["python -m megatron_skyladder.pretrain_gpt", *given.study.flags])
        + "\n```\n\n"
        + table(rows)
    )
    first = next((it for it in given.found if it.is_compared), None)
    if first is not None:
        words = ["python", *map(shlex.quote, first.command)]
        text += f"\nThe whole command of `{first.name}`:\n\n```\n{folded(words)}\n```\n"
    return text


def _beside(picture: Path, page: Path) -> str:
    return Path(os.path.relpath(picture, page.parent)).as_posix()
