"""Patches: found by place, inserted only, all or nothing, taken out to the byte."""

import os
import shutil
import stat
import subprocess
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_skyladder import inserted
from megatron_skyladder.cli import main
from megatron_skyladder.megatron_lm.patching import checkout, definitions, places
from megatron_skyladder.megatron_lm.patching.definitions import Anchor, PatchError, Place

# A checkout in miniature: the places of Megatron's that the patches look for, in our own words.
ARGUMENTS = '''
def add_megatron_arguments(parser):
    """Flags."""
    parser = add_some(parser)

    return parser


def add_some(parser):
    return parser
'''
TRAINING = """
def pretrain(provider, store=None):
    start = 0
    initialize_megatron(
        store=store,
    )

    args = get_args()
    return args, start
"""
SCRIPT = '''
def get_batch(data_iterator, vp_stage=None):
    return next(data_iterator)


def forward_step(data_iterator, model):
    """Step."""
    args = get_args()
    with timer():
        vp_stage = 0
        (
            tokens,
            attention_mask,
        ) = get_batch(data_iterator, vp_stage)
    return model(tokens, attention_mask)


def is_dataset_built_on_rank(vp_stage=None):
    args = get_args()
    return vp_stage == args
'''
FILES = {
    "megatron/training/arguments.py": ARGUMENTS,
    "megatron/training/training.py": TRAINING,
    "pretrain_gpt.py": SCRIPT,
}


