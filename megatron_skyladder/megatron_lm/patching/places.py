"""Where a place lies in a source text, found by its syntax tree; the text itself stays as it is."""

from __future__ import annotations

import ast
import builtins
import difflib
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice

from megatron_skyladder.megatron_lm.patching.definitions import (
    FIRST_RETURN,
    START,
    Anchor,
    PatchError,
    Place,
)

MARK = "# skyladder patch"  # ends each inserted line
_MARKED = re.compile(rf"{re.escape(MARK)}\s*$")
NUM_CANDIDATES = 3  # that a refusal names
_WIDEST_CANDIDATE = 90  # characters of a statement that a message shows

Function = ast.FunctionDef | ast.AsyncFunctionDef
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Insertion:
    """Marked lines that go before the line with this index (from 0), where an anchor was found."""

    index: int
    lines: tuple[str, ...]
    anchor: Anchor


def split_lines(source: str) -> list[str]:
    """Split into lines with their ends, as Python counts them: at LF, CR LF and CR only."""
    return list(io.StringIO(source, newline=""))


def without_marked_lines(source: str) -> str:
    """Return the text without the lines that a patch has inserted."""
    return "".join(line for line in split_lines(source) if not _MARKED.search(line))


def insert(
    source: str, places: Iterable[Place]
) -> tuple[str, dict[Place, Insertion], dict[Place, PatchError]]:
    """Return the text with the lines of all places inserted, what fitted, and what did not.

    Args:
        source: a file's text without marked lines, line ends as they are in the file.
        places: all in this file.
    """
    lines = split_lines(source)
    found: dict[Place, Insertion] = {}
    errors: dict[Place, PatchError] = {}
    for place in places:
        try:
            found[place] = find(source, place)
        except PatchError as error:
            errors[place] = error
    for insertion in sorted(found.values(), key=lambda found: found.index, reverse=True):
        lines[insertion.index : insertion.index] = insertion.lines
    return "".join(lines), found, errors


