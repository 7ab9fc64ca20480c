"""Study files: what parses, what is refused in one line, and which cells and configurations follow."""

import pytest
import yaml
from studies import BASE, STUDY

from mitrain.compare import cells, study
from mitrain.compare.cells import CellId
from mitrain.core.config import parse
from mitrain.core.errors import ConfigError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    return tmp_path


def made(folder, **changes):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}))
    return study.read(path), path


def resolve(folder, place, **changes):
    return cells.resolve(*made(folder, **changes), place)


def refused(folder, **changes):
    with pytest.raises(ConfigError) as error:
        made(folder, **changes)
    assert "\n" not in str(error.value) and "study.yaml: " in str(error.value)
    return str(error.value)


def test_cells_by_task_method_and_seed(folder):
    found, _ = made(folder)
    assert [p.name for p in cells.cell_ids(found)] == [
        "label-mit-seed0", "label-mit-seed1", "label-none-seed0", "label-none-seed1", "label-plain-seed0",
        "label-plain-seed1",
    ]  # fmt: skip
    assert [p.seed for p in cells.cell_ids(found, [3])] == [3, 3, 3]


def test_an_axis_is_run_for_its_methods_alone(folder):
    axes = {"depth": {"keys": ["adapter.layers"], "values": [1, "1-2"], "methods": ["mit"]}}
    found, _ = made(folder, axes=axes, seeds=[0])
    assert [(p.method, p.axis, p.at) for p in cells.cell_ids(found)] == [
        ("mit", None, None), ("mit", "depth", 1), ("mit", "depth", "1-2"), ("none", None, None), ("plain", None, None),
    ]  # fmt: skip
    swept, _ = made(folder, axes=axes, seeds=[0], plain=False)
    assert [(p.method, p.at) for p in cells.cell_ids(swept)] == [("mit", 1), ("mit", "1-2")]


def test_overrides_are_laid_over_the_base_in_order(folder):
    changes = {
        "set": {"train.steps": 7},
        "tasks": {"label": {"config": "base.yaml", "set": ["train.batch=3"]}},
        "axes": {"steps": {"keys": ["train.steps", "train.eval_every"], "values": [2, 9], "set": {"train.lr": 0.5}}},
        "also": [{"methods": ["plain"], "set": {"train.batch": 4}, "reduced": "four samples"}],
    }
    cell = resolve(folder, CellId("label", "plain", None, None, 1), **changes)
    config = cell.config
    assert (config.train.steps, config.train.batch, config.adapter.gate, config.seed) == (7, 4, "none", 1)
    assert config.adapter.layers == [1, 2] or config.adapter.layers == "1-2"
    assert cell.reduced == "four samples"
    swept = resolve(folder, CellId("label", "mit", "steps", 9, 0), **changes)
    assert (swept.config.train.steps, swept.config.train.eval_every, swept.config.train.lr) == (9, 9, 0.5)
    assert swept.config.train.batch == 3 and swept.reduced is None


def test_a_section_of_another_name_replaces_the_bases(folder):
    config = resolve(folder, CellId("label", "none", None, None, 0)).config
    assert config.adapter.section_name == "none"
    assert study.changed({"name": "mit", "gate": "none"}, {"name": "mit", "rank": 2}) == {
        "name": "mit", "gate": "none", "rank": 2,
    }  # fmt: skip


def test_items_of_lists_are_changed_by_their_number():
    assert study.laid_over({"a": [{"size": 1, "x": 2}, 5]}, study.nested({"a.0.size": 3})) == {"a": [{"size": 3, "x": 2}, 5]}
    with pytest.raises(ConfigError, match="has no item 2"):
        study.laid_over({"a": [1, 2]}, study.nested({"a.2": 3}))


def test_points_with_settings_of_their_own(folder):
    axes = {
        "depth": {"values": [{"value": 1, "set": {"adapter.layers": [2]}}, {"value": 2, "set": {"adapter.layers": "1-2"}}]}
    }
    place = CellId("label", "mit", "depth", 1, 0)
    found, _ = made(folder, axes=axes)
    assert place in cells.cell_ids(found)
    assert resolve(folder, place, axes=axes).config.adapter.layers == [2]


