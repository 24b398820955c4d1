"""The table of releases, what is found on the path, and calls that differ between releases."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_skyladder.megatron_lm import releases
from megatron_skyladder.megatron_lm.releases import (
    ALLOW_VARIABLE,
    RELEASES,
    Megatron,
    MegatronMismatchError,
    Trainer,
    release_of,
)
from megatron_skyladder.testing import requires_megatron

REPOSITORY = Path(__file__).parents[2]


def write_megatron(folder, version="0.19.2", parts=("core", "training"), script=False):
    """Write the outline of a Megatron."""
    numbers, _, suffix = version.partition("rc")
    major, minor, patch = numbers.split(".")
    for part in parts:
        (folder / "megatron" / part).mkdir(parents=True)
        (folder / "megatron" / part / "__init__.py").write_text("raise ImportError('outline')\n")
    if "core" in parts:
        (folder / "megatron/core/package_info.py").write_text(
            f"MAJOR = {major}\nMINOR = {minor}\nPATCH = {patch}\n"
            f"PRE_RELEASE = {'rc' + suffix if suffix else ''!r}\n"
            "VERSION = (MAJOR, MINOR, PATCH, PRE_RELEASE)\n__version__ = ''.join(VERSION[3:])\n"
        )
    if script:
        (folder / "pretrain_gpt.py").write_text("")
    return folder


# --- which Megatron ----------------------------------------------------------------------------


def test_the_table():
    assert [(line, entry.trainer, entry.wheel) for line, entry in RELEASES.items()] == [
        *((f"0.{minor}", Trainer.ITS_OWN_SCRIPT, None) for minor in range(11, 16)),
        ("0.16", Trainer.PARSES_ARGUMENTS, None),
        ("0.17", Trainer.PARSES_ARGUMENTS, "0.17.1"),
        ("0.18", Trainer.TAKES_PROVIDER, "0.18.2"),
        ("0.19", Trainer.TAKES_MODEL_CONFIG, "0.19.2"),
        ("0.20", Trainer.TAKES_MODEL_CONFIG, None),
    ]


@pytest.mark.parametrize("version", ["0.19.2", "0.16.1", "0.20.0rc3", "1.0.0"])
def test_a_version_is_read_without_importing(tmp_path, version):
    found = releases.megatron_in(write_megatron(tmp_path, version))
    assert found is not None and found.version == version
    assert found.line == ".".join(version.split(".")[:2])


def test_a_folder_without_megatron(tmp_path):
    assert releases.megatron_in(tmp_path) is None


def test_a_checkout_has_a_script_of_its_own(tmp_path):
    assert not releases.megatron_in(write_megatron(tmp_path / "a")).is_checkout
    assert releases.megatron_in(write_megatron(tmp_path / "b", script=True)).is_checkout


def installed_with(*path):
    """Ask a fresh Python with this path which Megatron it has."""
    program = (
        "from megatron_skyladder.megatron_lm import releases\n"
        "try:\n"
        "    found = releases.installed()\n"
        "    print(found.version, found.folder)\n"
        "except releases.MegatronMismatchError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-c", program],  # -S: what is installed here stays out
        env={"PYTHONPATH": os.pathsep.join(map(str, (*path, REPOSITORY)))},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


def test_the_first_on_the_path_is_the_one(tmp_path):
    checkout = write_megatron(tmp_path / "checkout", "0.20.0", script=True)
    wheel = write_megatron(tmp_path / "wheel")
    assert installed_with(checkout, wheel) == f"0.20.0 {checkout}"
    assert installed_with(wheel, checkout) == f"0.19.2 {wheel}"


def test_none_at_all(tmp_path):
    message = installed_with(tmp_path)
    assert message.startswith("no Megatron is installed for this Python.")
    assert "pip install" in message and "PYTHONPATH=/path/to/Megatron-LM" in message


def test_a_wheel_without_a_trainer(tmp_path):
    message = installed_with(write_megatron(tmp_path, "0.16.1", parts=["core"]))
    assert "(megatron-core 0.16.1) has no trainer: needed is megatron.training" in message


def test_the_core_of_one_with_the_trainer_of_another(tmp_path):
    core = write_megatron(tmp_path / "core", "0.19.2", parts=["core"])
    checkout = write_megatron(tmp_path / "checkout", "0.18.0")
    message = installed_with(core, checkout)
    assert f"megatron.core comes from {core} (0.19.2), megatron.training from {checkout}" in message


# --- releases outside the table ----------------------------------------------------------------


def test_a_known_release(tmp_path):
    assert release_of(Megatron("0.18.9", tmp_path)) is RELEASES["0.18"]


def test_what_only_its_own_script_can_start(tmp_path):
    with pytest.raises(MegatronMismatchError) as refusal:
        releases.check_for_our_start(Megatron("0.14.0", tmp_path))
    assert "SkyLadder's entry point and --spec need 0.16 or later" in str(refusal.value)
    assert f"skyladder patch apply {tmp_path}" in str(refusal.value)
    releases.check_for_our_start(Megatron("0.16.1", tmp_path))


@pytest.mark.parametrize(
    ("version", "nearest"), [("0.10.0", "0.11"), ("0.23.0", "0.20"), ("?.?.?", "0.11")]
)
def test_an_unknown_release_is_refused_unless_you_are_brave(
    tmp_path, monkeypatch, caplog, version, nearest
):
    found = Megatron(version, tmp_path)
    monkeypatch.delenv(ALLOW_VARIABLE, raising=False)
    with pytest.raises(MegatronMismatchError) as refusal:
        release_of(found)
    message = str(refusal.value)
    assert f"Megatron {version} (in {tmp_path})" in message
    assert "one of 0.11, 0.12, 0.13" in message and "0.19, 0.20." in message
    assert f"{ALLOW_VARIABLE}=1" in message and f"way {nearest} works" in message
    monkeypatch.setenv(ALLOW_VARIABLE, "1")
    assert release_of(found) is RELEASES[nearest]
    assert f"Megatron {version} is untested; treating it as {nearest}" in caplog.text


def test_nothing_else_asks_for_a_version():
    """The table is the only place that knows releases apart."""
    asking = []
    for path in (REPOSITORY / "megatron_skyladder").rglob("*.py"):
        text = path.read_text()
        if path.name != "releases.py" and any(
            word in text
            for word in ("package_info", "is_te_min_version", "megatron.core.__version")
        ):
            asking.append(path.relative_to(REPOSITORY).as_posix())
    # these two say where they look, in a message
    assert set(asking) <= {"megatron_skyladder/megatron_lm/patching/checkout.py"}


# --- calls -------------------------------------------------------------------------------------


@requires_megatron
def test_arguments_are_passed_by_name_where_the_function_takes_them():
    from megatron_skyladder.megatron_lm.compat import _accepted

    def share(batch, cp_size, is_sft=False): ...

    known = {"cp_size": 2, "is_sft": False, "gone": 1}
    assert _accepted(share, known) == {"cp_size": 2, "is_sft": False}


@requires_megatron
def test_a_function_that_needs_something_unknown():
    from megatron_skyladder.megatron_lm.compat import _accepted

    def share(batch, cp_size, new_in_2027): ...

    with pytest.raises(MegatronMismatchError, match=r"test_compat\.share needs new_in_2027"):
        _accepted(share, {"cp_size": 2})


@requires_megatron
def test_a_place_to_hook_that_is_not_there():
    from megatron_skyladder.megatron_lm import hooks

    hook = hooks.Hook("megatron.training.training", "Gone.method", lambda f: f, "to see")
    with pytest.raises(MegatronMismatchError, match=r"no megatron.*Gone\.method.*\(to see\)"):
        hooks._wrap(hook)


@requires_megatron
def test_a_place_that_somebody_else_has_wrapped(monkeypatch):
    from megatron.training import training

    from megatron_skyladder.megatron_lm import hooks

    original = training.evaluate
    wrapper = functools.wraps(original)(lambda *args: original(*args))
    monkeypatch.setattr(training, "evaluate", wrapper)
    hook = hooks.Hook("megatron.training.training", "evaluate", lambda f: f, "to see")
    with pytest.raises(MegatronMismatchError, match=r"already wrapped by .* Load only one"):
        hooks._wrap(hook)


# --- the calls that a patch inserts -------------------------------------------------------------


def test_flags_are_added_once():
    import argparse

    from megatron_skyladder.megatron_lm import patch_calls

    parser = argparse.ArgumentParser()
    assert patch_calls.add_arguments(patch_calls.add_arguments(parser)) is parser
    assert parser.parse_args(["--skyladder-start-window", "8"]).skyladder_start_window == 8


@requires_megatron
def test_without_flags_the_inserted_calls_leave_all_as_it_is(monkeypatch):
    from megatron_skyladder.ladder import clock
    from megatron_skyladder.megatron_lm import compat, patch_calls

    monkeypatch.setattr(compat, "args", lambda: SimpleNamespace(skyladder_preset=None))
    patch_calls.switch_on()
    assert clock.installed() is None
    assert patch_calls.dataset_is_built_on_rank() is None
    iterator, mask = iter([]), object()
    assert patch_calls.watch(iterator) is iterator and patch_calls.watch(None) is None
    model = SimpleNamespace(training=True)
    assert patch_calls.watch_sequences(iterator, model) is iterator
    assert patch_calls.watch_sequences(None, model) is None
    assert patch_calls.document_mask(iterator, mask, model) is mask


@requires_megatron
@pytest.mark.parametrize("documents", [True, False])
def test_a_forks_own_mask_of_documents_is_refused_beside_ours(monkeypatch, documents):
    import argparse

    from megatron_skyladder.megatron_lm import compat, hooks, patch_calls

    words = ["--skyladder-start-window", "8", *["--skyladder-intra-document"] * documents]
    options = patch_calls.add_arguments(argparse.ArgumentParser()).parse_args(words)
    vars(options).update(seq_length=64, global_batch_size=8, train_iters=100, load=None)
    monkeypatch.setattr(compat, "args", lambda: options)
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *words, "--intra-doc-masking"])
    installed = []
    monkeypatch.setattr(hooks, "install", lambda *given: installed.append(given))
    if documents:
        with pytest.raises(ValueError, match=r"--intra-doc-masking cannot be combined .* own mask"):
            patch_calls.switch_on()
    else:
        patch_calls.switch_on()
    assert len(installed) == (not documents)


@requires_megatron
@pytest.mark.parametrize("stage_reads", [True, False])
def test_flags_that_nothing_switched_on_are_refused(monkeypatch, stage_reads):
    """A merge took the line out of pretrain and left those that read flags and call these."""
    from megatron_skyladder.errors import UsageError
    from megatron_skyladder.megatron_lm import compat, patch_calls

    patch_calls._check_switched_on.cache_clear()  # an earlier call was of a run without flags
    monkeypatch.setattr(compat, "args", lambda: SimpleNamespace(skyladder_start_window=32))
    model, iterator = SimpleNamespace(training=True), iter([]) if stage_reads else None
    for _ in range(2):
        with pytest.raises(UsageError, match=r"nothing switched SkyLadder on.* skyladder patch ap"):
            patch_calls.watch_sequences(iterator, model)
        with pytest.raises(UsageError, match=r"nothing switched SkyLadder on"):
            patch_calls.watch(iterator)