def find(source: str, place: Place) -> Insertion:
    """Find where the lines of a place go in a text: at the first of its anchors that fits.

    Raises:
        PatchError: none fits; the message says what is there instead, for each.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise PatchError(
            f"{place.file} is not Python that can be parsed (line {error.lineno}: {error.msg}). "
            "Repair it first."
        ) from None
    complaints = []
    for anchor in place.anchors:
        try:
            return _find(source, tree, place, anchor)
        except PatchError as error:
            complaints.append(str(error))
    raise PatchError(" Nor does another place fit: ".join(complaints))


def _find(source: str, tree: ast.Module, place: Place, anchor: Anchor) -> Insertion:
    function = _function(tree, place, anchor)
    statement = _statement(function, place, anchor)
    _check_names(function, place)
    lines = split_lines(source)
    first = lines[statement.lineno - 1]
    indentation = first[: len(first) - len(first.lstrip())]
    alone = len(indentation.encode()) == statement.col_offset
    assert statement.end_lineno is not None and statement.end_col_offset is not None
    last = lines[statement.end_lineno - 1]
    rest = last.encode()[statement.end_col_offset :].decode().strip()
    if not alone or (rest and not rest.startswith("#")):
        raise PatchError(
            f"{place.file}:{statement.lineno}: the place {anchor} shares its line with other code, "
            "so no line fits beside it. Put it on a line of its own."
        )
    end = last[len(last.rstrip("\r\n")) :]
    if not end:
        raise PatchError(
            f"{place.file}:{statement.lineno}: the place {anchor} is the last line and has no line "
            "end. Add one."
        )
    index = statement.lineno - 1 if anchor.side == "before" else statement.end_lineno
    marked = tuple(f"{indentation}{line}  {MARK}{end}" for line in place.lines)
    return Insertion(index, marked, anchor)


def _function(tree: ast.Module, place: Place, anchor: Anchor) -> Function:
    functions = [node for node in ast.walk(tree) if isinstance(node, _FUNCTIONS)]
    found = [node for node in functions if node.name == anchor.function]
    if len(found) == 1:
        return found[0]
    if found:
        at = ", ".join(str(node.lineno) for node in found)
        raise PatchError(
            f"{place.file}: {anchor.function}() is defined {len(found)} times (lines {at}), so it "
            f"is not clear where [{place.name}] belongs. Leave only one in place."
        )
    names = {node.name: node.lineno for node in functions}
    near = difflib.get_close_matches(anchor.function, names, NUM_CANDIDATES, cutoff=0.4)
    raise PatchError(
        f"{place.file}: looked for the function {anchor.function}(), for {place.reason}; there is "
        f"none. Nearest: {_listed((f'{name}()', names[name]) for name in near)}"
    )


def _statement(function: Function, place: Place, anchor: Anchor) -> ast.stmt:
    if anchor.statement == START:
        body = function.body[1:] if ast.get_docstring(function) is not None else function.body
        if body:
            return body[0]
    statements = [(ast.unparse(node), node) for node in _simple_statements(function)]
    if anchor.statement == FIRST_RETURN:
        returns = (node for _, node in statements if isinstance(node, ast.Return))
        found: list[ast.stmt] = list(islice(returns, 1))
    else:
        found = [node for text, node in statements if fnmatchcase(text, anchor.statement)]
    if len(found) == 1:
        return found[0]
    if found:
        at = ", ".join(str(node.lineno) for node in found)
        raise PatchError(
            f"{place.file}: what is {anchor} is there {len(found)} times (lines {at}), so it is "
            f"not clear where [{place.name}] belongs. Leave only one in place."
        )
    shares = [(_share_of(anchor.statement, text), text, node.lineno) for text, node in statements]
    near = sorted((each for each in shares if each[0] >= 0.4), key=lambda each: -each[0])
    candidates = [(text, lineno) for _, text, lineno in near[:NUM_CANDIDATES]]
    raise PatchError(
        f"{place.file}: looked {anchor} (line {function.lineno}), for {place.reason}; there is "
        f"none. Nearest: {_listed(candidates)}"
    )


def _share_of(anchor: str, text: str) -> float:
    """Return how much of an anchor is in a statement, whatever the statement has for its ``*``."""
    fixed = anchor.replace("*", "")
    compared = text if anchor.startswith("*") else text[: len(fixed)]
    blocks = difflib.SequenceMatcher(None, fixed, compared, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks if block.size > 2) / len(fixed)


def _simple_statements(function: Function) -> Iterator[ast.stmt]:
    """Yield the statements that hold no others, in order; not those of functions within."""
    pending: list[ast.AST] = list(reversed(function.body))
    while pending:
        node = pending.pop()
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            continue
        if isinstance(node, ast.stmt) and not hasattr(node, "body") and not hasattr(node, "cases"):
            yield node
        else:
            pending.extend(reversed(list(ast.iter_child_nodes(node))))


def _listed(candidates: Iterable[tuple[str, int]]) -> str:
    texts = [
        f"line {lineno}: {text if len(text) <= _WIDEST_CANDIDATE else text[:_WIDEST_CANDIDATE]}"
        for text, lineno in candidates
    ]
    return "; ".join(texts) + "." if texts else "nothing like it."


def _check_names(function: Function, place: Place) -> None:
    """Make sure that every name the inserted lines take from the function exists there."""
    inserted = list(ast.walk(ast.parse("\n".join(place.lines))))
    used = {n.id for n in inserted if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    own = {n.target.id for n in inserted if isinstance(n, ast.NamedExpr)}
    own |= {n.asname or n.name for n in inserted if isinstance(n, ast.alias)}
    theirs = {n.arg for n in ast.walk(function) if isinstance(n, ast.arg)}
    theirs |= {
        n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    missing = sorted(used - own - theirs - set(dir(builtins)))
    if missing:
        raise PatchError(
            f"{place.file}: {function.name}() (line {function.lineno}) has no variable "
            f"{', '.join(missing)}, which the lines of [{place.name}] use. The function differs "
            "too much from Megatron's: insert the lines by hand, with your names."
        )
