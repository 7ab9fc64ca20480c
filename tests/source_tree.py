"""What the tests of structure read: our own sources and the imports in their syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTING_CALLS = {"import_module", "__import__", "need_extra", "find_spec"}


def our_files() -> dict[str, str]:
    """Path from the root → source, of every module that is installed."""
    paths = [*ROOT.glob("mitrain/**/*.py"), *ROOT.glob("kernels/mitrain_kernels/**/*.py")]
    assert len(paths) > 20, "too few files found to mean anything"
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


def dotted(path: str) -> str:
    """The import name of a file: kernels/mitrain_kernels/a/__init__.py → mitrain_kernels.a.__init__."""
    return path.removesuffix(".py").removeprefix("kernels/").replace("/", ".")


def imports(path: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything the file imports, wherever in it; ``from a import b`` is a.b.

    Imports by name count: ``importlib.import_module("x")``, ``need_extra("x", …)``.
    """
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = dotted(path).split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            if called in IMPORTING_CALLS and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value
