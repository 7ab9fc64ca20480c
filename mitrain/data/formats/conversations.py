"""Conversations about files: LLaVA's and ShareGPT's JSON, and the ``messages`` of chat APIs, ms-swift, axolotl and others.

``{"id": …, "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt",
"value": "A cat."}]}``, or ``{"messages": [{"role": "user", "content": …}, …], "images": […]}``, whose content is a text or
a list of parts (``{"type": "text", "text": …}``, ``{"type": "image", "image": PATH}``). Every answer is a sample, with what
was said before its question. ``audio``/``audios`` and ``video``/``videos`` likewise.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from mitrain.core.errors import DataError
from mitrain.data.formats.manifest import Manifest, Row, read_rows
from mitrain.data.formats.records import AnswerSample
from mitrain.data.formats.rows import as_text, unique

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
ROLES |= {"system": "system"}
KINDS = ("image", "audio", "video")
MARK = re.compile(rf"<({'|'.join(KINDS)})>")
COLUMNS = {name: name for name in ("conversations", "messages", "id", "system", *KINDS, *(f"{kind}s" for kind in KINDS))}


def read_conversations(
    source: Manifest, inputs: Sequence[str] = ("image",), may_lack: Collection[str] = ()
) -> list[AnswerSample]:
    """A sample for every answer in the conversations of a file.

    ``inputs``: the names of a sample's files: those that begin with image, audio or video get a conversation's files of that
    kind in their order. Raises DataError with file and line: for roles out of turn, other files than places for them
    (``<image>``), more files than inputs, and fewer unless samples ``may_lack`` them.
    """
    samples = unique(placed(source, inputs, may_lack))
    if not samples:
        raise DataError(f"{str(source)!r} holds no answers: give conversations, one object a line or in a list")
    return samples


def placed(source: Manifest, inputs: Sequence[str], may_lack: Collection[str]) -> Iterator[tuple[str, AnswerSample]]:
    for row in read_rows(source, COLUMNS, ()):
        said, shown = turns_of(row)
        name = as_text(row.cells.get("id"), "id", row.where) or row.name
        files = files_of(row, shown, inputs, may_lack)
        for end in range(1, len(said), 2):
            prompt, turns = asked_behind(said[:end])
            sample_name = f"{name}/{end // 2}" if len(said) > 3 else name
            yield row.where, AnswerSample(sample_name, files, prompt, said[end], object=name, turns=turns)


def asked_behind(turns: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Questions and answers up to the question now as lines, and by themselves where there is more than the question."""
    return "\n".join(turns), tuple(turns) if len(turns) > 1 else ()


def question_of(row: Row, inputs: Sequence[str], may_lack: Collection[str]) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """A conversation's name, its files, and its turns up to the last question, whether that is answered or not."""
    said, shown = turns_of(row, answered=False)
    name = as_text(row.cells.get("id"), "id", row.where) or row.name
    return name, files_of(row, shown, inputs, may_lack), tuple(said[: (len(said) - 1) // 2 * 2 + 1])


def turns_of(row: Row, answered: bool = True) -> tuple[list[str], dict[str, list[str | None]]]:
    """Questions and their answers in turn, and what is shown in the questions: kind → a path each, None for a mere place.

    ``answered``: a last question without an answer is left out.
    """
    said = row.cells.get("conversations", row.cells.get("messages"))
    if not isinstance(said, list) or not said:
        raise DataError(f"{row.where}: no list of 'conversations' or 'messages': give what was said, turn by turn")
    shown: dict[str, list[str | None]] = {kind: [] for kind in KINDS}
    texts: list[tuple[str, str]] = []
    for number, turn in enumerate(said):
        if not isinstance(turn, dict) or (role := ROLES.get(str(turn.get("from", turn.get("role"))))) is None:
            raise DataError(
                f"{row.where}: turn {number + 1} says not whose it is: give 'from' (human, gpt) or 'role' (user, assistant)"
            )
        text = text_of(turn.get("value", turn.get("content")), f"{row.where}: turn {number + 1}", role, shown)
        if role == "system" and not texts:
            continue  # task.system is that of all samples
        if role != ("assistant" if len(texts) % 2 else "user"):
            raise DataError(f"{row.where}: turn {number + 1} is the {role}'s out of turn: questions and answers alternate")
        texts.append((role, text))
    said = [text for _, text in texts]
    if len(said) % 2 and answered:
        said.pop()  # a question that nobody answered
    if not said or not all(said):
        wrong = "a question or an answer has no words" if said else "nothing is answered" if texts else "nothing is asked"
        raise DataError(f"{row.where}: {wrong}: leave it out or mend it")
    return said, shown


def text_of(content: Any, where: str, role: str, shown: Mapping[str, list[str | None]]) -> str:
    """What a turn says, without the marks of files, which are added to ``shown``."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    said = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            said.append(part["text"])
        elif kind in KINDS and role == "user" and isinstance(part.get(kind, ""), str):
            shown[kind].append(part.get(kind) or None)
        else:
            raise DataError(f"{where} holds no text: give a text, or a list of parts of the type text, {', '.join(KINDS)}")
    text = "\n".join(said)
    if role == "user":
        for mark in MARK.findall(text):
            shown[mark].append(None)
        text = MARK.sub("", text)
    return as_text(text, "text", where)


def files_of(
    row: Row, shown: Mapping[str, list[str | None]], inputs: Sequence[str], may_lack: Collection[str]
) -> dict[str, str]:
    """A conversation's files by the names of the inputs."""
    files: dict[str, str] = {}
    for kind in KINDS:
        paths = listed_files(row, kind)
        places, own = shown[kind], [path for path in shown[kind] if path]
        if own and paths:
            raise DataError(f"{row.where}: {kind}s are named beside the messages and in them: name them once")
        if not own and len(places) not in ({len(paths)} if len(paths) != 1 else {0, 1}):
            raise DataError(
                f"{row.where}: {len(places)} places <{kind}> for {len(paths)} {kind}s: give as many of the one as of the"
                " other"
            )
        found, names = own or paths, [name for name in inputs if name.startswith(kind)]
        if len(found) > len(names):
            raise DataError(
                f"{row.where}: {len(found)} {kind}s, and the run reads {len(names)} ({', '.join(names) or 'none'}): name"
                f" an encoder for each, as {kind}2: {{name: …, takes: {kind}}}"
            )
        files |= dict(zip(names, found, strict=False))
    if lost := [name for name in inputs if name not in files and name not in may_lack]:
        raise DataError(
            f"{row.where}: no file for the input {lost[0]!r}: give it, or let samples go without it with"
            f" data.may_lack=[{lost[0]}]"
        )
    return files


def listed_files(row: Row, kind: str) -> list[str]:
    """The files that stand beside the messages, a path or a list of them."""
    value = row.cells.get(kind, row.cells.get(f"{kind}s"))
    values = value if isinstance(value, list) else [] if value in (None, "") else [value]
    values = [one.get("path") if isinstance(one, dict) else one for one in values]
    if not all(isinstance(one, str) and one for one in values):
        raise DataError(f"{row.where}: {kind} is no path and no list of paths: correct it")
    return values
