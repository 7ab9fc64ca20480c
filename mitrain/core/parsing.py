"""YAML and JSON that come from outside: read within bounds, or refused with a reason in a few words.

Everything that a person, another program or a stranger may have written goes through here: configurations, run folders,
studies, exports, checkpoints' manifests, annotations. A file is a regular one and not longer than expected; a document
nests at most `DEPTH` deep, has each key of a mapping once, and text that is whole characters. YAML is that of version
1.2's core schema (``010`` is ten; ``yes``, ``1:30`` and dates are text), its keys are text, and it holds at most `NODES`
values, those that aliases repeat counted each time.
"""

import itertools
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TextIO

import yaml

DEPTH = 64
NODES = 100_000
YAML_BYTES = 4 << 20
JSON_BYTES = 1 << 26
DATA_BYTES = 1 << 30  # of an annotation file that is read as a whole
LINE = 1 << 24
CONTAINERS = (dict, list)
SCALARS = (int, float, bool, type(None))
FASTEST = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's parser, where PyYAML was built with it

CONSTANTS = dict.fromkeys(("", "~", "null", "Null", "NULL"))
CONSTANTS |= dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(("false", "False", "FALSE"), False)
INTEGER = re.compile(r"[-+]?[0-9]+")
OCTAL_OR_HEX = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"([-+]?)\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
OTHER_BREAKS = re.compile("[\x85\u2028\u2029]")
UNTYPED, TEXT, MAPPING, SEQUENCE = ("!", *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "map", "seq")))


class Unreadable(ValueError):
    """What is wrong with a file or a document, to be put behind its name: 'is longer than …'."""


def open_regular(path: str | Path, follow: bool = True) -> BinaryIO:
    """A regular file, open for reading, through links only where ``follow`` is set.

    Raises Unreadable for anything else (a device would never end, a pipe would wait), OSError where it cannot be opened.
    """
    careful = os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | careful))  # noqa: SIM115 - the caller's
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise Unreadable("is not a plain file")


def read_bytes(path: str | Path, limit: int, follow: bool = True) -> bytes:
    """A regular file's content. Raises as `open_regular`, and Unreadable for one longer than ``limit`` bytes, unread."""
    with open_regular(path, follow) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > limit else file.read(limit + 1)  # it may grow meanwhile, or not tell its size
    if max(size, len(content)) > limit:
        raise Unreadable(f"is longer than the {limit} bytes expected")
    return content


def lines_of(file: TextIO) -> Iterator[str]:
    """A text file's lines with their ends. Raises Unreadable for one of more than `LINE` characters."""
    for number in itertools.count(1):
        if len(line := file.readline(LINE + 1)) > LINE:
            raise Unreadable(f"has more than {LINE} characters in line {number}")
        if not line:
            return
        yield line


def parse_json(content: bytes | str, finite: bool = False) -> Any:
    """JSON's value; ``finite`` refuses NaN and infinities, also as 1e999, which Python's parser takes for numbers.

    Raises Unreadable.
    """
    strict: dict[str, Any] = {"parse_constant": no_number, "parse_float": finite_number} if finite else {}
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=each_key_once, **strict)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half a character could be neither printed nor tokenized
    except RecursionError:
        raise too_deep() from None
    except ValueError as error:
        raise Unreadable(f"is not valid JSON ({str(error)[:120]})") from None
    if deeper_than(value, DEPTH):
        raise too_deep()
    return value


def plain_objects(lines: Sequence[str]) -> list[dict[str, Any]] | None:
    """The objects of JSON that ``lines`` hold, one each, all parsed together, where they are of texts, numbers and lists of
    texts, and nothing in them needs the look that `parse_json` takes; else None."""
    text = ",".join(lines)
    escaped = "\\" in text and ("\\\\" in text or "\\ud" in text or "\\uD" in text)
    if escaped or set(map(itemgetter(0), lines)) != {"{"}:
        return None
    try:
        rows = json.loads(f"[{text}]")
    except (ValueError, RecursionError):
        return None
    if set(map(type, rows)) != {dict}:
        return None
    # Columns of types, as a loop over the values would take as long as their parsing.
    values = lambda: itertools.chain.from_iterable(map(dict.values, rows))  # noqa: E731
    types = Counter(map(type, values()))
    if not {str, list, *SCALARS}.issuperset(types):
        return None
    items = list(itertools.chain.from_iterable(v for v in values() if type(v) is list)) if list in types else []
    if any(type(item) is not str for item in items):
        return None
    strings = types.total() + types[str] + len(items)
    each_once = text.count('"') - text.count('\\"') == 2 * strings  # a key that stands twice is lost in its row
    return rows if each_once and len(rows) == len(lines) else None


