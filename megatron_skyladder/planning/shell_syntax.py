"""Statements of a shell script, made of its text; what they mean is `shell`'s part.

Understood is what launch scripts are made of: simple commands, assignments and arrays, quotes,
continuations, ``if``, ``case``, loops, functions, chains of ``&&`` and ``||``. Redirections and
here-documents are left out: they decide no word.

Own code, because the base install stays small and pure Python: of the libraries that read shell,
bashlex is under the GPL and tree-sitter's grammar is a compiled one. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

NAME = re.compile(r"[A-Za-z_]\w*")
DECLARING = ("export", "declare", "readonly", "local", "typeset")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_OPERATORS = ("&&", "||", ";;&", ";;", ";&", "&>>", "&>", "|&", "|", "&", ";", "(", ")")
_HEREDOC = re.compile(r"(?<!<)<<(?!<)-?[ \t]*(['\"\\]?)([^\s'\"|&;()<>]+)\1?")
_REDIRECTION = re.compile(r"\d*(<<<|<<-?|>>|>&|<&|>\||<>|>|<)")


class ShellError(ValueError):
    """The text is not a shell script that can be read."""


@dataclass(frozen=True)
class Part:
    """A piece of a word.

    Args:
        kind: ``text``, ``variable`` (what stands in ``${...}``), ``arithmetic`` or ``command``.
        text: its content.
        quoted: whether it stood in quotes, so that it is not split into words.
    """

    kind: str
    text: str
    quoted: bool


@dataclass(frozen=True)
class RawWord:
    """A word before anything in it has a value."""

    parts: tuple[Part, ...]
    line: int

    @property
    def plain(self) -> str:
        """Its text where that is known without values and quotes, else an empty string."""
        if all(part.kind == "text" and not part.quoted for part in self.parts):
            return "".join(part.text for part in self.parts)
        return ""


@dataclass(frozen=True)
class Operator:
    """What stands between commands."""

    text: str
    line: int


@dataclass(frozen=True)
class Assignment:
    """``NAME=value``, ``NAME+=value``, ``NAME=(values)``."""

    name: str
    values: tuple[RawWord, ...]
    is_array: bool
    appends: bool
    line: int


@dataclass(frozen=True)
class Command:
    """Words to run, with the assignments in front of them."""

    assignments: tuple[Assignment, ...]
    words: tuple[RawWord, ...]
    line: int


@dataclass(frozen=True)
class Branch:
    """The commands of one branch; ``patterns`` for ``case``, ``test`` for ``if``."""

    body: tuple[Statement, ...]
    test: tuple[Statement, ...] = ()
    patterns: tuple[RawWord, ...] = ()
    is_default: bool = False


@dataclass(frozen=True)
class Choice:
    """``if`` or ``case``: the first branch that fits."""

    branches: tuple[Branch, ...]
    line: int
    subject: RawWord | None = None


@dataclass(frozen=True)
class Chain:
    """``first && second || third``."""

    first: Statement
    rest: tuple[tuple[str, Statement], ...]
    line: int


@dataclass(frozen=True)
class Loop:
    """``for variable in values`` or ``while test``; ``until`` has no test that is looked at."""

    body: tuple[Statement, ...]
    line: int
    variable: str = ""
    test: tuple[Statement, ...] = ()


@dataclass(frozen=True)
class Function:
    """``name() { ... }``."""

    name: str
    body: tuple[Statement, ...]


@dataclass(frozen=True)
class Group:
    """``{ ... }`` or ``( ... )``."""

    body: tuple[Statement, ...]


Statement = Command | Choice | Chain | Loop | Function | Group
Token = RawWord | Operator | Assignment


class _Lexer:
    """Makes tokens of a text; one use each."""

    def __init__(self, text: str, first_line: int = 1) -> None:
        self.text = text
        self.at = 0
        self.line = first_line
        self.heredocs: list[str] = []
        self.at_command = True  # whether an assignment may stand here
        self.declaring = False  # after export and the like

    def tokens(self) -> Iterator[Token]:
        """Yield the tokens."""
        while self._skip_blanks():
            if self._skip_redirection():
                continue
            operator = self._operator()
            if operator is not None:
                self.at_command, self.declaring = True, False
                yield operator
                continue
            may_assign = self.at_command or self.declaring
            assignment = self._assignment() if may_assign else None
            if assignment is not None:
                yield assignment
                continue
            word = self._word()
            self.declaring = self.declaring or (self.at_command and word.plain in DECLARING)
            self.at_command = self.at_command and word.plain in _KEYWORDS
            yield word

    def _skip_blanks(self) -> bool:
        """Move to the next token; return whether there is one."""
        while self.at < len(self.text):
            character = self.text[self.at]
            if character == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            elif self.text.startswith("\\\n", self.at):
                self.at += 2
                self.line += 1
            elif character in " \t\r":
                self.at += 1
            else:
                return True
        return False

    def _operator(self) -> Operator | None:
        line = self.line
        if self.text[self.at] == "\n":
            self.at += 1
            self.line += 1
            self._skip_heredocs()
            return Operator(";", line)
        for operator in _OPERATORS:
            if self.text.startswith(operator, self.at):
                if operator in ("&>", "&>>"):  # a redirection of everything
                    self.at += len(operator)
                    self._skip_blanks()
                    self._word()
                    return None if self.at >= len(self.text) else self._operator()
                self.at += len(operator)
                return Operator(operator, line)
        return None

    def _skip_redirection(self) -> bool:
        match = _REDIRECTION.match(self.text, self.at)
        if match is None:
            return False
        self.at = match.end()
        if not self._skip_blanks() or self.text[self.at] == "\n":
            return True
        if match[1] in (">&", "<&") and self.text[self.at] in "0123456789-":
            self.at += 1
            return True
        target = self._word()
        if match[1] in ("<<", "<<-"):
            self.heredocs.append("".join(part.text for part in target.parts))
        return True

    def _skip_heredocs(self) -> None:
        """Skip the bodies of here-documents: their text is not part of the script."""
        for end in self.heredocs:
            while self.at < len(self.text):
                stop = self.text.find("\n", self.at)
                stop = len(self.text) if stop < 0 else stop
                found = self.text[self.at : stop].strip() == end
                self.at = stop + 1
                self.line += 1
                if found:
                    break
        self.heredocs.clear()

    def _assignment(self) -> Assignment | None:
        match = _ASSIGNMENT.match(self.text, self.at)
        if match is None:
            return None
        line = self.line
        self.at = match.end()
        appends = bool(match[2])
        if self.text.startswith("(", self.at):
            self.at += 1
            return Assignment(match[1], tuple(self._array()), True, appends, line)
        values = (self._word(),) if self.at < len(self.text) else (RawWord((), line),)
        return Assignment(match[1], values, False, appends, line)

    def _array(self) -> Iterator[RawWord]:
        while self._skip_blanks():
            character = self.text[self.at]
            if character == ")":
                self.at += 1
                return
            if character == "\n":
                self.at += 1
                self.line += 1
            elif character in "|&;(<>":
                raise ShellError(f"line {self.line}: {character!r} stands in an array.")
            else:
                yield self._word()
        raise ShellError(f"line {self.line}: an array has no closing parenthesis.")

    def _word(self) -> RawWord:
        line = self.line
        parts: list[Part] = []
        while self.at < len(self.text):
            character = self.text[self.at]
            if character in " \t\r\n|&;()<>":
                break
            if self.text.startswith("\\\n", self.at):
                self.at += 2
                self.line += 1
            elif character == "\\":
                parts.append(Part("text", self.text[self.at + 1 : self.at + 2], True))
                self.at += 2
            elif character == "'":
                parts.append(Part("text", self._until("'", 1), True))
            elif self.text.startswith("$'", self.at):
                parts.append(Part("text", self._until("'", 2), True))
            elif character == '"':
                parts += self._double_quoted()
            elif character in "$`":
                parts.append(self._expansion(quoted=False))
            else:
                parts.append(Part("text", character, False))
                self.at += 1
        return RawWord(tuple(_joined(parts)), line)

    def _until(self, end: str, skip: int) -> str:
        start = self.at + skip
        stop = self.text.find(end, start)
        if stop < 0:
            raise ShellError(f"line {self.line}: a quote {end} is not closed.")
        content = self.text[start:stop]
        self.line += content.count("\n")
        self.at = stop + 1
        return content

    def _double_quoted(self) -> Iterator[Part]:
        first_line = self.line
        self.at += 1
        yield Part("text", "", True)
        while self.at < len(self.text):
            character = self.text[self.at]
            if character == '"':
                self.at += 1
                return
            if self.text.startswith("\\\n", self.at):
                self.at += 2
                self.line += 1
            elif character == "\\" and self.text[self.at + 1 : self.at + 2] in (
                "$",
                "`",
                '"',
                "\\",
            ):
                yield Part("text", self.text[self.at + 1], True)
                self.at += 2
            elif character in "$`":
                yield self._expansion(quoted=True)
            else:
                self.line += character == "\n"
                yield Part("text", character, True)
                self.at += 1
        raise ShellError(f"line {first_line}: a double quote is not closed.")

    def _expansion(self, *, quoted: bool) -> Part:
        if self.text[self.at] == "`":
            return Part("command", self._until("`", 1), quoted)
        for opening, closing, kind in (
            ("$((", "))", "arithmetic"),
            ("$(", ")", "command"),
            ("${", "}", "variable"),
        ):
            if self.text.startswith(opening, self.at):
                return Part(kind, self._balanced(opening, closing), quoted)
        match = re.compile(r"\$([A-Za-z_]\w*|[0-9@*#?$!-])").match(self.text, self.at)
        if match is None:
            self.at += 1
            return Part("text", "$", quoted)
        self.at = match.end()
        return Part("variable", match[1], quoted)

    def _balanced(self, opening: str, closing: str) -> str:
        """Return what stands between brackets, other brackets inside included."""
        start = self.at + len(opening)
        if opening == "$(":
            end = _end_of_command(self.text, start)
            if end < 0:
                raise ShellError(f"line {self.line}: {opening} is not closed.")
            return self._take(start, end, closing)
        inner_open, inner_close = opening[-1], closing[-1]
        depth, at = 1, start
        while at < len(self.text):
            character = self.text[at]
            if character == "\\":
                at += 2
                continue
            if character == "'" and opening != "${":
                at = self.text.find("'", at + 1)
                if at < 0:
                    break
            elif character == inner_close and depth == 1 and self.text.startswith(closing, at):
                return self._take(start, at, closing)
            elif character == inner_open:
                depth += 1
            elif character == inner_close:
                depth -= 1
            at += 1
        raise ShellError(f"line {self.line}: {opening} is not closed.")

    def _take(self, start: int, end: int, closing: str) -> str:
        """Move behind a closing bracket and return what stands before it."""
        content = self.text[start:end]
        self.line += content.count("\n")
        self.at = end + len(closing)
        return content


def _end_of_command(text: str, at: int) -> int:
    """Return where the ``)`` of a ``$(`` stands whose content begins here; -1: nowhere.

    Brackets and quotes do not count in quotes, comments and here-documents.
    """
    depth, heredocs = 1, []
    while 0 <= at < len(text):
        character, before = text[at], text[at - 1]
        if character in "\\'\"`$":
            at = _behind_quoted(text, at)
            continue
        heredoc = _HEREDOC.match(text, at)
        if heredoc:
            heredocs.append(heredoc[2])
            at = heredoc.end()
            continue
        if character == "#" and before in " \t\n;|&(":
            at = text.find("\n", at)
            continue
        if character == "\n":
            at = _behind_heredocs(text, at + 1, heredocs)
            heredocs = []
            continue
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return at
        at += 1
    return -1


def _behind_quoted(text: str, at: int) -> int:
    """Return the index behind an escape, quotes or an expansion that begins here; -1: no end."""
    opening = text[at]
    if opening == "\\":
        return at + 2
    if opening == "'":
        return text.find("'", at + 1) + 1 or -1
    if opening == "$":
        for begin, end in (("$((", "))"), ("$(", ")"), ("${", "}")):
            if not text.startswith(begin, at):
                continue
            if begin == "$(":
                return _end_of_command(text, at + 2) + 1 or -1
            return _behind(text, at + len(begin), end)
        return at + 1
    return _behind(text, at + 1, opening)


def _behind(text: str, at: int, end: str) -> int:
    """Return the index behind the next ``end`` that does not stand in quotes; -1: no end.

    In double quotes single ones are text.
    """
    depth = 0  # of brackets in arithmetic
    while 0 <= at < len(text):
        if depth == 0 and text.startswith(end, at):
            return at + len(end)
        if text[at] in "\\$" or (text[at] in '`"' and end != "`"):
            at = _behind_quoted(text, at)
            continue
        if end == "))":
            depth += (text[at] == "(") - (text[at] == ")")
        at += 1
    return -1


def _behind_heredocs(text: str, at: int, ends: Iterable[str]) -> int:
    """Return the index behind the bodies of here-documents, of which the first begins here."""
    for end in ends:
        while at < len(text):
            stop = text.find("\n", at)
            stop = len(text) if stop < 0 else stop
            line, at = text[at:stop].strip(), stop + 1
            if line == end:
                break
    return at


_KEYWORDS = ("if", "then", "elif", "else", "while", "until", "do", "{", "!", "time", "exec", "env")
_ENDS = ("fi", "then", "elif", "else", "do", "done", "esac", "}", ";;", ")")


def _joined(parts: Iterable[Part]) -> Iterator[Part]:
    """Join neighbouring pieces of text."""
    last: Part | None = None
    for part in parts:
        if last and (last.kind, last.quoted) == (part.kind, part.quoted) == ("text", last.quoted):
            last = Part("text", last.text + part.text, last.quoted)
            continue
        if last:
            yield last
        last = part
    if last:
        yield last


def parse(text: str, first_line: int = 1) -> tuple[Statement, ...]:
    """Return the statements of a script.

    Raises:
        ShellError: quotes, brackets or keywords do not match.
    """
    parser = _Parser(list(_Lexer(text, first_line).tokens()))
    statements = parser.statements(())
    if parser.at < len(parser.tokens):
        raise ShellError(f"line {parser.line}: {parser.keyword!r} is not expected here.")
    return statements


class _Parser:
    """Makes statements of tokens."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.at = 0

    @property
    def line(self) -> int:
        """Line of the next token."""
        token = self.tokens[min(self.at, len(self.tokens) - 1)] if self.tokens else None
        return token.line if token else 1

    @property
    def keyword(self) -> str:
        """The next token's text, where it may be a keyword or an operator."""
        if self.at >= len(self.tokens):
            return ""
        token = self.tokens[self.at]
        if isinstance(token, Operator):
            return token.text
        return token.plain if isinstance(token, RawWord) else ""

    def statements(self, ends: tuple[str, ...]) -> tuple[Statement, ...]:
        """Return the statements up to one of these keywords."""
        found: list[Statement] = []
        while self.at < len(self.tokens):
            keyword = self.keyword
            if keyword in ends or (not ends and keyword in _ENDS):
                break
            if isinstance(self.tokens[self.at], Operator) and keyword != "(":
                self.at += 1
                continue
            found.append(self._chain())
        return tuple(found)

    def _chain(self) -> Statement:
        line = self.line
        first = self._statement()
        rest = []
        while self.keyword in ("&&", "||"):
            operator = self.keyword
            self.at += 1
            self._skip_separators()
            rest.append((operator, self._statement()))
        return Chain(first, tuple(rest), line) if rest else first

    def _statement(self) -> Statement:
        keyword, line = self.keyword, self.line
        if keyword == "if":
            return self._if(line)
        if keyword == "case":
            return self._case(line)
        if keyword in ("for", "while", "until", "select"):
            return self._loop(line)
        if keyword == "{":
            return Group(self._block("}"))
        if keyword == "(":
            return Group(self._block(")"))
        if keyword == "function" or self._is_function():
            return self._function()
        return self._command(line)

    def _expect(self, keyword: str) -> None:
        if self.keyword != keyword:
            raise ShellError(f"line {self.line}: {keyword} is missing.")
        self.at += 1

    def _block(self, end: str) -> tuple[Statement, ...]:
        self.at += 1
        body = self.statements((end,))
        self._expect(end)
        return body

    def _if(self, line: int) -> Choice:
        branches = []
        while self.keyword in ("if", "elif"):
            self.at += 1
            test = self.statements(("then",))
            self._expect("then")
            branches.append(Branch(self.statements(("elif", "else", "fi")), test))
        if self.keyword == "else":
            self.at += 1
            branches.append(Branch(self.statements(("fi",)), is_default=True))
        self._expect("fi")
        return Choice(tuple(branches), line)

    def _case(self, line: int) -> Choice:
        self.at += 1
        subject = self._next_word()
        self._skip_separators()
        self._expect("in")
        branches = []
        self._skip_separators()
        while self.at < len(self.tokens) and self.keyword != "esac":
            patterns = []
            while self.keyword != ")" and self.at < len(self.tokens):
                token = self.tokens[self.at]
                if isinstance(token, RawWord):
                    patterns.append(token)
                self.at += 1
            self._expect(")")
            body = self.statements((";;", ";&", ";;&", "esac"))
            branches.append(Branch(body, patterns=tuple(patterns)))
            if self.keyword in (";;", ";&", ";;&"):
                self.at += 1
            self._skip_separators()
        self._expect("esac")
        return Choice(tuple(branches), line, subject)

    def _loop(self, line: int) -> Loop:
        keyword = self.keyword
        self.at += 1
        variable = self.keyword if keyword in ("for", "select") else ""
        test = self.statements(("do",))
        self._expect("do")
        body = self.statements(("done",))
        self._expect("done")
        is_name = bool(NAME.fullmatch(variable))
        return Loop(body, line, variable if is_name else "", test if keyword == "while" else ())

    def _is_function(self) -> bool:
        following = [
            token.text if isinstance(token, Operator) else ""
            for token in self.tokens[self.at + 1 : self.at + 3]
        ]
        return bool(NAME.fullmatch(self.keyword)) and following == ["(", ")"]

    def _function(self) -> Function:
        if self.keyword == "function":
            self.at += 1
        name = self.keyword
        self.at += 1
        while self.keyword in ("(", ")", ";"):
            self.at += 1
        return Function(name, self._block("}"))

    def _next_word(self) -> RawWord:
        token = self.tokens[self.at] if self.at < len(self.tokens) else None
        if not isinstance(token, RawWord):
            raise ShellError(f"line {self.line}: a word is missing.")
        self.at += 1
        return token

    def _skip_separators(self) -> None:
        while self.keyword == ";":
            self.at += 1

    def _command(self, line: int) -> Command:
        assignments: list[Assignment] = []
        words: list[RawWord] = []
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            if isinstance(token, Operator):
                if not words or words[0].plain != "[[" or words[-1].plain == "]]":
                    break
                words.append(RawWord((Part("text", token.text, False),), token.line))
            elif isinstance(token, Assignment):
                assignments.append(token)
            else:
                words.append(token)
            self.at += 1
        return Command(tuple(assignments), tuple(words), line)


def words_in(text: str, line: int) -> list[RawWord]:
    """Return the words of a piece of text, such as the default in ``${NAME:-words}``."""
    return [token for token in _Lexer(text, line).tokens() if isinstance(token, RawWord)]
