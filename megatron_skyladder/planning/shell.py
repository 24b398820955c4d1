"""The words of commands in a shell script, from its text alone: nothing in it is run.

Assignments, arrays, ``${NAME:-default}``, whole-number arithmetic, ``if`` and ``case`` on known
values, functions, ``eval`` and ``bash -c`` have values here. What would have to be run (``$(...)``,
tests of files) has none: a word that depends on it carries the reason, and whoever needs the word
asks for it. The script is read as if it got no arguments, in an empty environment. Standard
library only.
"""

from __future__ import annotations

import ast
import fnmatch
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from megatron_skyladder.planning.shell_syntax import (
    DECLARING,
    NAME,
    Assignment,
    Branch,
    Chain,
    Choice,
    Command,
    Function,
    Loop,
    Part,
    RawWord,
    ShellError,
    Statement,
    parse,
    words_in,
)

_MAX_CALLS = 50  # a script that calls itself must not keep us


@dataclass(frozen=True)
class Missing:
    """A piece of a word that has no value.

    Args:
        shown: what stands in the word in its place: ``$NAME``, ``$(...)``.
        reason: why it has none, with the line.
        is_unset: whether nothing sets this variable, as far as the text goes.
    """

    shown: str
    reason: str
    is_unset: bool = False

    @property
    def name(self) -> str:
        """The variable whose value would help, or an empty string."""
        return self.shown[1:] if NAME.fullmatch(self.shown[1:]) else ""


@dataclass(frozen=True)
class Word:
    """A word with its value.

    Args:
        text: the value, with ``$NAME`` left in it where that has none.
        line: where it stands, 1 for the first.
        missing: what in it has no value.
    """

    text: str
    line: int
    missing: tuple[Missing, ...] = ()

    def __add__(self, other: Word) -> Word:
        """Return both as one word."""
        missing = tuple(dict.fromkeys(self.missing + other.missing))
        return Word(self.text + other.text, self.line, missing)


@dataclass(frozen=True)
class Ran:
    """A command that the script would run, with the variables that it would see."""

    words: tuple[Word, ...]
    line: int
    environment: dict[str, str]


