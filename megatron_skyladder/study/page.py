"""docs/experiments.md: what came out, from the records of finished runs and nothing else."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path

from megatron_skyladder.files import write_text
from megatron_skyladder.planning import model_flags, run_flags
from megatron_skyladder.study import records, results, timing
from megatron_skyladder.study.records import Record
from megatron_skyladder.study.results import Arm, Figure
from megatron_skyladder.study.settings import Study
from megatron_skyladder.study.tables import (
    Given,
    at_equal_time,
    best_rate,
    copying_part,
    date,
    losses,
    markdown,
    rates,
    runs,
    times,
)
from megatron_skyladder.study.training import read_rows

PICTURE = "losses.png"

HEAD = """\
# Experiments

The paper's comparison at a scale that two CPU cores can rerun: the same small model, text, starting
weights and order of the text; only the window differs. `skyladder study --write` makes this page
from the records in `{records}/`, one file for each finished run; `{config}` says
what is run.

"""

LIMITS = """\
**What scale this is**: a model of {parameters} million parameters, {tokens} million tokens for each
run, sequences of {seq_length:,} tokens, on one CPU core each. That is {per_parameter} tokens for
each parameter; in the paper it is 33 (3 billion parameters, 100 billion tokens) to 833 (120
million), in sequences of 8,192 and more. So these runs end where the paper's have hardly begun.
What is below shows whether an effect exists in this setting and how it is made; it does not
show whether there is one, or how large, in a real run, that an order among schedules holds at
another scale, or anything about benchmarks and the speed of a GPU.
"""

HOW_TO_READ = """\
Losses are nats per token of the trained models, lower is better, by how many tokens of context they
see; every model reads the same tokens, all of the held-out text. Figures in parentheses are the
lowest and the highest seed. Differences are between runs of the same seed, which start from the
same weights and read the same text in the same order."""

TIMED = """\
Time is that of training alone, on one core: each step counts the median of steps with such a window
and mask in the timing runs (`{names}`). The arms ran beside other work, so what they took
themselves, in the table of runs, says less about their windows."""

UNTIMED = """\
Time is the CPU time of the training process, validation and checkpoints left out. The runs shared
caches and memory with other work, which moves it by a tenth and more; the timing runs, which put
all arms on one clock, have not finished."""

NOT_TIMED = """\
No timing run of their masks has finished on the same machine: `{names}`."""

EQUAL_TIME = """\
*Equal time* is the difference to a constant run that ends after the same time with a whole
learning-rate schedule: linear between `{names}`, runs of {steps} steps."""

NO_EQUAL_TIME = """\
*Equal time* needs constant runs of two lengths at least, which have not finished."""

PICTURED = """\
Along a run each validation takes the next held-out sequences, so the steps up and down in the first
panel are those of the text; at the same step all arms of a seed read the same."""


RERUN = """\
## Rerun it

