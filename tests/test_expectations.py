"""docs/development/expectations.md: what is said to work has a test, and that test is there."""

import ast
import re

from source_tree import ROOT

PAGE = ROOT / "docs" / "development" / "expectations.md"
ROW = re.compile(r"\| (.+?) \| (works|no|partly: .+?) \| (?:`(tests/[\w/]+\.py)(?:::(test_\w+))?`)? ?\|")
LEAST = 55


def rows() -> list[tuple[str, ...]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [ROW.fullmatch(line).groups() for line in lines if not line.startswith("| expectation ")]


def test_what_works_is_held_by_a_test_that_there_is():
    for expectation, state, path, name in rows():
        assert path or state == "no", f"{expectation}: name the test"
        if path:
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name in tests or name is None, f"{expectation}: {path} has no {name}"


def test_most_of_it_works():
    found = rows()
    assert len({expectation for expectation, *_ in found}) == len(found) >= 66
    assert sum(state == "works" for _, state, *_ in found) >= LEAST