@dataclass
class Interpreter:
    """Goes through statements and collects the commands.

    Args:
        fixed: values that the user gives; assignments in the script do not change them.
    """

    fixed: dict[str, str] = field(default_factory=dict)
    variables: dict[str, list[Word]] = field(default_factory=dict)
    commands: list[Ran] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _functions: dict[str, tuple[Statement, ...]] = field(default_factory=dict)
    _num_calls: int = 0

    def run(self, statements: Iterable[Statement]) -> None:
        """Go through statements, in order."""
        for statement in statements:
            if isinstance(statement, Command):
                self._command(statement)
            elif isinstance(statement, Choice):
                self._choice(statement)
            elif isinstance(statement, Chain):
                self._chain(statement)
            elif isinstance(statement, Loop):
                self._loop(statement)
            elif isinstance(statement, Function):
                self._functions[statement.name] = statement.body
            else:
                self.run(statement.body)

    # commands

    def _command(self, command: Command) -> None:
        words = [word for raw in command.words for word in self._expand(raw)]
        declares = bool(words) and words[0].text in DECLARING
        for assignment in command.assignments:
            if declares or not words:
                self._assign(assignment)
        if not words or declares:
            return
        first = words[0].text
        if first in self._functions:
            self._call(first)
        elif first == "eval":
            self._evaluate(words[1:], command.line)
        elif first in ("source", "."):
            self.notes.append(f"line {command.line}: {_shown(words)} is not read")
        else:
            self._record(words, command)

    def _record(self, words: list[Word], command: Command) -> None:
        before = {name: _shown(values) for name, values in self.variables.items()}
        own = {each.name: _shown(self._values(each)) for each in command.assignments}
        ran = Ran(tuple(words), command.line, {**before, **own})
        for index, word in enumerate(words[:-1]):
            shell = words[index - 1].text.rpartition("/")[2] if index else ""
            if word.text in ("-c", "-lc") and shell in ("bash", "sh"):
                inner = Interpreter(self.fixed, dict(self.variables))
                inner.run(parse(words[index + 1].text, words[index + 1].line))
                outer = tuple(words[: index - 1])
                self.commands += [
                    Ran((*outer, *each.words), each.line, each.environment)
                    for each in inner.commands
                ]
                return
        self.commands.append(ran)

    def _call(self, name: str) -> None:
        self._num_calls += 1
        if self._num_calls > _MAX_CALLS:
            raise ShellError(f"the function {name} calls itself without an end.")
        self.run(self._functions[name])

    def _evaluate(self, words: list[Word], line: int) -> None:
        """``eval``: the text is read once more; what has no value still stands there as $NAME."""
        self.run(parse(" ".join(word.text for word in words), line))

    def _chain(self, chain: Chain) -> None:
        status: bool | None = self._status(chain.first)
        for operator, statement in chain.rest:
            wanted = operator == "&&"
            if status is None:
                reason = f"line {chain.line}: whether it gets past {operator} is not known"
                self._skip((statement,), reason)
            elif status == wanted:
                status = self._status(statement)

    def _status(self, statement: Statement) -> bool | None:
        """Run a statement and return whether it succeeds; a test by its values, others do."""
        words = statement.words if isinstance(statement, Command) else ()
        first = words[0].plain if words else ""
        if first in ("[", "[[", "test", "true", "false", ":"):
            return self._test((statement,))
        self.run((statement,))
        return True

    def _loop(self, loop: Loop) -> None:
        """Go through a loop once, with a variable that has no value."""
        if loop.test and self._test(loop.test) is False:
            return
        if loop.variable and loop.variable not in self.fixed:
            self.variables[loop.variable] = [
                self._without_value(loop.variable, loop.line, f"${loop.variable} changes in a loop")
            ]
        self.run(loop.body)

    def _skip(self, body: Iterable[Statement], reason: str) -> None:
        """Leave statements out; what they would assign is no longer known, but may be as it was."""
        assigned = sorted({each.name for each in _assignments(body)} - self.fixed.keys())
        if assigned:
            self.notes.append(f"{reason}, so what it does to {', '.join(assigned)} is left out")
        for name in assigned:
            if name not in self.variables:
                missing = Missing(f"${name}", f"{reason}, and ${name} is set there")
                self.variables[name] = [Word(missing.shown, 0, (missing,))]

    # choices

    def _choice(self, choice: Choice) -> None:
        for branch in choice.branches:
            fits = branch.is_default or self._fits(choice, branch)
            if fits is None:
                reason = f"line {choice.line}: which branch is taken cannot be said from the text"
                self._skip([s for b in choice.branches for s in b.body], reason)
                return
            if fits:
                self.run(branch.body)
                return

    def _fits(self, choice: Choice, branch: Branch) -> bool | None:
        """Return whether a branch is taken; None: it depends on what is not known."""
        if choice.subject is None:
            return self._test(branch.test)
        subject = self._text(choice.subject)
        if subject is None:
            return None
        patterns = [self._text(pattern) for pattern in branch.patterns]
        return any(fnmatch.fnmatchcase(subject, pattern or "") for pattern in patterns)

    def _test(self, test: tuple[Statement, ...]) -> bool | None:
        if len(test) == 1 and isinstance(test[0], Chain):
            return self._test_of_chain(test[0])
        if len(test) != 1 or not isinstance(test[0], Command):
            return None
        words = [self._text(raw) for raw in test[0].words]
        if any(word is None for word in words):
            return None
        return _evaluated_test([word or "" for word in words])

    def _test_of_chain(self, chain: Chain) -> bool | None:
        status = self._test((chain.first,))
        for operator, statement in chain.rest:
            if status is None:
                return None
            if status == (operator == "&&"):
                status = self._test((statement,))
        return status

    def _text(self, raw: RawWord) -> str | None:
        """Return a word's text as one piece, or None where it has none."""
        quoted = RawWord(tuple(Part(p.kind, p.text, True) for p in raw.parts), raw.line)
        text = ""
        for word in self._expand(quoted):
            text += " " * bool(text) + word.text
            for missing in word.missing:
                if not missing.is_unset:
                    return None
                text = text.replace(missing.shown, "")  # a test takes it as empty
        return text

    # variables

    def _assign(self, assignment: Assignment) -> None:
        if assignment.name in self.fixed:
            return
        values = self._values(assignment)
        if assignment.appends:
            before = self.variables.get(assignment.name, [])
            if assignment.is_array:
                values = [*before, *values]
            elif before:
                values = [before[0] + values[0], *before[1:]] if values else before
        self.variables[assignment.name] = values

    def _values(self, assignment: Assignment) -> list[Word]:
        if assignment.is_array:
            return [word for raw in assignment.values for word in self._expand(raw)]
        (raw,) = assignment.values
        whole = RawWord(tuple(Part(p.kind, p.text, True) for p in raw.parts), raw.line)
        return [_one_word(list(self._expand(whole)), raw.line)]

    def _expand(self, raw: RawWord) -> Iterator[Word]:
        """Yield the words that one word becomes."""
        current: Word | None = None
        for part in raw.parts:
            pieces = self._pieces(part, raw.line)
            if part.kind == "text" or (part.quoted and not _is_all(part)):
                joined = Word("", raw.line)
                for piece in pieces:
                    joined = joined + piece
                current = joined if current is None else current + joined
                continue
            for index, piece in enumerate(pieces):
                if index and current is not None:
                    yield current
                    current = None
                current = piece if current is None else current + piece
        if current is not None:
            yield current

    def _pieces(self, part: Part, line: int) -> list[Word]:
        """Return the words that a piece stands for; several where it is an array or is split."""
        if part.kind == "text":
            return [Word(part.text, line)]
        if part.kind == "command":
            command = part.text if len(part.text) < 40 else f"{part.text[:36]}..."
            missing = Missing("$(...)", f"line {line}: $({command}) would have to be run")
            return [Word(missing.shown, line, (missing,))]
        if part.kind == "arithmetic":
            return [self._arithmetic(part.text, line)]
        values = self._variable(part.text, line)
        if part.quoted:
            return values if _is_all(part) else [_one_word(values, line)]
        return [piece for value in values for piece in _split(value, line)]

    def _variable(self, text: str, line: int) -> list[Word]:
        """Return the values of what stands in ``${...}``."""
        match = re.fullmatch(
            r"(?P<length>#(?=\w))?(?P<name>[A-Za-z_]\w*|[0-9@*#?$!-])(?P<index>\[[^]]*\])?"
            r"(?P<operator>:?[-=+?])?(?P<word>.*)",
            text,
            re.DOTALL,
        )
        if match is None or (match["word"] and not match["operator"]):
            return [self._without_value(text, line, f"${{{text}}} is not worked out here")]
        name, operator, index = match["name"], match["operator"], match["index"]
        values = self._known(name)
        if match["length"]:
            if values is None:
                return [self._without_value(name, line)]
            return [Word(str(len(values) if index else len(values[0].text)), line)]
        is_set = values is not None and (not (operator or "").startswith(":") or _shown(values))
        if operator and operator[-1] in "-=":
            if not is_set:
                return self._default(name, match["word"], operator[-1] == "=", line)
        elif operator and operator[-1] == "+":
            return self._default(name, match["word"], False, line) if is_set else []
        if values is None:
            if name in ("@", "*"):
                return []
            return [self._without_value(name, line)]
        if index and index not in ("[@]", "[*]"):
            number = index[1:-1]
            return values[int(number) : int(number) + 1] if number.isdigit() else values[:1]
        return values if index or name in self.fixed else values[:1]

    def _known(self, name: str) -> list[Word] | None:
        if name in self.fixed:
            return [Word(self.fixed[name], 0)]
        if name == "#":  # the script is read as if it got no arguments
            return [Word("0", 0)]
        return self.variables.get(name)

    def _default(self, name: str, text: str, assigns: bool, line: int) -> list[Word]:
        tokens = words_in(text, line)
        words = [word for raw in tokens for word in self._expand(raw)]
        if assigns and name not in self.fixed:
            self.variables[name] = words or [Word("", line)]
        return words

    def _without_value(self, name: str, line: int, why: str | None = None) -> Word:
        missing = Missing(f"${name}", f"line {line}: {why or f'${name} has no value'}", why is None)
        return Word(missing.shown, line, (missing,))

    def _arithmetic(self, text: str, line: int) -> Word:
        """Return a whole-number expression's value, as the shell rounds it (towards zero)."""
        unknown: list[Missing] = []

        def replace(match: re.Match[str]) -> str:
            name = match[1] or match[2]
            value = (self._known(name) or [self._without_value(name, line)])[0]
            if _is_whole(value.text):
                return value.text.strip()
            why = f"line {line}: ${name} is no whole number"
            unknown.extend(value.missing or (Missing(f"${name}", why),))
            return "1"

        filled = re.sub(r"\$?\{?([A-Za-z_]\w*)\}?|\$(\d)", replace, text)
        if unknown:
            return Word("".join(each.shown for each in unknown), line, tuple(unknown))
        try:
            return Word(str(_calculate(ast.parse(filled.strip(), mode="eval").body)), line)
        except (SyntaxError, ValueError, ZeroDivisionError):
            why = f"line {line}: $(({text})) is not worked out here"
            return Word("$(...)", line, (Missing("$(...)", why),))


