"""Many samples in little more memory than their letters: as columns, of which a sample is made when it is asked for."""

from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from itertools import accumulate, chain, islice
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from mitrain.data.samples import Sample

MANY = 20_000
"""Samples from which on they are columns; fewer are a list of them."""
PART = 4096  # texts that are packed into one
BETWEEN = "\0"
EMPTY, NO_LENGTHS = BETWEEN * (PART - 1), array("i", bytes(4 * (PART + 1)))  # a part of empty texts
NAMES = ("id", "object", "kind")  # fields that name a sample, of which no model reads anything
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Texts:
    """Texts by their numbers; packed, as a text by itself takes 50 bytes beside its letters, with a mark between them, at
    which they are split in a sixth of the time that as many slices take."""

    def __init__(self) -> None:
        self._parts: list[str | list[str]] = []
        self._ends: list[array] = []  # of each part's texts, marks not counted
        self._last: list[str] = []
        self.some_empty = False

    def extend(self, texts: Sequence[str]) -> None:
        self.some_empty = self.some_empty or "" in texts
        self._last.extend(texts)
        while len(self._last) >= PART:
            part, self._last = self._last[:PART], self._last[PART:]
            whole = BETWEEN.join(part)
            if whole == EMPTY:
                whole, ends = EMPTY, NO_LENGTHS  # held once for all such parts
            else:
                ends = array("i" if len(whole) < 1 << 31 else "q", accumulate(map(len, part), initial=0))
            self._parts.append(whole if whole.count(BETWEEN) == PART - 1 else part)
            self._ends.append(ends)

    def __getitem__(self, number: int) -> str:
        part, place = divmod(number, PART)
        if part == len(self._parts):
            return self._last[place]
        texts, ends = self._parts[part], self._ends[part]
        return texts[ends[place] + place : ends[place + 1] + place] if isinstance(texts, str) else texts[place]

    def __iter__(self) -> Iterator[str]:
        parts = (part.split(BETWEEN) if isinstance(part, str) else part for part in self._parts)
        return chain(chain.from_iterable(parts), self._last)


class Groups(NamedTuple):
    """A field ``name`` that samples of the same files share, made of their field ``of``: the group ``which`` each sample
    belongs to, and where in the ``order`` of samples by group each group ``ends``."""

    name: str
    of: str
    which: np.ndarray
    ends: np.ndarray
    order: np.ndarray


MAKES: Mapping[type, Callable[[], Any]] = {str: Texts, float: partial(array, "d")}


