"""Names and values in Markdown files, as text: no markup, no HTML, one line each, whatever they hold."""

import re
from collections.abc import Sequence

MARKUP = re.compile(r"[\\`*\[\]<>&|~#]")
NO_CODE = re.compile(r"[\\`<>&|]")


def one_line(text: object) -> str:
    """``text`` with every run of blanks, line ends and characters that cannot be printed as one blank."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def plain(text: object) -> str:
    """For a sentence, a heading or a cell; what would be markup comes as an entity."""
    return MARKUP.sub(lambda match: f"&#{ord(match[0])};", one_line(text))


def code(text: object) -> str:
    shown = one_line(text)
    return f"<code>{plain(shown)}</code>" if NO_CODE.search(shown) or not shown else f"`{shown}`"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table of cells that are Markdown already."""
    head, *body = ["| " + " | ".join(line) + " |" for line in (header, *rows)]
    return [head, "|---" * len(header) + "|", *body]
