"""Pickles with arrays: read as numpy would, and nothing else is; a payload is one line."""

import collections
import io
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import read_or_refused

from mitrain.core.errors import DataError
from mitrain.data.formats.pickles import Bounded, read_arrays

ARRAYS = {
    "floats": np.arange(6, dtype=np.float32).reshape(2, 3),
    "by columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big-endian": np.array([1.5, -2.0], dtype=">f8"),
    "whole": np.array([[1], [-1]], dtype=np.int16),
    "flags": np.array([True, False]),
    "texts": np.array(["a", "längere"]),
    "bytes": np.array([b"ab", b"c"]),
    "empty": np.zeros((0, 4)),
    "one": np.array(0.5, np.float32),
    "strided": np.arange(10)[::3],
}


def written(path, value, protocol=4):
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_come_back_as_they_were(tmp_path, protocol):
    plain = {"n": [1, 2.5, "x", None, True], "t": (1, (2,)), "scalar": np.float64(1.25), "word": np.str_("é")}
    value = {**ARRAYS, **plain, "twice": [ARRAYS["floats"]] * 2}
    found = read_arrays(written(tmp_path / "a.pkl", value, protocol))
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        np.testing.assert_array_equal(found[name], array)
    assert {name: found[name] for name in plain} == plain and type(found["scalar"]) is float
    assert found["twice"][0] is found["twice"][1]


def test_objects_are_lists_with_their_arrays(tmp_path):
    objects = np.empty(2, object)
    objects[:] = ["a text", np.arange(3)]
    found = read_arrays(written(tmp_path / "a.pkl", {"raw": objects, "grid": np.array([["a"], [None]], object)}))
    assert found["raw"][0] == "a text" and found["raw"][1].tolist() == [0, 1, 2] and found["grid"] == [["a"], [None]]


def test_what_python_2_wrote_is_read(tmp_path):
    """As Python 2's numpy wrote one: the names of old, and numbers in a byte string."""
    content = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\n"
        b"U\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08\x00\x00\x80\x3f\x00\x00\xff\xc0tb."
    )
    found = read_arrays(written(tmp_path / "a.pkl", content))
    assert found.dtype == np.float32 and found[0] == 1 and found[1] == np.float32(-7.96875)


class Payload:
    def __init__(self, *called):
        self.called = called

    def __reduce__(self):
        return self.called


REACHED = []


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (Payload(os.system, ("exit 1",)), r"it names posix\.system"),
        (Payload(eval, ("REACHED.append(1)",)), r"it names builtins\.eval"),
        ({"a": [Payload(REACHED.append, (1,))]}, r"it names builtins\.getattr"),
        (collections.OrderedDict(a=1), r"it names collections\.OrderedDict"),
        ({1, 2}, "opcode EMPTY_SET"),
        (np.array(["2020"], "M8[D]"), "it holds an array of 'M8'"),
        (np.array([1 + 1j]), "it holds an array of 'c16'"),
        (np.zeros(1, [("a", "f4")]), "it holds an array of 'V4'"),
        (np.ma.masked_array([1]), r"it names numpy"),
        (np.random.default_rng(0), r"it names numpy\.random"),
        (np.float32, r"it names numpy\.float32"),
        (np.ndarray, "it holds a class or a function"),
        (np.dtype("f4"), "it holds a class or a function"),
    ],
)
def test_what_is_no_array_is_refused_and_never_run(tmp_path, value, why):
    with pytest.raises(DataError, match=why) as caught:
        read_arrays(written(tmp_path / "a.pkl", value))
    assert "\n" not in str(caught.value) and not REACHED


def global_(module, name):
    return b"c" + module + b"\n" + name + b"\n"


@pytest.mark.parametrize(
    "content",
    [
        global_(b"numpy", b"dtype") + b"}(U\x08__code__K\x01ub.",  # sets something on a function
        global_(b"numpy", b"dtype") + b"N}(U\x04codeK\x01u\x86b.",
        global_(b"numpy", b"dtype") + b"(U\x02O8tR(K\x03U\x01|NNNK\x08K\x08K\x00tb.",  # another dtype's flags
        b"(lp0\ng0\na.",  # a list in itself
        b"X\xff\xff\xff\x7fa.",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fa.",
        b"\x96\xff\xff\xff\xff\xff\xff\xff\x7fa.",
        global_(b"_codecs", b"encode") + b"(U\x01aU\x03rottR.",
        global_(b"numpy.core.multiarray", b"scalar") + global_(b"numpy", b"dtype") + b"(U\x01OtRU\x01a\x86R.",
        b"Pabc\n.",
        b"\x82\x01.",
        b"",
        b"not a pickle",
    ],
)
def test_hostile_streams_are_refused_in_one_line(tmp_path, content):
    with pytest.raises(DataError) as caught:
        read_arrays(written(tmp_path / "a.pkl", content))
    assert "\n" not in str(caught.value) and "a.pkl" in str(caught.value)


def test_doubled_containers_are_not_written_out(tmp_path):
    """Fifty lists, each of which holds the one before twice, are 2^50 values written out."""
    value = []
    for _ in range(50):
        value = [value, value]
    found = read_arrays(written(tmp_path / "a.pkl", value))
    assert found[0] is found[1]


def test_a_claimed_length_is_compared_with_the_file():
    file = Bounded(io.BytesIO(b"abc"))
    assert file.read(2) == b"ab"
    with pytest.raises(EOFError):
        file.read(1 << 40)


def test_missing_files_and_folders_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "none.pkl"):
        with pytest.raises(DataError, match="cannot read|is not a plain file"):
            read_arrays(path)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 4000), byte=st.binary(min_size=1, max_size=3), protocol=st.integers(0, 5), cut=st.booleans())
def test_any_damage_is_read_or_refused_in_one_line(tmp_path_factory, at, byte, protocol, cut):
    content = pickle.dumps({**ARRAYS, "raw": np.array(["a", None], object)}, protocol)
    at %= len(content)
    path = tmp_path_factory.mktemp("damaged") / "a.pkl"
    read_or_refused(
        lambda: read_arrays(written(path, content[:at] if cut else content[:at] + byte + content[at + len(byte) :])),
        DataError,
    )
