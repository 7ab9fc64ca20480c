"""Pickles of others, read without running anything: plain values, and numpy's arrays.

A pickle can run any program. These unpicklers parse nothing but containers, strings and numbers; for arrays one of them
admits the few names that numpy writes, and puts our own stand-ins in their place: numpy itself sees only checked numbers.
"""

import io
import pickle
import pickletools
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mitrain.core import parsing
from mitrain.core.errors import DataError
from mitrain.core.parsing import Unreadable

OPCODES = """
    PROTO FRAME STOP MARK POP POP_MARK DUP MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES
    EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS
"""
ARRAY_OPCODES = OPCODES + "GLOBAL STACK_GLOBAL REDUCE BUILD BINBYTES8 BYTEARRAY8"
DTYPE = re.compile(r"[biuf][1248]|[US][1-9]\d{0,5}|O8?")
FAULTS = (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError, RecursionError)
TORN = (struct.error, OverflowError, MemoryError)


class Opcodes(dict):
    """An unpickler's table of opcodes that says which one it does not admit."""

    def __init__(self, names: str):
        codes = [ord(op.code) for op in pickletools.opcodes if op.name in names.split()]
        super().__init__({code: pickle._Unpickler.dispatch[code] for code in codes})

    def __missing__(self, code: int):
        known = pickletools.code2op.get(chr(code))
        raise pickle.UnpicklingError(f"it holds more than plain values (opcode {known.name if known else code})")


class PlainUnpickler(pickle._Unpickler):
    """Reads containers, strings and numbers; nothing that names a class or calls a function is even parsed.

    The pure Python unpickler is the base because its table of opcodes can be cut down, and because the C one
    allocates whatever size a hostile file claims.
    """

    dispatch = Opcodes(OPCODES)

    def _decode_string(self, value: bytes) -> str:
        """Python 2's byte strings, most of them ASCII."""
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("latin1")


class Standin:
    """What a pickle may call in place of a function or class of numpy's; nothing can be set on it."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]):
        self.make = make

    def __call__(self, *arguments: Any) -> Any:
        return self.make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


class Kind:
    """What stands for numpy's dtype: its code, as f4, and byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, align: Any = False, copy: Any = True):
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def dtype(self) -> np.dtype:
        if not (isinstance(self.code, str) and DTYPE.fullmatch(self.code) and self.order in ("<", ">", "=", "|")):
            raise pickle.UnpicklingError(f"it holds an array of {str(self.code)[:20]!r}")
        return np.dtype(self.code[:1] if self.code.startswith("O") else self.order + self.code)


class Block:
    """What stands for an array until all is read: its ``value``, numbers, texts, or other objects as nested lists."""

    __slots__ = ("value",)

    def __setstate__(self, state: Any) -> None:
        *_, shape, kind, by_columns, content = state
        self.value = values_of(content, kind, shape, "F" if by_columns else "C")


def values_of(content: Any, kind: Any, shape: Any, order: str) -> Any:
    dtype = kind.dtype()
    if dtype.hasobject:
        if not isinstance(content, list):
            raise pickle.UnpicklingError("it holds an array of objects that are no list")
        objects = np.empty(len(content), object)
        for i, one in enumerate(content):
            objects[i] = one
        return objects.reshape(shape, order=order).tolist()
    content = content.encode("latin1") if isinstance(content, str) else content  # Python 2's byte strings
    return np.frombuffer(content, dtype).reshape(shape, order=order)


def block_of(content: Any, kind: Any, shape: Any, order: Any) -> Block:
    """An array as protocol 5 writes it."""
    block = Block()
    block.value = values_of(content, kind, shape, order)
    return block


def scalar(kind: Any, content: Any) -> Any:
    """A number or a text of numpy's as Python's."""
    return values_of(content, kind, (), "C").item()


def encoded(text: str, encoding: str) -> bytes:
    """Bytes as protocols before 3 write them."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {str(encoding)[:20]!r}")
    return text.encode("latin1")


NAMES: dict[tuple[str, str], Standin] = {
    ("numpy", "ndarray"): Standin(Block),
    ("numpy", "dtype"): Standin(Kind),
    ("_codecs", "encode"): Standin(encoded),
    ("__builtin__", "bytes"): Standin(lambda: b""),  # so protocols before 3 write no bytes at all
}
for _core in ("numpy.core", "numpy._core"):  # before numpy 2, and since
    NAMES[f"{_core}.multiarray", "_reconstruct"] = Standin(lambda *_: Block())
    NAMES[f"{_core}.multiarray", "scalar"] = Standin(scalar)
    NAMES[f"{_core}.numeric", "_frombuffer"] = Standin(block_of)


class ArrayUnpickler(PlainUnpickler):
    """Reads numpy's arrays, too: of numbers and texts as arrays, of other objects as lists."""

    dispatch = Opcodes(ARRAY_OPCODES)

    def find_class(self, module: str, name: str) -> Standin:
        if (module, name) not in NAMES:
            raise pickle.UnpicklingError(f"it names {module[:40]}.{name[:40]}, and arrays and plain values alone are read")
        return NAMES[module, name]

    def _decode_string(self, value: bytes) -> str:
        return value.decode("latin1")  # an array's bytes among them, which must come back as they were


class Bounded:
    """A file that reads no more than it has: a hostile length allocates nothing."""

    def __init__(self, file: BinaryIO):
        self.file, self.left = file, file.seek(0, io.SEEK_END)
        self.readline = file.readline
        file.seek(0)

    def read(self, count: int) -> bytes:
        if count > self.left:
            raise EOFError("it ends too early")
        return self.file.read(count)


def unpickled(read: Callable[[], Any], path: Path) -> Any:
    try:
        return read()
    except FAULTS as error:
        why = str(error)[:120] or "it ends too early"
        raise DataError(f"{str(path)!r} is not a pickle of plain values ({why}): get the original file") from None
    except TORN as error:
        raise DataError(f"{str(path)!r} is a torn pickle ({str(error)[:80]}): get the original file") from None


def read_plain(path: Path, content: bytes) -> Any:
    """The plain value in a pickle's ``content``; DataError names ``path``."""
    return unpickled(lambda: PlainUnpickler(io.BytesIO(content)).load(), path)


def read_arrays(path: Path) -> Any:
    """The containers, plain values and arrays in a pickled file; DataError names it."""
    try:
        with parsing.open_regular(path) as file:
            return unpickled(lambda: settled(ArrayUnpickler(Bounded(file)).load(), {}), path)
    except Unreadable as error:
        raise DataError(f"{str(path)!r} {error}: give a pickle") from None
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r} ({error}): put the file there") from None


def settled(value: Any, done: dict[int, Any]) -> Any:
    """``value`` with arrays in place of their stand-ins; ``done``: what became of each container, which may stand in many
    places."""
    if isinstance(value, Standin | Kind):
        raise pickle.UnpicklingError("it holds a class or a function")
    if isinstance(value, Block):
        value = value.value
    if not isinstance(value, dict | list | tuple):
        return value
    if id(value) not in done:
        if isinstance(value, dict):
            done[id(value)] = {key: settled(one, done) for key, one in value.items()}
        else:
            done[id(value)] = type(value)(settled(one, done) for one in value)
    return done[id(value)]
