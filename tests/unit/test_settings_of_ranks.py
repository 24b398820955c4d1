"""Settings that differ between ranks, in words; that runs refuse them, see tests/distributed."""

from __future__ import annotations

from megatron_skyladder.runtime.same_settings import differences

LINEAR, OTHER = {"schedule": "linear 8 -> 64"}, {"schedule": "linear 16 -> 64"}


def test_ranks_that_agree_are_none_of_that() -> None:
    assert differences([("a", LINEAR), ("b", LINEAR)]) == []


def test_the_first_rank_that_differs_is_named_with_its_host() -> None:
    everyone = [("a", OTHER), ("a", LINEAR), ("b", LINEAR), ("b", OTHER), ("c", LINEAR)]
    assert differences(everyone) == [
        "schedule: linear 8 -> 64 on rank 1 (a), but linear 16 -> 64 on rank 0 (a); 2 of 5 ranks "
        "differ from the most frequent"
    ]


def test_each_setting_has_a_sentence_of_its_own() -> None:
    everyone = [("a", LINEAR | {"probe": "True"}), ("b", OTHER | {"probe": "False"})]
    of_schedule, of_probe = differences(everyone)
    assert of_schedule.startswith("schedule: linear 8 -> 64 on rank 0 (a), but linear 16 -> 64 on")
    assert of_probe.startswith("probe: True on rank 0 (a), but False on rank 1 (b); 1 of 2 ranks")
