"""Texts in files of their own: a second text beside a sample's, for an encoder of texts."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from mitrain.core.errors import DataError
from mitrain.data.contents import read_content
from mitrain.data.images import Facts
from mitrain.data.kinds import kind_of

MAX_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Text(Facts):
    """``stored_size``: (characters, 1)."""

    text: str


def read_text(root: Path, relative: str) -> Text:
    """The text of the file ``root/relative``, in UTF-8; DataError, naming the file, where it has none."""
    content, where = read_content(root, relative, "text", MAX_BYTES)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f", it is {kind_of(content)}" if kind_of(content) else ""
        raise DataError(f"{where} is no text in UTF-8 (byte {error.start}{what}): convert it") from None
    if not text.strip() or "\0" in text:
        raise DataError(f"{where} {'holds zero bytes' if text.strip() else 'is empty'}: replace it, or leave it out")
    return Text(digest=hashlib.sha256(content).hexdigest(), stored_size=(len(text), 1), where=where, text=text)