def read_json(path: str | Path, limit: int = JSON_BYTES) -> Any:
    """The value in a JSON file. Raises Unreadable, and OSError where the file cannot be opened."""
    return parse_json(read_bytes(path, limit))


def object_in(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; nothing where the file is not there, torn, or holds something else."""
    with suppress(OSError, ValueError):
        value = read_json(path)
        return value if isinstance(value, dict) else {}
    return {}


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:60]!r} stands twice")
    return values


def no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def finite_number(text: str) -> float:
    return number if math.isfinite(number := float(text)) else no_number(text[:40])


def deeper_than(value: Any, limit: int) -> bool:
    """Whether lists and mappings nest more than ``limit`` deep."""
    level = [value] if type(value) in CONTAINERS else []
    for _ in range(limit):
        inner = (child for node in level for child in (node.values() if type(node) is dict else node))
        level = [child for child in inner if type(child) in CONTAINERS]
        if not level:
            return False
    return True


def too_deep() -> Unreadable:
    return Unreadable(f"nests more than {DEPTH} levels deep")


def parse_yaml(text: str) -> Any:
    """The value of a YAML document, None of an empty one. Raises Unreadable."""
    if len(text) > YAML_BYTES:
        raise Unreadable(f"is longer than the {YAML_BYTES} bytes expected")
    if not is_whole(text):
        raise Unreadable("holds half a character: write it in UTF-8")
    tree = Tree()
    try:
        for event in yaml.parse(text, Loader=FASTEST):
            tree.take(event)
    except yaml.YAMLError as error:
        raise Unreadable(f"is not valid YAML ({problem(error)})") from None
    return tree.root


def problem(error: yaml.YAMLError) -> str:
    """What PyYAML found, and the line."""
    mark, said = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"line {mark.line + 1}: {said}" if mark and said else " ".join(str(error).split())[:200]


@dataclass
class Branch:
    """A mapping or list of which more is to come. ``key``: of a mapping, the one whose value comes next."""

    value: dict | list
    anchor: str | None
    nodes_before: int
    key: str | None = None

    @property
    def takes_key(self) -> bool:
        return isinstance(self.value, dict) and self.key is None

    def add(self, child: Any, line: int) -> None:
        if isinstance(self.value, list):
            self.value.append(child)
        elif self.takes_key:
            if not isinstance(child, str):
                raise Unreadable(f"has the key {brief(child)} in line {line}, which is no text: put it in quotes")
            if child in self.value:
                raise Unreadable(f"has the key {child[:60]!r} twice (line {line}): remove one")
            self.key = child
        else:
            self.value[self.key], self.key = child, None


class Tree:
    """Puts YAML's events together, without recursion; the yaml module's own composer is bounded by nothing."""

    def __init__(self) -> None:
        self.root: Any = None
        self.open: list[Branch] = []
        self.named: dict[str, tuple[Any, int]] = {}  # anchor → value, its nodes
        self.nodes = self.documents = 0
        self.steps: Mapping[type, Callable[[Any], None]] = {
            yaml.DocumentStartEvent: self.document,
            yaml.ScalarEvent: self.scalar,
            yaml.AliasEvent: self.alias,
            yaml.MappingStartEvent: lambda event: self.begin(event, {}),
            yaml.SequenceStartEvent: lambda event: self.begin(event, []),
            yaml.MappingEndEvent: self.end,
            yaml.SequenceEndEvent: self.end,
        }

    def take(self, event: yaml.Event) -> None:
        if step := self.steps.get(type(event)):
            step(event)

    def document(self, event: yaml.Event) -> None:
        self.documents += 1
        if self.documents > 1:
            raise Unreadable(f"holds a second document in line {line_of(event)}: give one")

    def scalar(self, event: yaml.ScalarEvent) -> None:
        check_tag(event, (None, UNTYPED, TEXT))
        if not is_whole(event.value):
            raise Unreadable(f"holds half a character in line {line_of(event)}: write the whole one")
        plain = event.implicit[0] and event.tag is None
        if plain and event.value == "<<" and self.open and self.open[-1].takes_key:
            raise Unreadable(
                f"has the merge key << in line {line_of(event)}, which YAML 1.2 no longer has: write the keys out"
            )
        value = plain_scalar(event.value, line_of(event)) if plain else event.value
        self.put(value, 1, event, event.anchor)

    def alias(self, event: yaml.AliasEvent) -> None:
        if event.anchor not in self.named:  # or the value that it would repeat is not complete yet
            raise Unreadable(
                f"refers to *{event.anchor[:40]} in line {line_of(event)}, which is not complete before it: write it out"
            )
        value, nodes = self.named[event.anchor]
        if isinstance(value, CONTAINERS) and deeper_than(value, DEPTH - len(self.open)):
            raise too_deep()
        self.put(value, nodes, event)

    def begin(self, event: yaml.Event, value: dict | list) -> None:
        if len(self.open) >= DEPTH:
            raise too_deep()
        check_tag(event, (None, UNTYPED, MAPPING if isinstance(value, dict) else SEQUENCE))
        self.open.append(Branch(value, event.anchor, self.nodes))

    def end(self, event: yaml.Event) -> None:
        done = self.open.pop()
        nodes = self.nodes - done.nodes_before
        self.nodes = done.nodes_before
        self.put(done.value, nodes + 1, event, done.anchor)

    def put(self, value: Any, nodes: int, event: yaml.Event, anchor: str | None = None) -> None:
        self.nodes += nodes
        if self.nodes + len(self.open) > NODES:
            raise Unreadable(f"holds more than {NODES} values, with those that its aliases repeat")
        if anchor:
            self.named[anchor] = (value, nodes)
        if self.open:
            self.open[-1].add(value, line_of(event))
        else:
            self.root = value


def plain_scalar(text: str, line: int) -> Any:
    """The value of text without quotes, by YAML 1.2's core schema."""
    if text in CONSTANTS:
        return CONSTANTS[text]
    try:
        if INTEGER.fullmatch(text):
            return int(text)
        if OCTAL_OR_HEX.fullmatch(text):
            return int(text, 0)
    except ValueError:
        raise Unreadable(f"holds a number of {len(text)} digits in line {line}") from None
    if FLOAT.fullmatch(text):
        return float(text)
    if match := NOT_FINITE.fullmatch(text):
        return math.nan if match[1] is None else float(f"{match[1]}inf")
    return text


def check_tag(event: Any, known: tuple[str | None, ...]) -> None:
    if event.tag not in known:
        raise Unreadable(f"has the tag {event.tag[:60]!r} in line {line_of(event)}, which means nothing here: remove it")


def is_whole(text: str) -> bool:
    """Whether every character is one: half of a surrogate pair could be neither written nor tokenized."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def line_of(event: yaml.Event) -> int:
    return event.start_mark.line + 1


def brief(value: Any) -> str:
    return "of several values" if isinstance(value, CONTAINERS) else repr(value)[:60]


class Dumper(yaml.SafeDumper):
    """Writes YAML that `parse_yaml` reads back as it was, and readers of YAML 1.1 too."""

    def text(self, value: str) -> yaml.ScalarNode:
        """Unicode's other line breaks would come back as blanks, were they not escaped."""
        return self.represent_scalar(TEXT, value, style='"' if OTHER_BREAKS.search(value) else None)


Dumper.add_representer(str, Dumper.text)

for pattern, tag in ((INTEGER, "int"), (OCTAL_OR_HEX, "int"), (FLOAT, "float"), (NOT_FINITE, "float")):
    whole = re.compile(f"(?:{pattern.pattern})$")
    Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", whole, list("-+.0123456789"))


def dump_yaml(value: Any) -> str:
    """A mapping as YAML, its keys in their order."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True)