def write_tree(folder, version="0.19.2", **changed):
    """Write a small checkout; ``changed`` maps a file's stem to its text, None to leave it out."""
    major, minor, patch = version.split(".")
    numbers = f"MAJOR = {major}\nMINOR = {minor}\nPATCH = {patch}\nPRE_RELEASE = ''\n"
    for name, text in {**FILES, "megatron/core/package_info.py": numbers}.items():
        path = folder / name
        text = changed.get(path.stem, text)
        if text is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
    return folder


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "checkout")


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def skyladder(capsys, *words):
    """Run ``skyladder patch`` and return its exit code, output and errors."""
    code = main(["patch", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- the files in patches/ ---------------------------------------------------------------------


def test_the_patch_begins_with_its_reason_and_is_small():
    text = definitions.patch_file().read_text()
    header = text[: text.index("[")]
    assert all(row.startswith("#") for row in header.splitlines() if row)
    assert "Why:" in header and len(text.splitlines()) < 80
    names = [place.name for place in definitions.load().places if not place.optional]
    assert names == ["flags", "switch", "datasets", "row", "mask"]


def test_inserted_lines_call_only_functions_that_exist():

    for place in definitions.load().places:
        for line in place.lines:
            for call in line.split("skyladder.")[1:]:
                assert callable(getattr(inserted, call.partition("(")[0]))


# --- apply, check, revert ----------------------------------------------------------------------


def test_apply_inserts_marked_lines_only(tree, capsys):
    before = contents(tree)
    code, out, _ = skyladder(capsys, "apply", tree)
    assert code == 0 and "with core_v0.19.0) is applied" in out
    count = 0
    for path, content in contents(tree).items():
        lines = content.decode().splitlines(keepends=True)
        marked = [line for line in lines if line.rstrip().endswith(places.MARK)]
        count += len(marked)
        assert "".join(line for line in lines if line not in marked).encode() == before[path]
    there = [place for place in definitions.load().places if not place.optional]
    assert count == sum(len(place.lines) for place in there)


def test_a_second_script_is_patched_where_there_is_one(tree, capsys):
    """Megatron has pretrain_hybrid.py from 0.18 on; a place that does not fit in it is named."""
    script = tree / "pretrain_hybrid.py"
    shutil.copy(tree / "pretrain_gpt.py", script)
    stock = script.read_bytes()
    code, out, _ = skyladder(capsys, "apply", tree)
    assert code == 0 and "pretrain_hybrid.py" in out.splitlines()[-1]
    assert script.read_bytes() == (tree / "pretrain_gpt.py").read_bytes() != stock
    skyladder(capsys, "revert", tree)
    assert script.read_bytes() == stock
    script.write_text(stock.decode().replace("get_batch(", "read_batch("))
    code, _, err = skyladder(capsys, "apply", tree)
    assert code == 1 and "pretrain_hybrid.py: looked before the statement" in err
    assert "pretrain_gpt.py: looked" not in err


def test_lines_stand_at_their_places_with_the_anchors_indentation(tree, capsys):
    skyladder(capsys, "apply", tree)
    script = (tree / "pretrain_gpt.py").read_text()
    wanted = """\
        vp_stage = 0
        from megatron_skyladder import inserted as skyladder  # skyladder patch
        data_iterator = skyladder.watch_sequences(data_iterator, model)  # skyladder patch
        (
            tokens,
            attention_mask,
        ) = get_batch(data_iterator, vp_stage)
        from megatron_skyladder import inserted as skyladder  # skyladder patch
        attention_mask = skyladder.document_mask(data_iterator, attention_mask, model)"""
    assert wanted in script


def test_apply_again_changes_nothing(tree, capsys):
    skyladder(capsys, "apply", tree)
    once = contents(tree)
    code, out, _ = skyladder(capsys, "apply", tree)
    assert code == 0 and "applied already" in out and contents(tree) == once


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff", "# -*- coding: latin-1 -*-\n"])
def test_revert_restores_the_bytes(tmp_path, capsys, line_end, start):
    def text(source):
        return (start + source).replace("\n", line_end)

    tree = write_tree(
        tmp_path, pretrain_gpt=text(SCRIPT), arguments=text(ARGUMENTS), training=text(TRAINING)
    )
    before = contents(tree)
    assert skyladder(capsys, "apply", tree)[0] == 0
    after = (tree / "pretrain_gpt.py").read_bytes()
    if line_end == "\r\n":
        assert after.count(b"\n") == after.count(b"\r\n")
    code, out, _ = skyladder(capsys, "revert", tree)
    assert code == 0 and "is reverted" in out and contents(tree) == before
    assert "nothing to revert" in skyladder(capsys, "revert", tree)[1]


def test_modes_and_links_stay(tree, tmp_path, capsys):
    script = tree / "pretrain_gpt.py"
    script.chmod(0o754)
    real = tmp_path / "elsewhere.py"
    arguments = tree / "megatron/training/arguments.py"
    arguments.rename(real)
    arguments.symlink_to(real)
    skyladder(capsys, "apply", tree)
    assert stat.S_IMODE(script.stat().st_mode) == 0o754
    assert arguments.is_symlink() and places.MARK in real.read_text()


def test_a_fork_with_other_lines_around_fits(tmp_path, capsys):
    script = SCRIPT.replace('    """Step."""\n', '    """Step."""\n    ours = 1\n').replace(
        "        vp_stage = 0\n", "        vp_stage = compute(model)  # ours\n        log()\n"
    )
    training = TRAINING.replace("    start = 0\n", "    if store:\n        start = 1\n")
    tree = write_tree(tmp_path, pretrain_gpt=script, training=training)
    assert skyladder(capsys, "apply", tree)[0] == 0
    assert skyladder(capsys, "check", tree)[0] == 0


def test_check_tells_the_state_and_writes_nothing(tree, capsys):
    before = contents(tree)
    code, out, _ = skyladder(capsys, "check", tree)
    assert code == 0 and "fits and is not applied" in out and contents(tree) == before
    skyladder(capsys, "apply", tree)
    assert "the patch is applied" in skyladder(capsys, "check", tree)[1]
    script = tree / "pretrain_gpt.py"
    lines = script.read_text().splitlines(keepends=True)
    lines.remove(next(line for line in lines if places.MARK in line))
    script.write_text("".join(lines))
    code, out, _ = skyladder(capsys, "check", tree)
    assert code == 0 and "in part" in out and "apply completes pretrain_gpt.py" in out
    skyladder(capsys, "apply", tree)
    assert "the patch is applied" in skyladder(capsys, "check", tree)[1]


def test_dry_run_shows_the_diff_and_writes_nothing(tree, capsys):
    before = contents(tree)
    code, out, _ = skyladder(capsys, "apply", tree, "--dry-run")
    assert code == 0 and contents(tree) == before
    assert "+++ b/pretrain_gpt.py" in out and "+    skyladder.switch_on()" in out
    assert "was not applied" in out


@pytest.mark.parametrize("tool", ["git", "patch"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_the_diff_is_one_that_other_tools_apply(tmp_path, capsys, tool, line_end):
    if shutil.which(tool) is None:
        pytest.skip(f"needs {tool}")
    texts = {path.rpartition("/")[2][:-3]: text for path, text in FILES.items()}
    texts["training"] = TRAINING.rstrip()  # no line end at the end of the file
    texts = {stem: text.replace("\n", line_end) for stem, text in texts.items()}
    tree = write_tree(tmp_path / "checkout", **texts)
    diff = tmp_path / "skyladder.diff"
    assert "diff written" in skyladder(capsys, "check", tree, "--output", diff)[1]
    command = {"git": ["git", "apply", str(diff)], "patch": ["patch", "-p1", "-i", str(diff)]}[tool]
    subprocess.run([*command, *(["--binary"] if tool == "patch" else [])], cwd=tree, check=True)
    assert "the patch is applied" in skyladder(capsys, "check", tree)[1]


def test_a_dirty_git_tree_is_fine(tree, capsys):
    def git(*words):
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        return subprocess.run(["git", *identity, *words], cwd=tree, check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "stock")
    script = tree / "pretrain_gpt.py"
    script.write_text(script.read_text() + "# my own work\n")
    dirty = contents(tree)
    assert skyladder(capsys, "apply", tree)[0] == 0
    assert b"my own work" in git("diff").stdout
    skyladder(capsys, "revert", tree)
    assert {p: c for p, c in contents(tree).items() if p in dirty} == dirty


NOISE = st.lists(
    st.sampled_from(["\n", "# own\n", "def own(x):\n    return x\n", "OWN = '''\n  x\n'''\n"]),
    max_size=4,
).map("".join)


@given(before=NOISE, after=NOISE, crlf=st.booleans())
def test_whatever_lies_around_only_our_lines_are_new(before, after, crlf):
    text = before + SCRIPT + after
    text = text.replace("\n", "\r\n") if crlf else text
    wanted = [p for p in definitions.load().places if p.file == "pretrain_gpt.py"]
    patched, found, errors = places.insert(text, wanted)
    assert not errors and len(found) == len(wanted)
    assert places.without_marked_lines(patched) == text
    assert patched.count(places.MARK) == sum(len(place.lines) for place in wanted)


# --- refusals ----------------------------------------------------------------------------------


def refused(tree, capsys, *words):
    """Apply, expect a refusal that changes nothing, and return the message on one line."""
    before = contents(tree)
    code, _, err = skyladder(capsys, "apply", tree, *words)
    assert code == 1 and contents(tree) == before
    return " ".join(err.split())


def test_a_folder_that_is_no_checkout(tmp_path, capsys):
    message = refused(tmp_path, capsys)
    assert "not a Megatron-LM checkout: looked for megatron/core/package_info.py" in message
    code, _, err = skyladder(capsys, "revert", tmp_path / "nowhere")
    assert code == 1 and "is not a folder" in err


@pytest.mark.parametrize("version", ["0.10.0", "0.21.3"])
def test_a_release_that_was_not_tested_is_named_as_such(tmp_path, capsys, version):
    tree = write_tree(tmp_path, version=version)
    out = skyladder(capsys, "check", tree)[1]
    assert f"Megatron {version}, which is not a tested release; the patch fits" in out
    assert skyladder(capsys, "apply", tree)[0] == 0


def test_flags_are_added_where_the_parser_is_built_whatever_that_function_is_called(
    tmp_path, capsys
):
    """As in 0.11: one function builds the parser and reads the command line."""
    arguments = textwrap.dedent("""
        def parse_args(extra=None):
            parser = argparse.ArgumentParser(
                description='x')
            parser = extra(parser)
            return parser.parse_args()
    """)
    tree = write_tree(tmp_path, arguments=arguments)
    code, _, err = skyladder(capsys, "apply", tree)
    assert code == 0, err
    patched = (tree / "megatron/training/arguments.py").read_text()
    assert patched.index("description='x')") < patched.index("skyladder.add_arguments(parser)")
    assert patched.index("skyladder.add_arguments(parser)") < patched.index("extra(parser)")


@pytest.mark.parametrize(
    "body",
    [
        "    return first() or last()\n",
        '    """Which ranks."""\n    return (\n        first()\n        or last()\n    )\n',
        "    # ours\n    x = 1\n    if x:\n        return True\n    return False\n",
    ],
)
def test_the_start_of_a_function_is_after_its_docstring(tmp_path, capsys, body):
    script = SCRIPT[: SCRIPT.index("def is_dataset")]
    tree = write_tree(
        tmp_path, pretrain_gpt=f"{script}def is_dataset_built_on_rank(vp_stage=None):\n{body}"
    )
    code, _, err = skyladder(capsys, "apply", tree)
    assert code == 0, err
    patched = (tree / "pretrain_gpt.py").read_text()
    lines = patched[patched.index("def is_dataset") :].splitlines()
    code_lines = [x for x in lines[1:] if not x.lstrip().startswith(("#", '"""'))]
    assert "import inserted" in code_lines[0] and "dataset_is_built_on_rank" in code_lines[1]
    compile(patched, "pretrain_gpt.py", "exec")


def test_the_first_return_is_the_functions_own(tmp_path, capsys):
    arguments = textwrap.dedent("""
        def add_megatron_arguments(parser):
            def inner():
                return 1
            if inner():
                parser = add(parser)
            return parser
    """)
    tree = write_tree(tmp_path, arguments=arguments)
    assert skyladder(capsys, "apply", tree)[0] == 0
    lines = (tree / "megatron/training/arguments.py").read_text().splitlines()
    assert lines[-1] == "    return parser" and "skyladder.add_arguments" in lines[-2]


def test_a_refusal_shows_what_fits_and_the_lines_to_insert_by_hand(tmp_path, capsys):
    tree = write_tree(tmp_path, pretrain_gpt=SCRIPT.replace("forward_step", "fork_step"))
    code, _, err = skyladder(capsys, "apply", tree)
    assert code == 1
    assert "insert the lines by hand, indented as their neighbours are" in err
    assert "megatron/training/arguments.py:6, before the first return of add_megatron_arg" in err
    assert "pretrain_gpt.py, before the statement '*= get_batch(*)' of forward_step() or" in err
    for place in definitions.load().places:
        for line in place.lines:
            assert f"      {line}\n" in err


def test_a_missing_file(tmp_path, capsys):
    tree = write_tree(tmp_path, training=None)
    message = refused(tree, capsys)
    assert "megatron/training/training.py: looked for this file; there is none." in message
    assert "Nearest: nothing like it." in message
    moved = tree / "megatron/fork/loops/training.py"
    moved.parent.mkdir(parents=True)
    moved.write_text(TRAINING)
    assert "Nearest: megatron/fork/loops/training.py." in refused(tree, capsys)


def test_a_missing_function_names_the_nearest(tmp_path, capsys):
    tree = write_tree(tmp_path, arguments=ARGUMENTS.replace("add_megatron", "add_megatron_core"))
    message = refused(tree, capsys)
    assert "looked for the function add_megatron_arguments()" in message
    assert "Nearest: line 2: add_megatron_core_arguments()" in message


def test_a_missing_statement_names_the_nearest(tmp_path, capsys):
    arguments = ", ".join(f"some_argument_{n}=its_value_{n}" for n in range(9))
    training = TRAINING.replace("initialize_megatron(", f"initialize_core({arguments},")
    tree = write_tree(tmp_path, training=training)
    message = refused(tree, capsys)
    assert "looked after the statement 'initialize_megatron(*)' of pretrain() (line 2)" in message
    assert "Nearest: line 4: initialize_core(some_argument_0=its_value_0, some" in message


def test_every_place_that_does_not_fit_is_named_at_once(tmp_path, capsys):
    tree = write_tree(tmp_path, training="x = 1\n", arguments="", pretrain_gpt="y = 2\n")
    message = refused(tree, capsys)
    assert message.count("looked for the function") == 6  # two for the flags
    assert "Nor does another place fit" in message and "nothing like it" in message


def test_a_function_or_statement_that_is_there_twice(tmp_path, capsys):
    tree = write_tree(tmp_path / "a", pretrain_gpt=SCRIPT + SCRIPT)
    assert "forward_step() is defined 2 times (lines 6, 26)" in refused(tree, capsys)
    twice = TRAINING.replace("    start = 0\n", "    initialize_megatron()\n")
    tree = write_tree(tmp_path / "b", training=twice)
    assert "is there 2 times (lines 3, 4)" in refused(tree, capsys)


@pytest.mark.parametrize(
    "line",
    ["    if parser: return parser\n", "    x = 1; return parser\n", "    return parser; 1\n"],
)
def test_a_statement_that_shares_its_line(tmp_path, capsys, line):
    source = "def add_megatron_arguments(parser):\n" + line
    assert "shares its line" in refused(write_tree(tmp_path, arguments=source), capsys)


def test_a_statement_in_the_last_line_without_an_end(tmp_path, capsys):
    source = "def add_megatron_arguments(parser):\n    return parser"
    message = refused(write_tree(tmp_path, arguments=source), capsys)
    assert "arguments.py:2:" in message and "has no line end" in message


def test_other_names_than_megatrons(tmp_path, capsys):
    tree = write_tree(tmp_path, pretrain_gpt=SCRIPT.replace("attention_mask", "mask"))
    assert "has no variable attention_mask, which the lines of [mask] use" in refused(tree, capsys)


def test_source_that_cannot_be_read(tmp_path, capsys):
    tree = write_tree(tmp_path, arguments="def f(:\n")
    assert "not Python that can be parsed (line 1:" in refused(tree, capsys)
    (tree / "megatron/training/arguments.py").write_bytes(b"x = '\xff'\n")
    assert "cannot be read as Python source" in refused(tree, capsys)


def test_a_statement_of_an_inner_function_is_not_taken(tmp_path):
    source = textwrap.dedent("""
        def outer():
            def inner():
                stop()
            return inner
    """)
    place = Place("x", "a test", "f.py", (Anchor("outer", "before", "stop()"),), ("pass",))
    with pytest.raises(PatchError, match="there is none"):
        places.find(source, place)


@pytest.mark.parametrize("keys", ["file = f", "file = f\nat = g: start\nbefore = y"])
def test_an_ill_formed_patch(keys):
    with pytest.raises(PatchError, match=r"\[a\] in the patch has the keys .* needed are"):
        definitions.parse(f"[a]\nreason = r\ninsert = x\n{keys}\n")


@pytest.mark.parametrize("anchor", ["g", "g: beside x", "g: before", "g: end"])
def test_an_anchor_that_cannot_be_read(anchor):
    with pytest.raises(PatchError, match="needed is 'FUNCTION: start', or"):
        definitions.parse(f"[a]\nreason = r\ninsert = x\nfile = f\nat = {anchor}\n")


def test_a_full_disk_leaves_nothing_behind(tree, capsys, monkeypatch):
    before = sorted(path for path in tree.rglob("*"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkout.os, "fchmod", full)
    assert main(["patch", "apply", str(tree)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(path for path in tree.rglob("*")) == before


def test_a_write_that_fails_half_way_is_undone(tree, capsys, monkeypatch):
    before = contents(tree)
    replace, calls = os.replace, []

    def fail_at_the_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(checkout.os, "replace", fail_at_the_second)
    code, _, err = skyladder(capsys, "apply", tree)
    assert code == 1 and "disk full" in err and len(calls) == 3
    assert contents(tree) == before  # no temporary is left either
