"""What many rows cost: every part is taken, and of many texts a part alone is tokenised before the first step."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import data
from mitrain.core.errors import DataError
from mitrain.data import columns
from mitrain.data.formats.records import AnswerSample
from mitrain.training import setup
from mitrain.training.setup import Setup


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path / "cache"))
    data.made(tmp_path, 120)
    return tmp_path


def test_every_part_has_a_number(rows, tmp_path, monkeypatch):
    written = {}
    monkeypatch.setattr(data, "write_json", lambda out, found: written.update({out.name: found}))
    data.parts(str(rows), 120, Path("parts"))
    data.start(str(rows), Path("empty"))
    data.start(str(rows), Path("filled"))
    assert 0 < written["empty"]["encoding"] < written["empty"]["seconds"]
    row = {"rows": 120, **written["parts"], "starts": [written["empty"], written["filled"]]}
    assert {*data.PARTS, "batch_ms", "row_bytes"} <= written["parts"].keys()
    made = {"command": "x", "commit": "c", "date": "d", "versions": "v", "machine": "m"}
    assert data.table({"made": made, "rows": [row]}).count("| 120 |") == 2


def test_of_many_texts_some_are_tokenised_and_those_too_long_for_the_model(rows, monkeypatch):
    monkeypatch.setattr(columns, "MANY", 1)
    monkeypatch.setattr(setup, "TOKENISED", 10)
    run = Setup(data.configured(rows), Path(), quiet=True)
    assert isinstance(run.train, columns.Columns)
    assert list(columns.column(run._looked_at(), "id")) == [f"row{number}" for number in range(0, 120, 12)]
    lines = (rows / "data" / "train.jsonl").read_text().splitlines()
    lines[7] = lines[7].replace('"text": "', '"text": "' + "a " * 100)
    (rows / "data" / "train.jsonl").write_text("\n".join(lines))
    config = data.configured(rows)
    task = config.task.model_copy(update={"max_tokens": 90})
    with pytest.raises(DataError, match="'row7'.* is longer than the model's 64"):
        Setup(config.model_copy(update={"task": task}), Path(), quiet=True)


def test_of_conversations_all_texts_are_tokenised_as_each_turn_has_words_around_it(monkeypatch):
    monkeypatch.setattr(setup, "TOKENISED", 2)
    samples = [AnswerSample(str(i), {}, "hi", "ho") for i in range(8)]
    text, states = SimpleNamespace(positions=64), SimpleNamespace(cached=False)
    for chat, count in ((False, 2), (True, 8)):
        task = SimpleNamespace(template="{prompt}", max_new_tokens=8, chat=chat)
        run = SimpleNamespace(config=SimpleNamespace(task=task), train=samples)
        run.model = SimpleNamespace(text=text, states=states)
        assert len(Setup._looked_at(run)) == count
        task.template = "ż" * 20 + "{prompt}"  # two bytes a letter
        assert len(Setup._looked_at(run)) == 8
