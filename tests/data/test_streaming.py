"""Streamed samples: every one once an epoch, a cursor that finds the same ones again, and a block at a time in memory."""

import csv
import itertools
import json
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from embedded import shard
from pyarrow import parquet

from mitrain.core.config import choose
from mitrain.core.errors import ConfigError, DataError
from mitrain.data.sources import RatedConfig


def table(folder, records: int = 10, files: int = 3, kind: str = "csv") -> RatedConfig:
    """So many records a file, ids 0, 1 …, and the section that streams blocks of four."""
    for n in range(files):
        rows = [(str(n * records + i), f"{n}-{i}.npy", "t", float(i)) for i in range(records)]
        path = folder / f"part-{n}.{kind}"
        if kind == "csv":
            with open(path, "w", newline="") as file:
                csv.writer(file).writerows([("id", "mine", "text", "target"), *rows])
        elif kind == "parquet":
            names = ("id", "mine", "text", "target")
            parquet.write_table(pyarrow.table(dict(zip(names, zip(*rows, strict=True), strict=True))), path)
        else:
            facts = [{"id": i, "mine": m, "text": t, "target": v} for i, m, t, v in rows]
            members = [(f"{one['id']}.json", json.dumps(one).encode()) for one in facts]
            shard(path, members)
    splits = {"train": f"part-{{0..{files - 1}}}.{kind}"}
    return RatedConfig(root=str(folder), splits=splits, inputs=("mine",), stream=4)


def loader(data, seed: int = 0, batch: int = 3, usable=lambda samples: samples):
    return data.stream_of(Path(data.root), usable, batch, seed)


def draws(one, batches: int):
    return [(d.sample.id, d.epoch, d.random.random()) for _ in range(batches) for d in one.next()]


@pytest.mark.parametrize("kind", ["csv", "parquet", "tar"])
def test_every_epoch_has_every_sample_once_in_another_order(tmp_path, kind):
    drawn = draws(loader(table(tmp_path, kind=kind)), 20)
    first, second = [i for i, e, _ in drawn if e == 0], [i for i, e, _ in drawn if e == 1]
    assert sorted(map(int, first)) == sorted(map(int, second)) == list(range(30))
    assert first != second and len({choice for *_, choice in drawn}) == 60
    assert first != sorted(first, key=int) and draws(loader(table(tmp_path, kind=kind)), 20) == drawn
    assert draws(loader(table(tmp_path, kind=kind), seed=1), 20) != drawn


@pytest.mark.parametrize("kind", ["csv", "parquet", "tar"])
def test_a_cursor_goes_on_with_the_very_samples_and_choices(tmp_path, kind):
    data = table(tmp_path, kind=kind)
    whole = draws(loader(data), 25)
    for begun in range(25):
        first, second = loader(data), loader(data)
        before = draws(first, begun)
        second.load_state(first.state())
        assert before + draws(second, 25 - begun) == whole


def test_samples_that_cannot_be_used_are_left_out_of_every_epoch(tmp_path):
    even = lambda samples: [s for s in samples if int(s.id) % 2]  # noqa: E731
    drawn = [i for i, e, _ in draws(loader(table(tmp_path), usable=even), 10) if e == 0]
    assert sorted(map(int, drawn)) == list(range(1, 30, 2))
    with pytest.raises(DataError, match=r"no sample of .*part-\{0\.\.2\}\.csv' can be used"):
        loader(table(tmp_path), usable=lambda samples: []).next()


def test_a_cursor_of_other_records_is_refused(tmp_path):
    data = table(tmp_path)
    first = loader(data)
    draws(first, 5)
    state = first.state()
    for bad in ({"file": 9}, {"epoch": -1}, {"record": "x"}, {"position": None}):
        with pytest.raises(ValueError, match="no cursor has"):
            loader(data).load_state(state | bad)
    file = first.stream.order[state["file"]]
    text = file.read_text().splitlines()
    at = state["record"] + 1
    file.write_text("\n".join([*text[:at], text[at].replace(",t,", ",u,"), *text[at + 1 :]]) + "\n")
    with pytest.raises(ValueError, match=rf"from {state['record']} of {file.name} on are not those"):
        loader(data).load_state(state)
    other = loader(data)
    other.load_state(state, other_samples=True)
    assert other.state()["epoch"] == 1


def test_memory_does_not_grow_with_the_records(tmp_path):
    """An epoch in blocks of 4, of 1,800 and of 7,200 records: both in files longer than what is read of one at a time."""
    peaks = []
    for number, records in enumerate((600, 2400)):
        folder = tmp_path / str(number)
        folder.mkdir()
        one = loader(table(folder, records))
        tracemalloc.start()
        for _ in itertools.takewhile(lambda draws: draws[0].epoch == 0, iter(one.next, None)):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 300_000, peaks


def test_the_first_records_stand_for_the_split_in_statistics(tmp_path, caplog):
    data = table(tmp_path)
    assert [s.id for s in data.read(tmp_path, "train")] == ["0", "1", "2", "3"]
    assert "is streamed: its first 4 records stand for it in statistics" in caplog.text
    with pytest.raises(DataError, match="has no 'thing' in any record|no 'thing'"):
        data.model_copy(update={"columns": {"object": "thing"}}).read(tmp_path, "train")


def test_what_needs_all_records_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"takes its classes from .*: name all classes in data\.classes"):
        choose("data", {"name": "labelled", "root": str(tmp_path), "stream": 4})
    asked = {"name": "rated", "root": str(tmp_path), "splits": {"train": "a.csv"}, "val_share": 0.1, "stream": 4}
    with pytest.raises(ConfigError, match="draws val_share and test_share from .*: give files for val and test"):
        choose("data", asked)
