"""Texts as token ids, each tokenized as one.

A tokenizer may open and close a text with tokens of its own, or put a blank before it; ids of parts that were tokenized
apart would carry these into the middle, where the model never saw them.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

WHOLE = ("", "")
"""The frame of a text that stands alone."""

SPARE = 16  # tokens that a tokenizer puts around a text

TextOrTurns = str | tuple[str, ...]
"""What stands between the parts of a frame: one text in each place, or one for each."""


def last_of(words: TextOrTurns) -> str:
    """What was said last, which a message names."""
    return words if isinstance(words, str) else words[-1]


class Tokens:
    """A tokenizer that lets the special tokens of a frame act, and those in a user's text be plain text.

    ``opening``, ``closing``: the ids that the tokenizer puts around a text by itself.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        whole, bare = (tokenizer("a", add_special_tokens=own)["input_ids"] for own in (True, False))
        starts = (k for k in range(len(whole)) if whole[k : k + len(bare)] == bare)
        start = next(starts, 0)
        self.opening, self.closing = whole[:start], whole[start + len(bare) :]
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted(special, key=len, reverse=True)
        self._prompts = lru_cache(1 << 10)(
            lambda *asked: self.prompt(*asked)
        )  # one and the same is often asked of many pictures
        self.control = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def ids(self, text: TextOrTurns, frame: Sequence[str] = WHOLE, after: str = "", strip: str | None = " ") -> list[int]:
        """Ids of ``text`` between the parts of ``frame``, and of ``after`` behind them, without opening and closing.

        ``strip``: characters that are dropped at the ends, before ``after`` is added; None: all white space.
        """
        pieces = self._pieces(text, frame)
        pieces[0] = pieces[0].lstrip(strip)
        pieces[-1] = pieces[-1].rstrip(strip)
        blank = not pieces[-1][-1].isspace() if pieces[-1] else len(pieces) == 1
        pieces[-1] += after if blank else after.lstrip()  # none after a special token or the end of a line
        whole = "".join(pieces)
        if len(self.control.findall(whole)) == len(pieces) // 2:
            return self._encoded(whole)
        parts = [
            self._encoded(p, True) if i % 2 == 0 else [self.tokenizer.convert_tokens_to_ids(p)] for i, p in enumerate(pieces)
        ]
        return [token for part in parts for token in part]

    def prompt(self, text: TextOrTurns, frame: Sequence[str] = WHOLE) -> list[int]:
        """Ids of a text that an answer follows: opened, not closed."""
        return [*self.opening, *self.ids(text, frame)]

    def answered(self, text: TextOrTurns, answer: str, frame: Sequence[str] = WHOLE) -> tuple[list[int], int]:
        """Ids of a prompt with a blank and its answer behind it, tokenized as one text; and where the answer begins.

        Behind a special token or a line's end at the frame's end there is no blank. Where the tokenizer joins the prompt's
        end and the answer into one token, the answer begins with that; a row's first token is never an answer's.
        """
        row = [*self.opening, *self.ids(text, frame, f" {answer}")]
        return row, max(1, shared_start(row, self._prompts(text, tuple(frame))))

    def _pieces(self, text: TextOrTurns, frame: Sequence[str]) -> list[str]:
        """Plain text and the frame's special tokens in turn; plain text is first and last."""
        pieces = [""]
        for i, part in enumerate(frame):
            plain, *others = self.control.split(part)
            pieces[-1] += ("" if not i else text if isinstance(text, str) else text[i - 1]) + plain
            pieces += others
        return pieces

    def _encoded(self, text: str, plain: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]


def shared_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two rows have in common from their first on."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
