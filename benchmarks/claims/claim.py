"""What a claim is: a paper's statement, and a function that decides it on result rows."""

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

from benchmarks.claims.rows import Rows


class Conditions(NamedTuple):
    """Both cannot hold. ``contradicted``: what was measured excludes the claim, as far as the runs had the power to."""

    confirmed: bool
    contradicted: bool


Decide = Callable[[Rows, SimpleNamespace], Conditions]


@dataclass(frozen=True)
class Claim:
    """``decide`` takes the rows of ``studies`` (names in configs/studies) and sets what it measures on its second argument.

    It raises `Missing` where a row that it needs is not there: the claim is not tested then, with what was measured before.
    What follows from scores is an `Estimate` with its interval; what is counted is a plain number.
    ``data``: what the rows were measured on. ``note``: what stands beside the verdict.
    """

    id: str
    text: str
    expected: str
    data: str
    decide: Decide
    studies: tuple[str, ...]
    note: str = ""

    @property
    def rule(self) -> str:
        """The statements of ``decide``: what the verdict was made by."""
        (function,) = ast.parse(inspect.getsource(self.decide)).body
        assert isinstance(function, ast.FunctionDef)
        return "\n".join(map(ast.unparse, function.body))


def claim(text: str, *, expected: str, data: str, note: str = "", study: str | None = None) -> Callable[[Decide], Claim]:
    """Makes a claim of a function that bears its id as its name; ``study``: another than the one of that name."""

    def made(decide: Decide) -> Claim:
        name = decide.__name__
        return Claim(name.upper(), text, expected, data, decide, (study or name,), note)

    return made