def _is_all(part: Part) -> bool:
    """Return whether a piece stands for all elements of an array, one word each."""
    return part.kind == "variable" and (part.text.endswith("[@]") or part.text == "@")


def _split(value: Word, line: int) -> list[Word]:
    """Split a value at blanks, as the shell does outside quotes."""
    return [
        Word(text, value.line or line, tuple(m for m in value.missing if m.shown in text))
        for text in value.text.split()
    ]


def _one_word(values: list[Word], line: int) -> Word:
    """Return the elements of an array as one word, blanks between them."""
    joined = values[0] if values else Word("", line)
    for value in values[1:]:
        joined = joined + Word(" ", line) + value
    return joined


def _shown(words: Iterable[Word]) -> str:
    return " ".join(word.text for word in words)


def _is_whole(text: str) -> bool:
    return re.fullmatch(r"\s*-?\d+\s*", text) is not None


def _assignments(body: Iterable[Statement]) -> Iterator[Assignment]:
    """Yield all assignments in statements, those in branches and loops included."""
    for statement in body:
        if isinstance(statement, Command):
            yield from statement.assignments
        elif isinstance(statement, Choice):
            for branch in statement.branches:
                yield from _assignments(branch.body)
        elif isinstance(statement, Chain):
            yield from _assignments((statement.first, *(part for _, part in statement.rest)))
        else:
            yield from _assignments(statement.body)