def test_identity_is_of_what_is_computed(folder):
    place = CellId("label", "mit", None, None, 0)
    same = resolve(folder, place)
    assert resolve(folder, place, title="another", methods={"mit": []}).identity == same.identity
    assert resolve(folder, place, set={"train.steps": 5}).identity == same.identity, "a value that is the base's own"
    others = [
        resolve(folder, CellId("label", "mit", None, None, 1)),
        resolve(folder, place, set={"train.steps": 6}),
        resolve(folder, place, tasks={"label": {"config": "base.yaml", "metric": "accuracy", "samples": 3}}),
        resolve(folder, place, tasks={"label": {"config": "base.yaml", "metric": "f1_macro"}}),
    ]
    assert len({cell.identity for cell in [same, *others]}) == 5
    newer = cells.Cell(same.id, same.config, same.part, made={"torch": "99"})
    assert newer.identity != same.identity and newer.digest == same.digest


def test_a_new_setting_at_its_default_changes_no_digest(folder):
    cell = resolve(folder, CellId("label", "mit", None, None, 0))
    assert cells.minimal(cell.config)["train"] == {"steps": 5}
    assert cells.minimal(cell.config)["adapter"]["name"] == "mit"


def test_words_choose_cells(folder):
    found, _ = made(folder)
    assert [p.method for p in cells.chosen(found, ["none"], [0])] == ["none"]
    assert len(cells.chosen(found, ["label-mit", "plain"])) == 4
    with pytest.raises(ConfigError, match="--only plane names no cell.*did you mean 'plain'"):
        cells.chosen(found, ["plane"])


def test_cells_are_left_out(folder):
    found, _ = made(folder, also=[{"methods": ["none"], "leave_out": True}])
    assert {p.method for p in cells.cell_ids(found)} == {"mit", "plain"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methodes": {}}, "unknown key 'methodes' (did you mean 'methods'?)"),
        ({"tasks": {"label": {"confg": "x"}}}, "unknown key 'tasks.label.confg' (did you mean 'config'?)"),
        ({"also": [{"method": ["mit"]}]}, "unknown key 'also.0.method' (did you mean 'methods'?)"),
        ({"also": [{"methods": ["mitt"]}]}, "study.yaml: also[0] names the method 'mitt' (did you mean 'mit'?)"),
        ({"axes": {"k": {"keys": ["a"], "values": [1], "tasks": ["lable"]}}}, "k names the task 'lable' (did you mean"),
        ({"claim": {"id": "X"}}, "unknown key 'claim'"),
        ({"axes": {"k": {"values": [1, 2]}}}, "an axis without keys changes nothing"),
        ({"axes": {"k": {"keys": ["a"], "values": [1, 2, 1]}}}, "the point 1 stands twice"),
        ({"axes": {"k": {"keys": ["a"], "values": [1, {"value": 1, "set": {"b": 2}}]}}}, "the point 1 stands twice"),
        ({"seeds": [0, 1, 0]}, "the seed 0 stands twice"),
        ({"methods": {"mit": ["adapter.gate"]}}, "is not an override"),
        ({"methods": {"mit": 5}}, "overrides are a mapping"),
        ({"methods": {"a b": {}}}, "cannot name a task, method or axis"),
        ({"limit_s": 0}, "limit_s=0"),
        ({"against": "mitt"}, "against names the method 'mitt' (did you mean 'mit'?), which the study has not"),
        ({"seeds": []}, "seeds="),
        ({"tasks": {}}, "a study needs tasks and methods"),
        ({"kind": "guess"}, "kind='guess'"),
    ],
)
def test_what_is_wrong_is_one_line(folder, changes, words):
    assert words in refused(folder, **changes)


def test_a_cell_that_does_not_parse_names_itself(folder):
    with pytest.raises(ConfigError, match=r"study\.yaml: the cell label-mit-seed0: .*did you mean 'rank'"):
        resolve(folder, CellId("label", "mit", None, None, 0), methods={"mit": {"adapter.rnak": 2}})
    with pytest.raises(ConfigError, match="no configuration file"):
        resolve(folder, CellId("label", "mit", None, None, 0), tasks={"label": {"config": "gone.yaml"}})
    with pytest.raises(ConfigError, match="kind: count"):
        resolve(folder, CellId("label", "mit", None, None, 0), set={"count.side": 224})


def test_a_counted_study_has_no_seeds(folder):
    found, path = made(folder, kind="count", axes={"side": {"keys": ["count.side"], "values": [28]}})
    place = cells.cell_ids(found)[1]
    assert (place.name, place.seed) == ("label-mit-side-28", None)
    assert cells.resolve(found, path, place).count == {"side": 28}


def test_names_are_file_names_and_runs(folder):
    place = CellId("label", "mit+lora", "data/fraction", [1, "x y"], 3)
    assert set(place.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-")
    assert parse(
        type(resolve(folder, CellId("label", "mit", None, None, 0)).config),
        {**BASE, "name": cells.run_name("s", place)},
    )
