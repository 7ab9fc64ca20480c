"""Arrays of one's own are read as they were written; every trap is a DataError that names file and row."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from refusals import read_or_refused
from safetensors.torch import save_file

from mitrain.core.errors import DataError, MissingExtraError
from mitrain.data.arrays import read_array

ROWS = np.arange(24, dtype=np.float32).reshape(2, 4, 3)


def refused(folder: Path, name: str, match: str, **options) -> None:
    with pytest.raises(DataError, match=match) as caught:
        read_array(folder, name, **options)
    assert "\n" not in str(caught.value) and repr(name) in str(caught.value)


def saved(folder: Path, array: np.ndarray, name: str = "a.npy") -> str:
    np.save(folder / name, array)
    return name


def table(folder: Path, rows: list, name: str = "a.parquet", **options) -> str:
    parquet.write_table(pyarrow.table({"id": range(len(rows)), "own": rows}), folder / name, **options)
    return name


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "i1", "u2", "i8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_any_numbers(tmp_path, dtype, order):
    expected = ROWS[1]
    saved(tmp_path, np.asarray(expected, dtype=dtype, order=order))
    saved(tmp_path, np.asarray(ROWS, dtype=dtype, order=order), "all.npy")
    for name in ("a.npy", "all.npy#1"):
        found = read_array(tmp_path, name)
        assert found.values.dtype == np.float32 and found.values.flags.c_contiguous
        np.testing.assert_array_equal(found.values, expected)


def test_npz_and_safetensors_by_name_and_by_row(tmp_path):
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", x=ROWS[0], y=ROWS)
        save_file({"x": torch.tensor(ROWS[0]), "y": torch.tensor(ROWS).bfloat16()}, tmp_path / "a.safetensors")
        save(tmp_path / "one.npz", only=ROWS[0])
        for kind in ("npz", "safetensors"):
            np.testing.assert_array_equal(read_array(tmp_path, f"a.{kind}#x").values, ROWS[0])
            np.testing.assert_array_equal(read_array(tmp_path, f"a.{kind}", key="x").values, ROWS[0])
            np.testing.assert_array_equal(read_array(tmp_path, f"a.{kind}#1", key="y").values, ROWS[1])
        np.testing.assert_array_equal(read_array(tmp_path, "one.npz").values, ROWS[0])
    refused(tmp_path, "a.npz", "has the arrays 'x', 'y': name one behind #")
    refused(tmp_path, "a.safetensors#z", "has the tensors 'x', 'y', not 'z'")


def test_rows_of_parquet(tmp_path):
    vectors, frames = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[[1, 2], [3, 4]], [[5, 6]], [[7, 8]]]
    table(tmp_path, vectors, row_group_size=2)
    table(tmp_path, frames, "frames.parquet")
    fixed = pyarrow.array(vectors, pyarrow.list_(pyarrow.float32(), 2))
    parquet.write_table(pyarrow.table({"own": fixed, "other": fixed}), tmp_path / "fixed.parquet")
    for row in range(3):
        np.testing.assert_array_equal(read_array(tmp_path, f"a.parquet#{row}").values, vectors[row])
        np.testing.assert_array_equal(read_array(tmp_path, f"fixed.parquet#{row}", key="own").values, vectors[row])
        np.testing.assert_array_equal(read_array(tmp_path, f"frames.parquet#{row}").values, frames[row])
    refused(tmp_path, "fixed.parquet#0", "has the column of lists 'own', 'other'")
    refused(tmp_path, "a.parquet", "is a table: name a row")
    refused(tmp_path, "a.parquet#3", "names the row '3', and there are the rows 0 to 2")
    refused(tmp_path, "a.parquet#0", "has the columns 'id', 'own', not 'mine'", key="mine")


def test_a_file_that_changes_is_read_anew(tmp_path):
    np.savez(tmp_path / "a.npz", x=ROWS[0])
    first = read_array(tmp_path, "a.npz#x")
    np.savez(tmp_path / "a.npz", x=ROWS[1], more=ROWS)
    second = read_array(tmp_path, "a.npz#x")
    np.testing.assert_array_equal(second.values, ROWS[1])
    assert first.digest != second.digest


def test_the_digest_is_of_shape_and_numbers(tmp_path):
    one, turned = saved(tmp_path, ROWS[0], "a.npy"), saved(tmp_path, ROWS[0].T.copy(), "b.npy")
    same = saved(tmp_path, ROWS[0].astype("f8"), "c.npy")
    digests = [read_array(tmp_path, name).digest for name in (one, turned, same)]
    assert digests[0] == digests[2] != digests[1]
    assert read_array(tmp_path, saved(tmp_path, ROWS[0].reshape(3, 4), "d.npy")).digest not in digests


def test_a_file_may_have_the_mark_in_its_name(tmp_path):
    np.testing.assert_array_equal(read_array(tmp_path, saved(tmp_path, ROWS[0], "a#1.npy")).values, ROWS[0])


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors", "parquet"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_named_with_its_row(tmp_path, kind, bad):
    values = np.array([[1, 2, 3], [4, bad, 6]], np.float32)
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "a.npz", x=values)
    save_file({"x": torch.tensor(values)}, tmp_path / "a.safetensors")
    table(tmp_path, [[1.0, 2.0], values[1].tolist()])
    place = {"parquet": "#1"}.get(kind, "")
    at = {"parquet": r"\[1\]"}.get(kind, r"\[1, 1\]")
    refused(tmp_path, f"a.{kind}{place}", f"holds {bad} at {at}, no finite number")


class Payload:
    def __reduce__(self):
        return (Path("ran").touch, ())


def test_pickles_are_never_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    objects = np.array([Payload()], dtype=object)
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "a.npz", x=objects)
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Payload()))
    refused(tmp_path, "a.npy", "holds pickled objects, and numbers alone are read")
    refused(tmp_path, "a.npz#x", "holds pickled objects, and numbers alone are read")
    refused(tmp_path, "b.npy", "is a pickle, which could run anything")
    assert not (tmp_path / "ran").exists()


def test_bad_files_are_one_line(tmp_path):
    whole = (tmp_path / saved(tmp_path, ROWS[0])).read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[:-5])
    refused(tmp_path, "a.npy", r"is torn \(43 of 48 bytes are there\)")
    for kind in ("npy", "npz", "safetensors"):
        (tmp_path / f"b.{kind}").write_bytes(b"no array")
        refused(tmp_path, f"b.{kind}", f"is no readable .{kind} file")
    (tmp_path / "b.parquet").write_bytes(b"no array")
    refused(tmp_path, "b.parquet#0", "is no readable .parquet file")
    saved(tmp_path, ROWS)
    refused(tmp_path, "a.npy", r"has shape \(2, 4, 3\), not \(e,\) or \(T, e\)")
    refused(tmp_path, "a.npy#2", "names the row '2', and there are the rows 0 to 1")
    refused(tmp_path, "a.npy#-1", "names the row '-1'")
    refused(tmp_path, "a.npy#0", "has 3 numbers in a row, not width=5", width=5)
    refused(tmp_path, saved(tmp_path, np.zeros((0, 3))), r"has shape \(0, 3\)")
    refused(tmp_path, saved(tmp_path, np.array(["a"])), "holds <U1, and numbers alone are read")
    refused(tmp_path, saved(tmp_path, np.full((1, 2), 1e60)), r"holds 1e\+60 at \[0, 0\]")
    (tmp_path / "a.csv").write_text("1,2")
    refused(tmp_path, "a.csv", "is of no kind that is read: save it as .npy, .npz, .safetensors, .parquet")
    refused(tmp_path, "../a.npy", "leads out of the data folder")
    refused(tmp_path, "none.npy", "no array 'none.npy'")
    np.savez(tmp_path / "a.npz", x=ROWS[0])
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.index(np.float32(11).tobytes())] ^= 1  # a number in the file
    (tmp_path / "a.npz").write_bytes(content)
    refused(tmp_path, "a.npz", "is no readable .npz file .Bad CRC-32")


def test_a_null_is_no_number(tmp_path):
    table(tmp_path, [[1.0, None], None, [1.0]])
    refused(tmp_path, "a.parquet#0", "holds an empty number .null.")
    refused(tmp_path, "a.parquet#1", "is empty .null.")
    table(tmp_path, [[[1.0], [2.0, 3.0]], [[1.0], None]], "b.parquet")
    refused(tmp_path, "b.parquet#0", "lists of several lengths")
    refused(tmp_path, "b.parquet#1", "lists of several lengths")
    table(tmp_path, [["a"]], "c.parquet")
    refused(tmp_path, "c.parquet#0", "holds string, and numbers alone are read")


def test_what_claims_to_be_large_is_refused_unread(tmp_path):
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 9)})
    refused(tmp_path, "a.npy", r"has shape \(1099511627776, 9\), 67108864 numbers are allowed")
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "a.npy", "x.npy")
    refused(tmp_path, "a.npz#x", "67108864 numbers are allowed")
    saved(tmp_path, ROWS[0], "b.npy")
    refused(tmp_path, "b.npy", "11 numbers are allowed", numbers=11)


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    table(tmp_path, [[1.0]])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"reading Parquet needs the package 'pyarrow' .*mitrain\[parquet\]"):
        read_array(tmp_path, "a.parquet#0")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_anywhere_is_read_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    np.save(folder / "a.npy", ROWS[0])
    np.savez_compressed(folder / "a.npz", x=ROWS[0])
    save_file({"x": torch.tensor(ROWS[0])}, folder / "a.safetensors")
    table(folder, [[1.0, 2.0]])
    name = data.draw(st.sampled_from(["a.npy", "a.npz", "a.safetensors", "a.parquet"]))
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    found = read_or_refused(lambda: read_array(folder, name + "#0" * (name == "a.parquet")), DataError)
    assert found is None or np.isfinite(found.values).all()