def _calculate(node: ast.AST) -> int:
    """Return the value of whole numbers under + - * / %.

    Raises:
        ValueError: anything else.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_calculate(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = _calculate(node.left), _calculate(node.right)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        quotient = abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)
        if isinstance(node.op, ast.Div):
            return quotient
        if isinstance(node.op, ast.Mod):
            return left - quotient * right
    raise ValueError("not a sum of whole numbers")


_COMPARISONS = {
    "-eq": lambda a, b: a == b,
    "-ne": lambda a, b: a != b,
    "-gt": lambda a, b: a > b,
    "-ge": lambda a, b: a >= b,
    "-lt": lambda a, b: a < b,
    "-le": lambda a, b: a <= b,
}


def _evaluated_test(words: list[str]) -> bool | None:
    """Return what ``[ ... ]`` or ``[[ ... ]]`` says; None: it asks for more than values."""
    if words in (["true"], [":"]):
        return True
    if words == ["false"]:
        return False
    if words[:1] not in (["["], ["[["], ["test"]):
        return None
    words = words[1:] if words[0] == "test" else words[1:-1]
    if words[:1] == ["!"]:
        inner = _evaluated_test(["test", *words[1:]])
        return None if inner is None else not inner
    for operator, joins in (("||", any), ("&&", all)):
        if operator in words:
            at = words.index(operator)
            parts = [_evaluated_test(["test", *part]) for part in (words[:at], words[at + 1 :])]
            return None if None in parts else joins(bool(part) for part in parts)
    if len(words) == 1:
        return bool(words[0])
    if len(words) == 2 and words[0] in ("-z", "-n"):
        return bool(words[1]) == (words[0] == "-n")
    if len(words) != 3:
        return None
    left, operator, right = words
    if operator in ("=", "==", "!="):
        return fnmatch.fnmatchcase(left, right) == (operator != "!=")
    if operator in _COMPARISONS and _is_whole(left) and _is_whole(right):
        return bool(_COMPARISONS[operator](int(left), int(right)))
    return None
