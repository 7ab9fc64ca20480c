"""Odd values for every setting there is: each is taken as it will be read again, or refused in one line that names it."""

import random

import pytest

from mitrain.cli import main
from mitrain.core import config, parsing
from mitrain.core.config import KINDS, Section, section_in
from mitrain.core.errors import ConfigError
from mitrain.tasks import TASKS
from mitrain.training import schema

ODD = ["", "null", "true", "0", "-1", "1", str(2**31), str(2**62), str(10**100), "9" * 5000, "1e-300", "1e300", "1e400"]
ODD += [
    ".nan",
    "-.inf",
    "0.5",
    "1.5",
    "010",
    "1:30",
    "abc",
    '"a b"',
    '"猫"',
    '"\\e[31m"',
    '"\\0"',
    '"\\ud800"',
    "\udcff",
]
ODD += [
    "[]",
    "[1]",
    "[a, 1]",
    "[-1]",
    "[true]",
    "[0, 0]",
    "[[1]]",
    "[{}]",
    "{}",
    "{a: 1}",
    "{1: a}",
    "a: b",
    "#x",
    "a #x",
]
ODD += ["[" * 70, "*a", "&a [*a]", "!!binary aGk=", "2020-01-01", "-", "/dev/zero", '"' + "x" * 5000 + '"']
TASK_DATA = {
    name: next(data for data, kind in KINDS["data"].items() if issubclass(kind, task.formats))
    for name, task in TASKS.items()
}
BASE = {
    "name": "odd",
    "model": {"llm": "no-such-model", "encoders": {"image": {"name": "no-such-encoder", "size": 28}}},
    "adapter": {"name": "mit"},
    "task": {"name": "answer"},
    "data": {"name": "records", "root": "nowhere"},
}


def keys(section: type[Section], prefix: str = ""):
    """Every setting below a section, sections in it themselves among them."""
    for name, field in section.model_fields.items():
        yield prefix + name
        inner = section_in(field.annotation)
        if inner and issubclass(inner, Section) and inner is not Section:
            yield from keys(inner, f"{prefix}{name}.")


def settings():
    """(assignments that choose the kind, key) for every setting of every kind of section."""
    yield from (((), key) for key in keys(schema.RunConfig))
    yield from (
        ((f"adapter={{name: {name}}}",), f"adapter.{key}") for name, kind in KINDS["adapter"].items() for key in keys(kind)
    )
    tasks = [(name, task.settings) for name, task in TASKS.items()]  # KINDS may have other tests' tasks
    for name, kind in [*tasks, *KINDS["data"].items()]:
        task = name if name in TASK_DATA else next(name for name, task in TASKS.items() if issubclass(kind, task.formats))
        data = TASK_DATA[task] if name in TASK_DATA else name
        chosen = (f"task={{name: {task}}}", f"data={{name: {data}, root: nowhere}}")
        yield from ((chosen, f"{'task' if name in TASK_DATA else 'data'}.{key}") for key in keys(kind))


def test_every_setting_with_odd_values():
    generator, accepted = random.Random(0), 0
    for chosen, key in settings():
        for text in generator.sample(ODD, 4):
            try:
                with config.quoting([f"{key}={text}"]):
                    found = schema.from_dict(config.override(BASE, [*chosen, f"{key}={text}"]))
            except ConfigError as error:
                assert 10 < len(str(error)) < 11_000 and "\n" not in str(error), (key, text)
                continue
            values, accepted = found.to_dict(), accepted + 1
            again = parsing.parse_yaml(parsing.dump_yaml(values))
            assert again == values and schema.from_dict(again).hash == found.hash, (key, text)
    assert accepted > 40


@pytest.mark.parametrize("number", ["4e18", str(2**31)])
def test_no_setting_counts_what_nothing_has(number):
    taken = []
    for chosen, key in settings():
        try:
            found = schema.from_dict(config.override(BASE, [*chosen, f"{key}={number}"]))
        except ConfigError as error:
            assert "\n" not in str(error)
            continue
        for part in key.split("."):
            found = getattr(found, part)
        taken += [key] if isinstance(found, int) else []
    assert taken == []


@pytest.mark.parametrize(
    "key", ["train.batch", "train.accumulate", "train.eval_batch", "adapter.rank", "adapter.modalities.image"]
)
def test_what_memory_is_taken_for_at_once_is_bounded_closer(key):
    with pytest.raises(ConfigError, match=f"{key}=1048577: Input should be less than or equal to "):
        schema.from_dict(config.override(BASE, [f"{key}=1048577"]))


@pytest.mark.parametrize("number", [10**100, 2**62])
@pytest.mark.parametrize(
    "key",
    [*("train.hang_minutes", "task.dim", "task.queue", "task.ffn", "task.unet_width", "task.heads")],
)
def test_no_size_is_beyond_what_a_tensor_can_have(tmp_path, capsys, key, number):
    values = BASE
    if key in ("task.dim", "task.queue"):
        values = {**BASE, "task": {"name": "retrieve"}, "data": {"name": "captions", "root": "nowhere"}}
    elif key.startswith("task"):
        values = {**BASE, "task": {"name": "segment"}, "data": {"name": "refcoco", "root": "nowhere"}}
    (tmp_path / "a.yaml").write_text(parsing.dump_yaml(values))
    assert main(["train", str(tmp_path / "a.yaml"), "--dry-run", f"{key}={number}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert key in line
