"""A folder for each class: ImageFolder's layout."""

import logging

import numpy as np
import pytest
from PIL import Image

from mitrain.core.errors import DataError
from mitrain.data.sources import FoldersConfig


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 255, (8, 8, 3))
    Image.fromarray(np.kron(values, np.ones((4, 4, 1))).astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path / "cache"))
    for number in range(24):
        for seed, split in enumerate(("train", "val")):
            picture(tmp_path / "data" / split / "ab"[number % 2] / "deep" / f"{number}.png", number + 100 * seed)
    return tmp_path / "data"


def test_every_file_is_a_sample_of_its_folders_class(folder):
    config = FoldersConfig(root=str(folder))
    assert config.split_names(folder) == ["train", "val"] and config.class_names(folder) == ("a", "b")
    samples = config.read(folder, "train")
    assert len(samples) == 24 and samples[0].inputs == {"image": "train/a/deep/0.png"} and samples[0].labels == ("a",)


def test_splits_are_drawn_where_there_are_none(folder):
    config = FoldersConfig(root=str(folder / "train"), splits={"train": "."}, val_share=0.25, inputs=("photo",))
    train, val = (config.read(folder / "train", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (18, 6) and {s.labels for s in val} == {("a",), ("b",)}
    assert not {s.id for s in train} & {s.id for s in val} and "photo" in val[0].inputs


def test_what_is_no_file_of_a_known_kind_is_counted_and_left_out(folder, caplog):
    (folder / "train/a/notes.md").write_text("x")
    (folder / "train/a/.hidden.png").write_bytes(b"x")
    (folder / "train/.git").mkdir()
    with caplog.at_level(logging.WARNING):
        assert len(FoldersConfig(root=str(folder)).read(folder, "train")) == 24
    assert "left out 2 of no known kind; 24 samples remain" in caplog.text


def test_what_is_wrong_names_the_folder(folder):
    config = FoldersConfig(root=str(folder))
    picture(folder / "val/c/1.png", 0)
    with pytest.raises(DataError, match=r"val/c': the class 'c' is not one of training's"):
        config.read(folder, "val")
    (folder / "train/empty").mkdir()
    with pytest.raises(DataError, match="train/empty' holds no pictures, sound"):
        config.read(folder, "train")
    with pytest.raises(DataError, match="no folder of a class in .*test'"):
        config.model_copy(update={"classes": ("a", "b")}).read(folder, "test")
    with pytest.raises(ValueError, match="one file and one label a sample"):
        FoldersConfig(root=str(folder), inputs=("image", "speech"))
