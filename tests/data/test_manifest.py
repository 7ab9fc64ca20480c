"""Records of Parquet and of Hugging Face's folders: the same samples as of a CSV, files in their cells among them."""

import io

import numpy as np
import pyarrow
import pytest
from embedded import COLOURS, described, embedded, png, refused, saved
from PIL import Image
from pyarrow import parquet

from mitrain.data import tables
from mitrain.data.arrays import read_array
from mitrain.data.formats.captions import read_captions
from mitrain.data.formats.labels import read_labels
from mitrain.data.formats.manifest import Manifest
from mitrain.data.formats.records import read_records
from mitrain.data.formats.targets import read_targets
from mitrain.data.images import read_image
from mitrain.data.sources import LabelledConfig
from mitrain.data.texts import read_text


def test_parquet_is_read_as_a_csv_of_the_same_columns(tmp_path):
    rows = [
        {"image": "a.png", "text": "one", "label": "x", "id": "1"},
        {"image": "", "text": "two", "label": "y", "id": "2"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("image,text,label,id\na.png,one,x,1\n,two,y,2\n")
    read = [read_labels(tmp_path / name, may_lack=("image",)) for name in ("a.parquet", "a.csv")]
    assert read[0] == read[1] and [s.inputs for s in read[0]] == [{"image": "a.png"}, {}]
    refused(lambda: read_labels(tmp_path / "a.parquet"), "a.parquet#1: no 'image'", "data.may_lack=[image]")
    refused(lambda: read_labels(tmp_path / "a.parquet", {"label": "lable"}), "no column 'lable' for label (did you mean")
    asked = {"object": "thing"}
    refused(lambda: read_labels(tmp_path / "a.parquet", asked, may_lack=["image"]), "no 'thing'", "columns.object=thing")


def test_every_reader_takes_parquet(tmp_path):
    columns = {"image": ["a.png", "b.png"], "prompt": ["what", "who"], "answer": ["x", "y"], "target": [0.5, -1.0]}
    columns |= {"text": ["p", "q"], "candidates": [["x", "z"], None]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert [(s.answer, s.candidates) for s in read_records(tmp_path / "a.parquet")] == [("x", ("x", "z")), ("y", ())]
    assert [(s.id, s.target) for s in read_targets(tmp_path / "a.parquet")] == [
        ("a.parquet#0", 0.5),
        ("a.parquet#1", -1),
    ]
    assert [s.captions for s in read_captions(tmp_path / "a.parquet")] == [("p",), ("q",)]


def test_an_empty_number_of_pandas_is_no_target(tmp_path):
    parquet.write_table(pyarrow.table({"image": ["a"], "text": ["t"], "target": [float("nan")]}), tmp_path / "a.parquet")
    refused(lambda: read_targets(tmp_path / "a.parquet"), "a.parquet#0: no 'target'")


@pytest.mark.parametrize("kind", ["parquet", "bytes", "save_to_disk"])
def test_pictures_in_cells_are_those_of_their_files(tmp_path, kind):
    """Struct and plain bytes; more than one group of rows; what a sample lacks is lacking."""
    pictures = embedded(lacking=(2,))
    if kind == "bytes":
        pictures = pyarrow.array([cell and cell["bytes"] for cell in pictures.to_pylist()], pyarrow.binary())
    table = pyarrow.table({"picture": pictures, "text": ["t"] * 4, "label": [0, 1, 0, 1]})
    table = described(table, label={"names": ["no", "yes"], "_type": "ClassLabel"})
    (tmp_path / "in").mkdir()
    if kind == "save_to_disk":
        saved(tmp_path / "in" / "train", table)
    else:
        parquet.write_table(table, tmp_path / "in" / "train", row_group_size=3)
        (tmp_path / "in" / "train").rename(tmp_path / "in" / "train.parquet")
    source = Manifest(tmp_path, "in/train" if kind == "save_to_disk" else "in/train.parquet")
    samples = read_labels(source, {"image": "picture"}, may_lack=("image",))
    assert [s.labels for s in samples] == [("no",), ("yes",), ("no",), ("yes",)]
    assert [len(s.inputs) for s in samples] == [1, 1, 0, 1]
    for sample, colour in zip(samples, COLOURS, strict=True):
        if not sample.inputs:
            continue
        (tmp_path / f"{colour}.png").write_bytes(png(colour))
        found, file = read_image(tmp_path, sample.inputs["image"]), read_image(tmp_path, f"{colour}.png")
        assert found.digest == file.digest and found.upright().tobytes() == file.upright().tobytes()


def test_cells_are_not_read_before_they_are_encoded(tmp_path, monkeypatch):
    parquet.write_table(
        pyarrow.table({"image": embedded(), "text": ["t"] * 4, "label": list("abab")}), tmp_path / "a.parquet"
    )
    monkeypatch.setattr(tables.ParquetTable, "value", lambda *_: pytest.fail("a picture was read"))
    asked = []
    batches = tables.ParquetTable.batches
    monkeypatch.setattr(tables.ParquetTable, "batches", lambda self, names: asked.extend(names) or batches(self, names))
    assert len(read_labels(tmp_path / "a.parquet")) == 4
    assert asked == ["image.path", "text", "label"]


def test_a_path_in_place_of_bytes_is_below_the_folder(tmp_path):
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    paths = ["a.png", "../b.png", "a.parquet#0/image", None]
    cells = pyarrow.array([{"bytes": None, "path": path} for path in paths], kind)
    parquet.write_table(pyarrow.table({"image": cells, "text": ["t"] * 4, "label": list("abab")}), tmp_path / "a.parquet")
    (tmp_path / "a.png").write_bytes(png("red"))
    first, *others = [sample.inputs["image"] for sample in read_labels(tmp_path / "a.parquet")]
    assert read_image(tmp_path, first).digest == read_image(tmp_path, "a.png").digest
    for place, words in zip(others, ("leads out of the data folder", "no picture", "is empty (null)"), strict=True):
        refused(lambda place=place: read_image(tmp_path, place), words)


def test_lists_in_a_column_are_features_and_bytes_may_be_texts(tmp_path):
    vectors = np.arange(8, dtype=np.float32).reshape(4, 2)
    cells = {"mine": list(vectors), "label": list("abab"), "note": [b"some words"] * 4}
    parquet.write_table(pyarrow.table(cells), tmp_path / "a.parquet", row_group_size=2)
    samples = read_labels(tmp_path / "a.parquet", inputs=("mine", "note"))
    found = [read_array(tmp_path, sample.inputs["mine"]).values for sample in samples]
    np.testing.assert_array_equal(found, vectors)
    assert read_text(tmp_path, samples[1].inputs["note"]).text == "some words"
    refused(lambda: read_image(tmp_path, samples[0].inputs["mine"]), "list<", "and no file's bytes")
    refused(lambda: read_image(tmp_path, "a.parquet#9/mine"), "names the row '9'")
    refused(lambda: read_image(tmp_path, "a.parquet#1/yours"), "has the columns 'mine', 'label', 'note', not 'yours'")


def test_groups_of_rows_are_kept_within_bounds(tmp_path, monkeypatch):
    parquet.write_table(
        pyarrow.table({"v": [[float(n)] * 100 for n in range(40)]}), tmp_path / "a.parquet", row_group_size=4
    )
    monkeypatch.setattr(tables, "HELD", 10_000)
    for row in range(40):
        assert read_array(tmp_path, f"a.parquet#{row}").values[0] == row
    held = tables.opened(tmp_path / "a.parquet").held
    assert 1 < len(held) < 10 and sum(part.nbytes for part in held.values()) <= 10_000


def test_several_files_are_one_split(tmp_path):
    for n in range(3):
        rows = {"image": [f"{n}.png"], "text": ["t"], "label": ["ab"[n % 2]]}
        parquet.write_table(pyarrow.table(rows), tmp_path / f"part-{n:02}.parquet")
    for pattern in ("part-*.parquet", "part-{00..02}.parquet"):
        found = read_labels(Manifest(tmp_path, pattern))
        assert [(s.id, s.inputs["image"]) for s in found] == [(f"part-{n:02}.parquet#0", f"{n}.png") for n in range(3)]
    data = LabelledConfig(
        root=str(tmp_path), splits={"train": "part-*.parquet", "val": "part-{00..01}.parquet", "test": "x"}
    )
    assert data.split_names(tmp_path) == ["train", "val"] and len(data.read(tmp_path, "val")) == 2
    refused(lambda: read_labels(Manifest(tmp_path, "other-*.parquet")), "no file 'other-*.parquet'")
    refused(lambda: read_labels(Manifest(tmp_path, "part-{2..1}.parquet")), "from the lower number to the higher")
    refused(lambda: read_labels(Manifest(tmp_path, "part-{00..03}.parquet")), "part-03.parquet")


def test_what_is_torn_or_no_data_set_is_one_line(tmp_path):
    parquet.write_table(pyarrow.table({"image": ["a"], "label": ["b"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    refused(lambda: read_labels(tmp_path / "b.parquet"), "cannot read", "b.parquet", "write it again")
    saved(tmp_path / "d" / "train", pyarrow.table({"image": ["a"] * 4, "label": ["b"] * 4}))
    refused(lambda: read_labels(tmp_path / "d"), "no data set of save_to_disk", "name one of its splits, train")
    part = tmp_path / "d" / "train" / "data-00001-of-00002.arrow"
    part.write_bytes(part.read_bytes()[:300])
    refused(lambda: read_labels(tmp_path / "d" / "train"), "data-00001-of-00002.arrow", "write it again")
    (tmp_path / "d" / "train" / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    refused(lambda: read_labels(tmp_path / "d" / "train"), "names files outside of its folder")
    (tmp_path / "d" / "train" / "state.json").write_text("{}")
    refused(lambda: read_labels(tmp_path / "d" / "train"), "state.json", "save the data set again")


def test_a_class_that_no_name_belongs_to_is_an_empty_label(tmp_path):
    table = pyarrow.table({"image": ["a", "b"], "text": ["t", "t"], "label": [0, -1]})
    parquet.write_table(described(table, label={"names": ["no", "yes"], "_type": "ClassLabel"}), tmp_path / "a.parquet")
    refused(lambda: read_labels(tmp_path / "a.parquet"), "a.parquet#1: 'label' is empty")


def test_equal_and_mirrored_pictures_in_cells_are_not_drawn_apart(tmp_path):
    """A quarter for val; of each motif a copy and a mirror image, which must not be parted."""
    rng, cells = np.random.default_rng(0), []
    for _ in range(8):
        motif = np.kron(rng.integers(0, 255, (8, 8, 3)), np.ones((4, 4, 1))).astype(np.uint8)
        for pixels in (motif, motif, motif[:, ::-1]):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, format="PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
    parquet.write_table(
        pyarrow.table({"image": cells, "text": ["t"] * 24, "label": list("ab" * 12)}), tmp_path / "a.parquet"
    )
    data = LabelledConfig(root=str(tmp_path), splits={"train": "a.parquet"}, val_share=0.25)
    motifs = [{int(s.id.partition("#")[2]) // 3 for s in data.read(tmp_path, split)} for split in ("train", "val")]
    assert motifs[1] and not motifs[0] & motifs[1]
