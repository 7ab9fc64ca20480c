"""What is shown and compared beside a score is what was scored."""

from types import SimpleNamespace

import pytest
from exported import make_run, make_world
from folders import own_cache

from mitrain.core import dist
from mitrain.core.errors import DataError, RankError
from mitrain.inference.report import figure, rows_of, spread
from mitrain.inference.scoring import score_split, split_of
from mitrain.training import runs
from mitrain.training.baselines import baselines_of


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with own_cache(make_world(tmp_path_factory.mktemp("report"))) as path:
        opened = runs.open_run(make_run(path))
        yield path, opened, *split_of(opened, "test")


def test_a_picture_that_was_replaced_since_it_was_scored_is_not_shown(world):
    path, run, chosen, images = world
    found = score_split(run, chosen, images, "none")
    assert figure(run, images, chosen, found, len(chosen)).startswith(b"\x89PNG")
    file = path / "data" / chosen[0].inputs["image"]
    before = file.read_bytes()
    other = next(s for s in chosen if (path / "data" / s.inputs["image"]).read_bytes() != before)
    try:
        file.write_bytes((path / "data" / other.inputs["image"]).read_bytes())
        with pytest.raises(DataError, match=f"'{chosen[0].inputs['image']}' in .* was replaced while it was being used"):
            figure(run, images, chosen, found, len(chosen))
    finally:
        file.write_bytes(before)


def test_ranks_make_baselines_of_the_same_samples(world, monkeypatch):
    _, run, chosen, images = world
    monkeypatch.setattr(dist, "world", lambda: 2)
    name, other = "data.train.answer", "sha256:other"  # all else that ranks exchange is the same on both

    def gather(value):
        return [value, {**value, name: other} if isinstance(value, dict) and name in value else value]

    monkeypatch.setattr(dist, "gather", gather)
    monkeypatch.setattr(dist, "sum_across", lambda tensor: tensor)
    with pytest.raises(RankError, match=r"data\.train\.answer of rank 1 is not rank 0's"):
        baselines_of(run, "test", chosen, images)


def test_a_column_that_no_row_has_is_left_out():
    row = {"split": "test", "label": "run", "seeds": 1, "mean": {"accuracy": 0.5, "samples": 4.0}, "spread": {}}
    columns = (("accuracy", "accuracy"), ("soft accuracy", "soft_accuracy"))
    assert rows_of({"columns": columns, "rows": [row]}) == (
        ["split", "", "accuracy", "samples", "seeds"],
        [["test", "run", "0.500", "4", "1"]],
    )


def test_a_sheet_shows_every_kind_also_where_kinds_take_turns():
    samples = [(SimpleNamespace(kind=kind), i) for i, kind in enumerate(["name", "yes", "yes", "category"] * 16)]
    found = spread(samples, 6)
    assert [sample.kind for sample, _ in found] == ["name"] * 2 + ["yes"] * 2 + ["category"] * 2
    assert [i for _, i in found] == [0, 28, 10, 41, 19, 47]
    assert [i for _, i in spread([(SimpleNamespace(), i) for i in range(7)], 3)] == [0, 2, 4]
    assert spread([], 3) == []