class Columns(Sequence[Any]):
    """Samples of one class (a dataclass of `Sample`), in the order in which they are appended; a slice has them, too.

    Texts and numbers have a column for each field and each input. The other fields' values are held once for all samples
    that have the same.
    """

    def __init__(self) -> None:
        self._kind: type[Any] = Sample
        self._columns: dict[str, Texts | array] = {}
        self._inputs: dict[str, Texts] = {}
        self._named: set[str] = set()  # the inputs of those that are shared
        self._rest: tuple[str, ...] = ()
        self._shared: list[dict[str, Any]] = []
        self._which = array("l")  # by sample, of what is shared
        self._known: dict[Any, int] = {}
        self._chosen: Sequence[int] | None = None
        self._groups: Groups | None = None

    def number(self, sample: Any) -> int:
        """The number of what ``sample`` shares with others."""
        values = sample.__dict__
        if not self._shared:
            self._kind = type(sample)
            named = [field.name for field in fields(sample) if field.name != "inputs"]
            self._columns = {name: MAKES[type(values[name])]() for name in named if type(values[name]) in MAKES}
            self._rest = tuple(name for name in named if name not in self._columns)
        key = tuple([values[name] for name in self._rest]), tuple(sample.inputs)  # inputs keep their order
        number = self._known.setdefault(key, len(self._shared))
        if number == len(self._shared):
            self._shared.append({name: values[name] for name in self._rest} | {"inputs": key[1]})
            self._named.update(key[1])
        return number

    def extend(
        self,
        samples: Sequence[Any],
        numbers: Sequence[int] | None = None,
        values: Mapping[str, Sequence[Any]] = NOTHING,
        inputs: Mapping[str, Sequence[str]] = NOTHING,
    ) -> None:
        """Append ``samples``, which have ``values`` and ``inputs`` of their own where these are given."""
        numbers = [self.number(sample) for sample in samples] if numbers is None else numbers
        for name, column in self._columns.items():
            column.extend(values[name] if name in values else [sample.__dict__[name] for sample in samples])
        for name in sorted(self._named - self._inputs.keys()):
            self._inputs[name] = Texts()
            self._inputs[name].extend([""] * len(self._which))
        for name, column in self._inputs.items():
            column.extend(inputs[name] if name in inputs else [sample.inputs.get(name, "") for sample in samples])
        self._which.extend(numbers)

    def grouped(self, name: str, of: str) -> "Columns":
        """These samples, of which none were taken yet; the field ``name`` holds what all of the same files have of the field
        ``of``, in their order."""
        known: dict[Any, int] = {}
        files = zip(*map(self.paths, self._inputs), strict=True)
        which = np.fromiter((known.setdefault(key, len(known)) for key in files), np.int64, len(self))
        ends = np.bincount(which).cumsum()
        part = Columns()
        part.__dict__.update(self.__dict__)
        part._groups = Groups(name, of, which, ends, np.argsort(which, kind="stable"))
        return part

    def _together(self, number: int) -> tuple[str, ...]:
        _, of, which, ends, order = self._groups
        end = ends[which[number]]
        start = ends[which[number] - 1] if which[number] else 0
        return tuple(self._columns[of][i] for i in order[start:end].tolist())

    def take(self, numbers: Sequence[int]) -> "Columns":
        """Of the samples those with these ``numbers``."""
        part = Columns()
        part.__dict__.update(self.__dict__)
        chosen = self._chosen
        part._chosen = numbers if chosen is None else array("l", (chosen[i] for i in numbers))
        return part

    def __len__(self) -> int:
        return len(self._which) if self._chosen is None else len(self._chosen)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            numbers = range(*place.indices(len(self)))
            return self if numbers == range(len(self)) else self.take(numbers)  # nobody changes them any more
        number = range(len(self))[place]
        return self._made(number if self._chosen is None else self._chosen[number])

    def _made(self, number: int) -> Any:
        shared = self._shared[self._which[number]]
        sample = object.__new__(self._kind)
        values = sample.__dict__
        values |= shared
        values["inputs"] = {name: self._inputs[name][number] for name in shared["inputs"]}
        for name, column in self._columns.items():
            values[name] = column[number]
        if self._groups:
            values[self._groups.name] = self._together(number)
        return sample

    def __iter__(self) -> Iterator[Any]:
        return map(self._made, range(len(self._which)) if self._chosen is None else self._chosen)

    def column(self, name: str) -> Iterator[Any]:
        """The samples' values of a field; see `column`."""
        if name in self._columns:
            return self._of(self._columns[name])
        if self._groups and name == self._groups.name:
            return map(self._together, self._of(range(len(self._which))))
        return map([shared[name] for shared in self._shared].__getitem__, self._of(self._which))

    def different(self, name: str) -> set[Any]:
        """The samples' values of a field, each once."""
        if name in self._columns or (self._groups and name == self._groups.name):
            return set(self.column(name))
        return {self._shared[which][name] for which in set(self._of(self._which))}

    def paths(self, name: str) -> Iterator[str | None]:
        """The samples' files of an input; see `paths`."""
        if name not in self._inputs:
            return (None for _ in self)
        found = self._of(self._inputs[name])
        return (path or None for path in found) if self._inputs[name].some_empty else found

    def input_names(self) -> list[str]:
        """The inputs that some of the samples have."""
        return [name for name in self._inputs if any(self.paths(name))]

    def texts(self) -> list[str]:
        return [name for name, values in self._columns.items() if isinstance(values, Texts)]

    def settled(self) -> Sequence[Any]:
        """These samples, or where they are few a list of them."""
        return self if len(self) >= MANY else list(self)

    def _of(self, values: Any) -> Iterator[Any]:
        return iter(values) if self._chosen is None else (values[i] for i in self._chosen)


def gathered(samples: Iterable[Any]) -> Sequence[Any]:
    """The samples as a list, or where they are `MANY` as columns; those with outlines of objects stay as they are."""
    rest, columns = iter(samples), Columns()
    part = list(islice(rest, MANY))
    if len(part) < MANY or not all(isinstance(v, Hashable) for n, v in vars(part[0]).items() if n != "inputs"):
        return [*part, *rest]
    while part:
        columns.extend(part)
        part = list(islice(rest, PART))
    return columns


def take(samples: Sequence[Any], numbers: Sequence[int]) -> Sequence[Any]:
    """Of the ``samples`` those with these ``numbers``, in their order."""
    return samples.take(numbers) if isinstance(samples, Columns) else [samples[i] for i in numbers]


def column(samples: Sequence[Any], name: str) -> Iterator[Any]:
    """The ``samples``' values of a field, in their order."""
    return samples.column(name) if isinstance(samples, Columns) else (getattr(sample, name) for sample in samples)


def different(samples: Sequence[Any], name: str) -> set[Any]:
    """The ``samples``' values of a field, each once."""
    return samples.different(name) if isinstance(samples, Columns) else set(column(samples, name))


def paths(samples: Sequence[Any], name: str) -> Iterator[str | None]:
    """The ``samples``' files of an input, None where one lacks it."""
    if isinstance(samples, Columns):
        return samples.paths(name)
    return (sample.inputs.get(name) for sample in samples)


def input_names(samples: Sequence[Any]) -> list[str]:
    """The inputs that some of the ``samples`` have."""
    if isinstance(samples, Columns):
        return samples.input_names()
    return list(dict.fromkeys(name for sample in samples for name in sample.inputs))


def bytes_of(samples: Sequence[Any]) -> Iterator[int]:
    """Of each sample the bytes of what a model may read of it, at least; a text has no more tokens than bytes."""
    names = samples.texts() if isinstance(samples, Columns) else [n for n, v in vars(samples[0]).items() if type(v) is str]
    names = [name for name in names if name not in NAMES]
    if not names:
        yield from (0 for _ in samples)
    for values in zip(*(column(samples, name) for name in names), strict=True):
        whole = "".join(values)
        yield len(whole) if whole.isascii() else len(whole.encode())
