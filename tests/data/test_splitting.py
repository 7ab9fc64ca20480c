"""Validation and test samples drawn from one table: nothing leaks, every label is trained, and it stays as it was."""

import csv
import json
import logging
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mitrain.core.errors import ConfigError, DataError
from mitrain.data import splitting
from mitrain.data.sources import CaptionsConfig, LabelledConfig, RatedConfig

SHARES = {"val": 0.2, "test": 0.2}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """60 pictures of noise in three classes; picture 1 again under another name, picture 2 brighter, picture 3 mirrored."""
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    pixels = [np.kron(rng.integers(0, 200, (8, 8, 3)), np.ones((4, 4, 1))).astype(np.uint8) for _ in range(60)]
    for number, values in enumerate(pixels):
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    (tmp_path / "again.png").write_bytes((tmp_path / "1.png").read_bytes())
    Image.fromarray(pixels[2] + 9).save(tmp_path / "brighter.png")
    Image.fromarray(pixels[3][:, ::-1]).save(tmp_path / "mirrored.png")
    names = [*(f"{number}.png" for number in range(60)), "again.png", "brighter.png", "mirrored.png"]
    with open(tmp_path / "all.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "label", "text", "object"])
        table.writerows(
            [name, "abc"[number % 3], "a", f"thing{number // 10}" if number < 20 else ""]
            for number, name in enumerate(names)
        )
    return tmp_path


def section(folder, **more):
    return LabelledConfig(root=str(folder), splits={"train": "all.csv"}, val_share=0.2, test_share=0.2, **more)


def parts(config, folder):
    return {split: config.read(folder, split) for split in config.split_names(folder)}


def where(found, name):
    return next(split for split, samples in found.items() if name in {s.inputs["image"] for s in samples})


def test_each_split_has_its_share_of_every_label_and_no_sample_twice(folder):
    found = parts(section(folder), folder)
    assert list(found) == ["train", "val", "test"]
    ids = [sample.id for samples in found.values() for sample in samples]
    assert len(ids) == len(set(ids)) == 63
    for split in SHARES:
        assert 8 <= len(found[split]) <= 17 and {s.labels[0] for s in found[split]} == set("abc")


def test_what_shares_an_object_a_file_or_nearly_a_picture_stays_together(folder):
    found = parts(section(folder), folder)
    assert len({where(found, f"{number}.png") for number in range(10)}) == 1
    assert len({where(found, f"{number}.png") for number in range(10, 20)}) == 1
    for one, other in (("1.png", "again.png"), ("2.png", "brighter.png"), ("3.png", "mirrored.png")):
        assert where(found, one) == where(found, other)


def test_near_duplicates_would_be_parted_if_they_were_not_looked_for(folder, monkeypatch):
    """The check above can fail: of these seeds some part a picture from its brighter copy."""
    monkeypatch.setattr(splitting, "near", lambda *_: [])
    seen = set()
    for seed in range(12):
        found = parts(section(folder, source_seed=seed), folder)
        seen.add(where(found, "2.png") == where(found, "brighter.png"))
    assert False in seen


def test_a_split_is_the_same_again_and_another_for_another_seed(folder):
    first, again = (parts(section(folder), folder) for _ in range(2))
    assert first == again
    (next((folder / "cache" / "splits").glob("*.json"))).unlink()
    assert parts(section(folder), folder) == first
    assert parts(section(folder, source_seed=1), folder) != first


def test_a_damaged_note_of_the_split_is_drawn_again(folder):
    first = parts(section(folder), folder)
    note = next((folder / "cache" / "splits").glob("*.json"))
    note.write_text(json.dumps({"nobody": "val"}))
    assert parts(section(folder), folder) == first


def test_a_new_row_moves_few_of_the_others(folder):
    first = parts(section(folder), folder)
    with open(folder / "all.csv", "a") as file:
        file.write("59.png,c,a,\n")
    before = {s.inputs["image"]: split for split, samples in first.items() for s in samples}
    after = {s.inputs["image"]: split for split, samples in parts(section(folder), folder).items() for s in samples}
    assert sum(before[name] != after[name] for name in before) <= 2


def test_every_label_is_in_training_also_where_a_group_has_several(folder):
    rows = [(f"{n}.png", "ab"[n % 2], "a", "") for n in range(40)] + [(f"{n}.png", "rare", "a", "") for n in range(3)]
    with open(folder / "all.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "label", "text", "object"), *rows])
    for seed in range(5):
        found = parts(section(folder, source_seed=seed), folder)
        known = {label for sample in found["train"] for label in sample.labels}
        assert known >= {label for split in SHARES for sample in found[split] for label in sample.labels}


def test_how_many_were_drawn_is_said_once(folder, caplog):
    with caplog.at_level(logging.WARNING):
        parts(section(folder), folder)
        parts(section(folder), folder)
    (line,) = [record.getMessage() for record in caplog.records if "drew" in record.getMessage()]
    counts = Counter({split: len(samples) for split, samples in parts(section(folder), folder).items()})
    assert f"drew {counts['train']} for train, {counts['val']} for val, {counts['test']} for test" in line
    assert "21 samples stay with another" in line  # nine of each thing, and three copies


def test_pictures_that_all_look_alike_are_told_apart_by_their_files_alone(folder, caplog):
    for number in range(60):
        values = np.full((32, 32, 3), 255, np.uint8)
        values[4:20, 4:20], values[-1, number % 32] = 0, number
        Image.fromarray(values).save(folder / f"{number}.png")
    with open(folder / "all.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "label"), *((f"{n}.png", "ab"[n % 2]) for n in range(60))])
    with caplog.at_level(logging.WARNING):
        found = parts(section(folder), folder)
    assert len(found["val"]) == len(found["test"]) == 12
    assert "look too much alike" in caplog.text


def test_a_table_of_one_group_is_refused(folder):
    with open(folder / "all.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "label", "object"), *((f"{n}.png", "a", "same") for n in range(9))])
    with pytest.raises(DataError, match="no sample is left for the split 'val' of 1 groups"):
        section(folder).read(folder, "val")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"splits": {"train": "a.csv", "val": "b.csv"}, "val_share": 0.1}, "val_share draws a split that has a file"),
        ({"splits": {"train": "a.csv"}, "val_share": 0.5, "test_share": 0.5}, "less than all of it"),
        ({"splits": {"test": "a.csv"}, "val_share": 0.1}, "parts of splits.train"),
    ],
)
def test_shares_that_fit_no_file_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        RatedConfig(root="x", **values)


def test_a_split_without_a_file_names_the_setting_that_draws_it(folder):
    config = CaptionsConfig(root=str(folder), splits={"train": "all.csv"})
    with pytest.raises(ConfigError, match="no 'val': choose one of train, or draw it with data.val_share"):
        config.read(folder, "val")
