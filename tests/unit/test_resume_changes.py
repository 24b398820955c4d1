"""What a resume says where the schedule's text is the checkpoint's, and the masks are not.

tests/distributed/test_resume.py has runs, and the changes of the schedule itself.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.continuation import Checkpoint
from megatron_skyladder.ladder.flags import FINGERPRINT, add_arguments, config_from_args
from megatron_skyladder.megatron_bridge.spelling import in_bridges_words
from megatron_skyladder.runtime.resuming import check, written

FLAGS = "--skyladder-start-window 8 --skyladder-final-window 64 --skyladder-alpha 14"
ALLOWED = f"{FLAGS} --skyladder-allow-schedule-change"
RUN = {
    "seq_length": 64,
    "num_layers": 4,
    "global_batch_size": 4,
    "train_iters": 6,
    "train_samples": None,
    "window_size": None,
    "window_attn_skip_freq": None,
}
LOCAL = {"window_size": (7, 0), "window_attn_skip_freq": 2}


def run(flags: str, **megatron: Any) -> argparse.Namespace:
    """Return Megatron's arguments of a run of six steps of four samples."""
    args = add_arguments(argparse.ArgumentParser()).parse_args(flags.split())
    vars(args).update(RUN | megatron)
    return args


@pytest.fixture(autouse=True)
def _no_clock_stays() -> Iterator[None]:
    yield
    clock.uninstall()


def resume(
    before: dict[str, Any], after: dict[str, Any], flags: str = FLAGS, *, same_text: bool = True
) -> None:
    """Go on at sample 8 from a run with `FLAGS`."""
    saved = run(FLAGS, consumed_train_samples=8, **before)
    was = config_from_args(saved)
    assert was is not None
    setattr(saved, FINGERPRINT, was.fingerprint)
    options = run(flags, **after)
    wanted = config_from_args(options)
    assert wanted is not None and (wanted.fingerprint == was.fingerprint) is same_text
    clock.install(wanted, lambda: 8)
    check(Checkpoint.of(saved), options)


@pytest.mark.parametrize(
    ("before", "after", "was", "will", "keep"),
    [
        (
            {},
            {"seq_length": 128},
            "sequences of 64 tokens",
            "sequences of 128 tokens",
            "--seq-length 64",
        ),
        (
            LOCAL,
            LOCAL | {"window_size": (15, 0)},
            "2 of 4 layers local, with 8 tokens",
            "2 of 4 layers local, with 16 tokens",
            "--window-size and --window-attn-skip-freq as they were",
        ),
        (
            LOCAL,
            LOCAL | {"window_attn_skip_freq": 4},
            "2 of 4 layers local, with 8 tokens",
            "3 of 4 layers local, with 8 tokens",
            "--window-size and --window-attn-skip-freq as they were",
        ),
        (
            {},
            LOCAL | {"seq_length": 128},
            "sequences of 64 tokens; no local layers",
            "sequences of 128 tokens; 2 of 4 layers local, with 8 tokens",
            "--seq-length 64, --window-size and --window-attn-skip-freq as they were",
        ),
    ],
)
def test_other_sequences_and_local_layers_are_refused(
    before: dict[str, Any],
    after: dict[str, Any],
    was: str,
    will: str,
    keep: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The same flags and the same text of the schedule; each was accepted without a word."""
    with pytest.raises(UsageError) as refused:
        resume(before, after)
    said = str(refused.value)
    assert f"documents not masked; {was}\n" in said and f"documents not masked; {will}\n" in said
    assert f"To keep the checkpoint's windows: {keep}.\n" in said
    first = f"{was.split('; ')[0]} become {will.split('; ')[0]}"
    assert f"To go on under this run's (at 8 samples {first}" in said
    with caplog.at_level(logging.WARNING):
        resume(before, after, ALLOWED)
    assert "schedule changed on resume, as allowed" in caplog.text and first in caplog.text


def test_flags_and_model_that_change_are_both_named() -> None:
    """The sequences alone would not bring the windows back."""
    with pytest.raises(UsageError) as refused:
        resume({}, {"seq_length": 128}, FLAGS.replace("alpha 14", "alpha 20"), same_text=False)
    keep = "--seq-length 64, the checkpoint's flags and length of the run"
    assert f"To keep the checkpoint's windows: {keep}.\n" in str(refused.value)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (None, "--skyladder-alpha 175/12 --skyladder-points 0:8 1:64 --skyladder-intra-document "
         "instead of --skyladder-expand-fraction"),
        (["megatron_skyladder.layer_specs", "sky"],
         "SKYLADDER_ALPHA='175/12' SKYLADDER_POINTS='0:8 1:64' SKYLADDER_INTRA_DOCUMENT=1 "
         "instead of SKYLADDER_EXPAND_FRACTION"),
    ],
)  # fmt: skip
def test_what_has_to_be_left_out_is_named(spec: list[str] | None, text: str) -> None:
    """Beside what keeps the windows it would be refused; what was not given is not named."""
    options = run("--skyladder-expand-fraction 0.64", spec=spec)
    flags = {"alpha": "175/12", "expand_fraction": None, "stages": None}
    assert written({**flags, "points": ["0:8", "1:64"], "intra_document": True}, options) == text
    assert written({"stages": None}, options) == "the same flags"


def test_bridge_says_it_in_its_own_words() -> None:
    with pytest.raises(UsageError) as refused:
        resume({}, {"seq_length": 128})
    assert "To keep the checkpoint's windows: model.seq_length=64.\n" in in_bridges_words(
        str(refused.value)
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {}),
        (LOCAL, LOCAL),
        (LOCAL, LOCAL | {"window_size": [7, 0]}),  # as read from JSON
        (LOCAL, LOCAL | {"window_attn_skip_freq": [1, 0, 1, 0]}),
        ({"seq_length": 128}, {"skip_train": True}),  # nothing is trained
    ],
)
def test_what_stays_needs_no_word(
    before: dict[str, Any], after: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    resume(before, after)
    assert not caplog.records