```
pip install 'megatron-skyladder[training,data,plot]' safetensors
skyladder study --run       # nice 19, one core for each run; Ctrl-C saves, the same command goes on
skyladder study --status    # how far, and how many core hours are left
skyladder study --write     # this page, from the records
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
    if given.arms:
        from megatron_skyladder.study.pictures import draw

        picture = study.records / PICTURE
        draw(given.arms, picture)
    text = page(given, config, _beside(picture, study.page) if picture else None)
    study.page.parent.mkdir(parents=True, exist_ok=True)
    write_text(study.page, text)


def page(given: Given, config: Path, picture: str | None) -> str:
    """Return the page as Markdown."""
    study = given.study
    parts = [
        HEAD.format(records=study.records.as_posix(), config=config.as_posix()),
        _limits(study),
        "\n## What came out\n\n",
        verdicts(given, study.arms),
        _missing(given),
    ]
    if given.arms:
        parts += [
            f"\n{HOW_TO_READ}\n\n",
            markdown(losses(given)),
            f"\n{_clock(given)}\n",
            markdown(times(given)),
            copying_part(given),
        ]
    if picture:
        parts.append(f"\n![Losses against tokens and time, by context, and copying]({picture})\n")
        parts.append(f"\n{PICTURED}\n")
    parts += [
        "\n## Runs\n\n",
        markdown(runs(given)),
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
    text = UNTIMED
    if given.retimed is not None:
        names = dict.fromkeys(record.arm for record in timing.clock(given.found))
        text = TIMED.format(names="`, `".join(names))
        lacking = [arm.name for arm in given.arms if all(it.seconds is None for it in arm.records)]
        if lacking:
            text += " " + NOT_TIMED.format(names="`, `".join(lacking))
    return _wrapped(f"{text} {_equal_time(given)}".replace("\n", " "))


def _equal_time(given: Given) -> str:
    arms = [arm for arm in given.arms if given.is_reference(arm)]
    if len(arms) < 2:
        return NO_EQUAL_TIME
    steps = " and ".join(f"{arm.records[0].steps:,}" for arm in arms)
    return EQUAL_TIME.format(names="` and `".join(arm.name for arm in arms), steps=steps)


def _limits(study: Study) -> str:
    main = study.main
    parameters, tokens = _parameters(study), main.train_iters * main.step_tokens
    text = LIMITS.format(
        parameters=f"{parameters / 1e6:.1f}",
        tokens=f"{tokens / 1e6:.1f}",
        per_parameter=f"{tokens / parameters:.1f}",
        seq_length=main.seq_length,
    )
    return _wrapped(text.replace("\n", " "))


def _parameters(study: Study) -> int:
    """Count the weights as ``skyladder plan`` does, embedding and output included."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    run_flags.add_run_flags(parser)
    words = [*study.main.flags, "--vocab-size", str(study.vocab_size)]
    flags, _ = parser.parse_known_args(words)
    return model_flags.decoder_shape(run_flags.complete(flags), []).num_parameters


def verdicts(given: Given, arms: Collection[str]) -> str:
    """Return how many runs have finished, and how arms compare with the reference.

    Args:
        given: what is known.
        arms: those that are compared; the others are left out.

    Returns:
        Paragraph and list as Markdown, in lines of 100 characters.
    """
    planned = [run for run in given.study.runs if run.is_compared]
    done = [it for it in given.found if it.is_compared and it.is_whole]
    lines = [f"{len(done)} of {len(planned)} runs have finished.", _handicap(given)]
    reference = given.reference
    compared = []
    if reference is not None:
        noise = results.noise(given.arms, reference)
        why = "the paper's figure; how far seeds lie apart here is not known yet."
        if noise.is_measured:
            why = (
                "the most by which an arm's differences of two seeds lie apart, at least the "
                f"paper's {results.NOISE}. Read one near it as none."
            )
        lines.append(f"Differences below {noise.nats:.3f} are noise here: {why}")
        for arm in given.arms:
            if arm is not reference and arm.name in arms:
                compared += _verdict(given, arm, reference, noise.nats)
    if not compared:
        lines.append("Nothing can be compared yet.")
    text = _wrapped(" ".join(filter(None, lines)))
    return text + ("\n" + "\n".join(compared) + "\n" if compared else "")


def _missing(given: Given) -> str:
    missing = [name for name in given.study.arms if name not in {arm.name for arm in given.arms}]
    if not missing:
        return ""
    return "\n" + _wrapped(f"Not finished yet: {', '.join(f'`{it}`' for it in missing)}.")


def _verdict(given: Given, arm: Arm, reference: Arm, noise: float) -> list[str]:
    loss = results.difference(arm, reference, results.final_difference)
    if loss is None:
        return []
    seeds = _seeds(loss)
    tokens = arm.records[0].tokens
    at = "at equal tokens"
    if tokens != reference.records[0].tokens:
        at = f"after {tokens / 1e6:.1f} million tokens"
    text = (
        f"- `{arm.name}` against `{reference.name}`, {seeds}: {loss.text(3, signed=True)} nats {at}"
    )
    text += f", {_word(loss, noise)}"
    saved = results.difference(arm, reference, results.time_saved)
    if saved is not None:
        more = "less" if saved.mean >= 0 else "more"
        text += f"; {abs(100 * saved.mean):.1f} % {more} time"
    alike = None if given.is_reference(arm) else at_equal_time(given, arm)
    if alike is not None:
        fewer = "" if len(alike.values) == len(loss.values) else f", {_seeds(alike)}"
        text += f"; {alike.text(3, signed=True)} at equal time{fewer}, {_word(alike, noise)}"
    return [_wrapped(text + ".", indent="  ").rstrip()]


def _seeds(found: Figure) -> str:
    return "one seed" if len(found.values) == 1 else f"{len(found.values)} seeds"


def _word(difference: Figure, noise: float) -> str:
    if abs(difference.mean) < noise:
        return "within noise"
    return "better" if difference.mean < 0 else "worse"


def _failures(given: Given) -> str:
    if not given.failures:
        return "\nNo start of a run has failed.\n"
    lines = ["\nStarts that failed (a failed run goes on from its last checkpoint):\n"]
    lines += [f"- {date([it['time']])}, `{it['run']}`: {it['what']}" for it in given.failures]
    return "\n".join(lines) + "\n"


def _sweep(given: Given) -> str:
    rows = rates(given)
    if len(rows) == 1:
        return "No other rate was tried.\n"
    text = (
        f"Chosen for the constant window, so that it is not handicapped: all arms train with "
        f"{given.study.main.value('--lr')}. Each run has a whole learning-rate schedule, and the "
        "last validations of runs of as many steps are of the same text."
    )
    return f"{_wrapped(text)}\n{markdown(rows)}"


def _handicap(given: Given) -> str:
    """Return a sentence where a rate was tried that suits the reference better; else nothing."""
    best = best_rate(given)
    if best is None:
        return ""
    main = given.study.main
    rate, steps = best
    if float(rate) == float(main.value("--lr")):
        return ""
    return (
        f"**With the learning rate {rate}, `{main.arm}` came to a lower loss in {steps:,} steps "
        f"than with {main.value('--lr')}, with which all arms train. So differences to it are "
        "larger than they would be to a tuned baseline.**"
    )


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
        f"{given.study.vocab_size:,} entries trained on them), {held_out['documents']:,} held out "
        f"({tokens['validation'] / 1e6:.2f} million tokens), chosen by a hash of their text. "
        f"Documents of 8,192 characters or more hold {100 * share:.0f} % of the text."
    )
    return f"{_wrapped(text)}\n{markdown(rows)}"


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
        f"{_wrapped(about)}\n```\n"
        + _folded(["python -m megatron_skyladder.pretrain_gpt", *given.study.flags])
        + "\n```\n\n"
        + markdown(rows)
    )
    first = next((it for it in given.found if it.is_compared), None)
    if first is not None:
        words = ["python", *map(shlex.quote, first.command)]
        text += f"\nThe whole command of `{first.name}`:\n\n```\n{_folded(words)}\n```\n"
        machines = sorted({_machine(record) for record in given.found})
        text += "\n" + _wrapped(f"Machine and versions: {'; '.join(machines)}.")
    return text


def _machine(record: Record) -> str:
    versions = [f"{name} {value}" for name, value in record.machine.items() if name != "processor"]
    return ", ".join([record.machine.get("processor", "unknown processor"), *versions])


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 100, subsequent_indent=indent, break_on_hyphens=False) + "\n"


def _folded(words: Sequence[str], width: int = 96) -> str:
    """Return words of a command on lines of a shell."""
    lines, line = [], ""
    for word in words:
        if line and len(line) + len(word) > width:
            lines.append(line.rstrip() + " \\")
            line = "  "
        line += word + " "
    return "\n".join([*lines, line.rstrip()])


def _beside(picture: Path, page: Path) -> str:
    return Path(os.path.relpath(picture, page.parent)).as_posix()
