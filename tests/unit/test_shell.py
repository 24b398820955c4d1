"""The words of a script's commands; the oracle is bash, which runs what is only read here."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_skyladder.planning import shell
from megatron_skyladder.planning.shell_syntax import ShellError, parse

SCRIPTS = [
    "show a 'b c' \"d  e\" f\\ g",
    'A=1; show $A ${A} "$A" \'$A\' x$A"$A"y',
    'A="1 2  3"; show $A "$A" $A$A',
    'A=(1 \'2 3\' 4); show ${A[@]}; show "${A[@]}" "${A[*]}" ${#A[@]} ${A[1]} $A x"${A[@]}"y',
    "A=(1); A+=(2 3); B=x; B+=y; show ${A[@]} $B",
    'A=(\n  --one 1  # a comment\n  --two "2 # none"\n)\nshow "${A[@]}" # end',
    'A="\\\n  --one 1 \\\n  --two 2 \\\n"; show $A',
    "show a \\\n  b \\\n  c",
    'show ${A:-d} ${A-d} ${A:=e} $A ${A:+f} ${B:+f} "${B:-x y}" ${B:-x y}',
    'A=; show ${A:-d} "${A-d}" ${A} "$A"',
    "A=3; B=4; show $((A * B + 1)) $((  (A-5) / 2 )) $((-7 % 3)) $(($A*${B}))",
    "if [ 1 -lt 2 ]; then A=1; else A=2; fi; show $A",
    "A=b; if [[ $A == a ]]; then B=1; elif [[ $A == b ]]; then B=2; else B=3; fi; show $B",
    '[ -z "$A" ] && A=1; [ -n "$A" ] && B=2; [ "$A" = 2 ] || C=3; show $A $B $C',
    "if [[ -n $A && $A == 1 ]] || [ 2 -ge 2 ]; then B=1; fi; show $B",
    "if [ ! -z x ]; then C=1; fi; show $C",
    "A=abc; case $A in x|y) B=1;; a*) B=2;; *) B=3;; esac; show $B",
    "case z in\n  a) B=1 ;;\n  *)\n    B=3\n    ;;\nesac\nshow $B",
    "f() { A=2; show in $A; }\nA=1; f; show out $A",
    "function f { show f; }; f; f",
    # what stands in $(...) has quotes, comments and here-documents of its own
    'N=$(echo "it\'s $(date)"); show a',
    'N=$(echo \'"\' ")" \\) "${A:-)}" `echo \')\'`); show a',
    "N=$(  # don't :)\n  echo 1 # a )\n); show a#b",
    "P=$(cat - <<'EOF'\nimport x  # don't (\nEOF\n); show a\nshow b",
    "P=$(cat <<-EOF | tail -n 1; cat <<\\END\n\tit's )\n\tEOF\nisn't )\nEND\n)\nshow a",
    'P=$(cat <<< ")" ); show a',
    "P=$(echo $((1<<2)) $(( (1) )) $# ${#A} $'x'); show a",
    "P=\"$(echo \"it's\" '\"')\"; show a 'b'",
    'C="show a b"; $C c; eval "$C \'d e\'"',
    "A='x y'; eval show '\"$A\"' $A",
    "export A=1 B=2; declare -r C=3; readonly D=4; show $A$B$C$D",
    "show a; show b && show c; false || show d; true || show e; false && show f",
    "{ show a; }; ( show b )",
    "show a > /dev/null 2>&1; show b >/dev/null; show c 2>/dev/null; show d &> /dev/null",
    "show a <<EOF\nshow no\nEOF\nshow b",
    "A=5; while [[ $# -gt 0 ]]; do A=$2; shift; done; show $A",
    "set -euo pipefail; show ok",
    'A=\'it"s\'; B="it\'s"; show "$A" "$B" "a\\"b" "\\$x" \\$x',
    "A=1 B=2 show x",
    "show 'multi\nline' \"multi\nline\"",
    "A=$'tab'; show $A; show \"a\"'b'c",
    "if true; then if false; then A=1; else A=2; fi; fi; show $A",
    "show x # comment 'with a quote\nshow a#b",
    'A=(a b); B=("${A[@]}" c); show "${B[@]}"',
    'A=v; show "${A}_x" ${A}_y $A-z $A/w',
    "bash -c 'true'; show after",
]
# every call's words, ended by \0, and the call by \1, past redirections of standard output
SHOW = """show() { { printf '%s\\0' "$@"; printf '\\1'; } >&3; }
exec 3>&1
"""
BASH = shutil.which("bash")


def by_bash(script: str) -> list[list[str]]:
    """Return the words of each call of ``show``, from a real bash."""
    done = subprocess.run(
        [str(BASH), "--norc", "-c", SHOW + script], capture_output=True, text=True, env={"PATH": ""}
    )
    return [call.split("\0")[:-1] for call in done.stdout.split("\1")[:-1]]


def by_us(script: str) -> list[list[str]]:
    interpreter = shell.Interpreter()
    interpreter.run(parse(script))
    return [
        [word.text for word in ran.words[1:]]
        for ran in interpreter.commands
        if ran.words[0].text == "show"
    ]


@pytest.mark.skipif(BASH is None, reason="needs bash")
@pytest.mark.parametrize("script", SCRIPTS)
def test_words_are_those_of_bash(script: str) -> None:
    wanted = by_bash(script)
    assert wanted and by_us(script) == wanted


def missing(script: str, **values: str) -> list[tuple[str, list[str]]]:
    """Return the words of the last command, each with the reasons why a part has no value."""
    interpreter = shell.Interpreter(values)
    interpreter.run(parse(script))
    last = interpreter.commands[-1]
    return [(word.text, [each.reason for each in word.missing]) for word in last.words[1:]]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("show $A", "line 1: $A has no value"),
        ("\nshow ${A}", "line 2: $A has no value"),
        ("A=$(hostname)\nshow $A", "line 1: $(hostname) would have to be run"),
        ("show `date`", "line 1: $(date) would have to be run"),
        ("show $((2 * N))", "line 1: $N has no value"),
        ("A=x; show $((A * 2))", "line 1: $A is no whole number"),
        ("A=x; show $((1 << 2))", "line 1: $((1 << 2)) is not worked out here"),
        ("show ${A%%x}", "line 1: ${A%%x} is not worked out here"),
        ("if [ -d /x ]; then A=1; fi; show $A", "and $A is set there"),
        ("for a in 1 2; do show $a; done", "line 1: $a changes in a loop"),
        ("case $(uname) in L*) A=1;; esac; show $A", "and $A is set there"),
    ],
)
def test_what_has_no_value_says_why(script: str, reason: str) -> None:
    ((_, reasons),) = missing(script)
    assert reasons and reason in reasons[0]


def test_given_values_win_over_the_script() -> None:
    assert missing("A=1; A=$(x); A+=2; show $A $B", A="7", B="8") == [("7", []), ("8", [])]


def test_only_the_part_that_has_no_value_is_marked() -> None:
    words = missing('A="--one 1 --two $N --three 3"; show $A')
    assert [text for text, reasons in words if reasons] == ["$N"]


def test_nothing_is_run(tmp_path: Path) -> None:
    file = tmp_path / "made"
    missing(f"touch {file}; $(touch {file}); show `touch {file}` > {file}; bash -c 'touch {file}'")
    assert not file.exists()


def test_lines_are_those_of_the_text() -> None:
    interpreter = shell.Interpreter()
    interpreter.run(parse("A=(\n  --one\n  --two \\\n    2\n)\n\nshow x \\\n  ${A[@]}\n"))
    (ran,) = interpreter.commands
    assert [(word.text, word.line) for word in ran.words] == [
        *(("show", 7), ("x", 7), ("--one", 2), ("--two", 3), ("2", 4))
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('show "a', "line 1: a double quote is not closed"),
        ("\nshow 'a", "line 2: a quote ' is not closed"),
        ("show $(a", "line 1: $( is not closed"),
        ("\nshow $(a # )", "line 2: $( is not closed"),
        ('show $(a ")', "line 1: $( is not closed"),
        ("show $(a $(b) ${c", "line 1: $( is not closed"),
        ("A=(1 2", "an array has no closing parenthesis"),
        ("A=(1 | 2)", "'|' stands in an array"),
        ("if true; then show", "fi is missing"),
        ("show\nfi", "line 2: 'fi' is not expected here"),
        ("case x", "in is missing"),
        ("f() { f; }; f", "the function f calls itself without an end"),
    ],
)
def test_what_is_no_script_is_refused(text: str, message: str) -> None:
    with pytest.raises(ShellError, match=re.escape(message)):
        shell.Interpreter().run(parse(text))


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab$ {}()[]'\"\\\n;&|<>#=+`-if then fi", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ShellError):
        shell.Interpreter().run(parse(text))
