"""How a sample's text is put to the model: a template with one field, filled by plain substitution.

``{prompt}`` stands for the text; ``{{`` and ``}}`` for braces. Nothing else is understood: no format as ``{prompt:>9}``,
no attribute, no second field. Templates also come with other people's exports.
"""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

LONGEST = 1 << 15
PIECES = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]")
BRACES = {"{{": "{", "}}": "}"}


def turn_of(template: str) -> str:
    """``template`` of an earlier question with its answer: both named once in this order, or empty; else ValueError."""
    fields = [piece for piece in PIECES.findall(template) if piece not in BRACES]
    if template and fields != ["{prompt}", "{answer}"]:
        raise ValueError("write {prompt} and then {answer}, once each, {{ and }} for braces; or leave it empty")
    return template


TurnSetting = Annotated[str, Field(max_length=LONGEST), AfterValidator(turn_of)]


def checked(field: str, required: bool, template: str) -> str:
    """``template``, if it has no field but ``{field}`` (and that one, where it is ``required``); else ValueError."""
    pieces = {piece for piece in PIECES.findall(template) if piece not in BRACES}
    own = f"{{{field}}}"
    if strange := sorted(pieces - {own}):
        raise ValueError(
            f"{strange[0][:40]!r} is not a field of this template: write {own} where the text goes, {{{{ and }}}} for braces"
        )
    if required and own not in pieces:
        raise ValueError(f"the template has no {own}: write it where the text goes")
    return template


def template_with(field: str, required: bool = True) -> type[str]:
    """The type of a setting that holds a template with this field."""
    return Annotated[str, Field(max_length=LONGEST), AfterValidator(lambda text: checked(field, required, text))]


def frame_of(template: str) -> tuple[str, ...]:
    """The parts of a checked template around its field: ``text.join`` of them is the template with the text in it."""
    parts = [""]
    for piece in re.split(f"({PIECES.pattern})", template):
        if piece in BRACES or not PIECES.fullmatch(piece):
            parts[-1] += BRACES.get(piece, piece)
        else:
            parts.append("")
    return tuple(parts)
