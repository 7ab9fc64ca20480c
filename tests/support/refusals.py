"""How bad input is refused: with one line that names it."""

from collections.abc import Callable
from typing import Any


def read_or_refused(read: Callable[[], Any], refusal: type[Exception]) -> Any:
    """What ``read`` returns, or None where it raises ``refusal`` with one line; other exceptions are not caught."""
    try:
        return read()
    except refusal as error:
        text = str(error)
    assert text and "\n" not in text
    return None
