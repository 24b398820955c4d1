"""What a Megatron-LM checkout has that the last row of the release table does not know.

    python tools/what_moved.py CHECKOUT [--json]

Reads the checkout, and asks its parser for flags in a process of its own; nothing is changed. One
screen: the patch, the functions that are hooked and their parameters, the flags, and what the stock
script reads. What is known of the last row is the table of flags (`flag_names.txt`), the names in
`tests/releases/stock_script.py`, and the parameters of the Megatron that is installed here.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tools"), str(REPOSITORY / "tests" / "releases")]

import list_megatron_flags  # noqa: E402
import stock_script  # noqa: E402

from megatron_skyladder.megatron_lm import flag_names, releases  # noqa: E402
from megatron_skyladder.megatron_lm.patching import checkout as patched  # noqa: E402
from megatron_skyladder.megatron_lm.patching import definitions  # noqa: E402

LAST = list(releases.RELEASES)[-1]
HOOKED = REPOSITORY / "megatron_skyladder" / "megatron_lm" / "hooks.py"
_MANY = 12  # names on a line; more are counted

Parameters = tuple[str, ...]


def hooked() -> list[tuple[str, str]]:
    """Return module and name of all functions in the tables of hooks, read from their source.

    Each once, however many hooks it has. Left out are those of some releases only, and those of
    other packages.
    """
    tree = ast.parse(HOOKED.read_text(encoding="utf-8"))
    constants = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    found = []
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "Hook"
        ):
            special = {"only_in", "package"} & {keyword.arg for keyword in node.keywords}
            module, name = (
                constants[each.id] if isinstance(each, ast.Name) else ast.literal_eval(each)
                for each in node.args[:2]
            )
            if not special:
                found.append((str(module), str(name)))
    return list(dict.fromkeys(found))


def parameters(root: Path, module: str, name: str) -> Parameters | None:
    """Return the parameters of a function or ``Class.method`` in a source tree; None: not there."""
    path = root / Path(*module.split("."))
    path = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    if not path.exists():
        return None
    body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [
            node
            for node in body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part
        ]
        if not found:
            return _imported(root, module, body, name)
        node = found[-1]
        body = node.body
    assert isinstance(node, ast.FunctionDef)
    args = node.args
    return tuple(each.arg for each in (*args.posonlyargs, *args.args, *args.kwonlyargs))


def _imported(root: Path, module: str, body: list[ast.stmt], name: str) -> Parameters | None:
    """Return the parameters of what a module imports under a name."""
    for node in body:
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if name in [alias.asname or alias.name for alias in node.names]:
            above = module.split(".")[: -node.level] if node.level else []
            return parameters(root, ".".join([*above, node.module]), name)
    return None


def compare(checkout: Path) -> dict[str, list[str]]:
    """Return what moved, by topic; empty lists where nothing did."""
    return {
        "patch": _patch(checkout),
        "hooked functions": _hooks(checkout, releases.installed().folder),
        "flags": _flags(checkout),
        "stock script": _script(checkout),
    }


def _patch(checkout: Path) -> list[str]:
    try:
        patched.examine(checkout, definitions.load())
    except ValueError as error:
        return str(error).splitlines()
    return []


def _hooks(checkout: Path, known: Path) -> list[str]:
    moved = []
    for module, name in hooked():
        here, there = parameters(known, module, name), parameters(checkout, module, name)
        if there is None:
            moved.append(f"{module}.{name} is gone")
        elif here is not None and here != there:
            new, gone = [each for each in there if each not in here], set(here) - set(there)
            moved.append(f"{module}.{name}: {_named(new, '+')} {_named(sorted(gone), '-')}".strip())
    return moved


def _flags(checkout: Path) -> list[str]:
    now = {*list_megatron_flags.flags_of(checkout)}
    known = {flag for flag, lines in flag_names.names_by_release().items() if LAST in lines}
    lines = []
    if now - known:
        lines.append(f"new: {_named(sorted(now - known))}")
    if known - now:
        lines.append(f"gone: {_named(sorted(known - now))}")
    return lines


def _script(checkout: Path) -> list[str]:
    paths = [checkout / name for name in stock_script.SCRIPTS[LAST]]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        return [f"{', '.join(missing)} is gone"]
    read = set().union(*(stock_script.names_read(path, "args") for path in paths))
    known = stock_script.READ[LAST]
    lines = [f"reads args.{name}, which is in no table" for name in sorted(read - known)]
    lines += [f"no longer reads args.{name}" for name in sorted(known - read)]
    found = stock_script.signatures(paths[0])
    for name, wanted in stock_script.SIGNATURES.items():
        if found.get(name) != wanted:
            lines.append(f"{name}{found.get(name, ' is gone')}, not {wanted}")
    return lines


def _named(names: list[str], sign: str = "") -> str:
    shown = " ".join(f"{sign}{name}" for name in names[:_MANY])
    return f"{shown} and {len(names) - _MANY} more" if len(names) > _MANY else shown


def main() -> None:
    """Print it; exit code 1 where something moved."""
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    found = releases.megatron_in(Path(words[0])) if len(words) == 1 else None
    if found is None:
        sys.exit("give one Megatron-LM checkout: python tools/what_moved.py CHECKOUT [--json]")
    moved = compare(found.folder.resolve())
    if "--json" in sys.argv:
        print(json.dumps(moved, indent=1))
    else:
        print(f"Megatron {found.version} in {found.folder}, beside row {LAST} of the table")
        for topic, lines in moved.items():
            print(f"\n{topic}: {'as known' if not lines else ''}")
            for line in lines:
                print(f"  {line}")
    sys.exit(1 if any(moved.values()) else 0)


if __name__ == "__main__":
    main()
