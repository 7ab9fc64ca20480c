"""What two processes, or a run and its checkpoint, must have in common."""

import hashlib
import json
import logging
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from mitrain.core.errors import ConfigError, RankError
from mitrain.core.version import __version__
from mitrain.data.formats.records import AnswerSample
from mitrain.data.formats.refcoco import ReferSample
from mitrain.training import fingerprint as module
from mitrain.training import resume, schema
from mitrain.training.checkpoint import Checkpoint
from mitrain.training.fingerprint import (
    MARK,
    differences,
    digest,
    fingerprint,
    flat,
    listed,
    require_same,
)

SAMPLES = [AnswerSample(f"s{i}", {"image": f"{i}.png"}, "What is it?", "cat", ("cat", "dog")) for i in range(3)]
CONFIG = {"seed": 0, "train": {"lr": 1e-3, "steps": 10}, "model": {"encoders": {"image": {"name": "v"}}}, "wandb": {}}
BASE = {"text": f"{MARK}aa"}


def contents(change):
    return lambda sample: {name: change(file) for name, file in sample.inputs.items()}


def of(samples=SAMPLES, config=CONFIG, content=str.upper, base=BASE):
    return fingerprint(config, {"train": samples}, contents(content), base)


def test_the_same_run_has_the_same_fingerprint_also_after_json():
    assert json.loads(json.dumps(of())) == of()
    assert differences(of(), of()) == []


def test_every_field_of_a_sample_and_the_content_of_its_picture_counts():
    for field, value in [
        ("id", "other"),
        ("inputs", {"image": "other.png"}),
        ("prompt", "Which?"),
        ("answer", "dog"),
        ("candidates", ("dog", "cat")),
        ("kind", "k"),
        ("object", "o"),
    ]:
        changed = [*SAMPLES[:2], replace(SAMPLES[2], **{field: value})]
        names = ("image", "image.content") if field == "inputs" else (field,)
        expected = [f"data.train.{name} differs" for name in names]
        assert differences(of(), of(changed)) == expected
    assert differences(of(), of(content=str.lower)) == ["data.train.image.content differs"]


def test_order_and_number_of_samples_count():
    assert "data.train.id differs" in differences(of(), of(SAMPLES[::-1]))
    assert "data.train.samples is 3 there, 2 here" in differences(of(), of(SAMPLES[:2]))
    assert differences(of([]), of())[0] == "data.train.samples is 0 there, 3 here"


def test_a_thousand_and_more_samples_are_digested_whole():
    many = [replace(SAMPLES[0], id=str(i)) for i in range(2500)]
    for place in (0, 1023, 1024, 2499):
        changed = list(many)
        changed[place] = replace(many[place], answer="dog")
        assert differences(of(many), of(changed)) == ["data.train.answer differs"]


def test_run_lengths_that_came_as_bytes_are_digested():
    def refer(counts):
        return [ReferSample("a", {"image": "a.png"}, "the dog", (2, 2), {"size": [2, 2], "counts": counts})]

    assert differences(of(refer(b"04")), of(refer(b"13"))) == ["data.train.segmentation differs"]


def test_configuration_names_its_keys_and_values():
    other = {**CONFIG, "train": {"lr": 0.5, "steps": 10}, "wandb": {"project": "p"}}
    assert differences(of(), of(config=other), ignoring=["config.wandb"]) == ["config.train.lr is 0.001 there, 0.5 here"]
    assert 'config.wandb.project is absent there, "p" here' in differences(of(), of(config=other))
    assert flat(CONFIG)["model.encoders.image.name"] == '"v"'


def test_ignoring_a_section_does_not_ignore_what_begins_alike():
    there, here = of(config={"zero": 1}), of(config={"zeroed": 1})
    assert len(differences(there, here, ignoring=["config.zero"])) == 1


def test_frozen_weights_and_code_are_parts():
    assert differences(of(), of(base={"text": f"{MARK}bb"})) == ["base.text differs"]
    assert differences(of(), of(base={})) == ["base.text is a digest there, absent here"]
    assert of()["code.sources"].startswith(MARK) and of()["code.mitrain"]


def test_ranks_that_differ_are_named_with_what_differs(monkeypatch):
    own = {"config.seed": "0", "data.train.answer": digest(["a"]), "code.torch": "2.13", "base.text": digest(["b"])}
    there = {**own, "config.seed": "1", "data.train.answer": digest(["c"])}
    monkeypatch.setattr(module.dist, "gather", lambda value: [own, own, there])
    with pytest.raises(RankError) as error:
        require_same(own)
    assert str(error.value) == (
        "the ranks would not run the same: config.seed is 0 on rank 0, 1 on rank 2; data.train.answer of rank 2 is not"
        " rank 0's; give all of them the same arguments, files and versions"
    )
    monkeypatch.setattr(module.dist, "gather", lambda value: [own, {**there, "code.torch": "2.12"}, there])
    with pytest.raises(RankError, match=r"answer of ranks 1, 2 is not rank 0's; code.torch is 2.13 on rank 0, 2.12 on"):
        require_same(own)
    monkeypatch.setattr(module.dist, "gather", lambda value: [own, dict(own)])
    require_same(own)


def test_a_digest_is_of_the_values_in_parts_of_1024_as_json_with_sorted_keys():
    """As checkpoints have it: another way of digesting would make every run that is gone on with a changed one."""
    values = [{"b": 1, "a": None}, "\u00e9", 1.5, b"04", *range(2044)]
    parts = [json.dumps(part, sort_keys=True, default=repr) for part in (values[:1024], values[1024:])]
    assert digest(iter(values)) == MARK + hashlib.sha256("".join(parts).encode()).hexdigest()
    assert digest([]) == MARK + hashlib.sha256(b"").hexdigest()
    assert parts[0].startswith('[{"a": null, "b": 1}, "\\u00e9", 1.5, "b\'04\'"')


def test_values_of_a_configuration_are_json_with_sorted_keys():
    values = {"a": {"b": [{"z": 1, "c": "\u00e9"}], "empty": {}}, "n": None}
    assert flat(values) == {"a.b": '[{"c": "\u00e9", "z": 1}]', "a.empty": "{}", "n": "null"}


def test_the_code_is_all_of_our_files_and_the_versions_of_what_computes():
    root = Path(module.__file__).parents[2]
    files = [
        path
        for folder in ("mitrain", "mitrain_kernels", "kernels/mitrain_kernels")
        for path in sorted((root / folder).rglob("*.py"))
    ]
    assert Path(module.__file__) in files and len(files) > 100
    ours = [[path.parent.name, path.name, path.read_text(encoding="utf-8")] for path in files]
    found = module.code()
    assert found == {
        "mitrain": __version__,
        "sources": digest(ours),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    assert module.code_parts() == {f"code.{name}": value for name, value in found.items()}


def test_parts_stand_in_the_order_of_the_run_and_then_of_what_is_gone():
    there, here = {"a": "1", "gone": "2", "b": "3"}, {"b": "4", "new": "5", "a": "6"}
    assert differences(there, here) == [
        "b is 3 there, 4 here",
        "new is absent there, 5 here",
        "a is 1 there, 6 here",
        "gone is 2 there, absent here",
    ]
    parts = ["data.train.samples", "base.text"]
    assert [name for name in of([]) if not name.startswith(("code.", "config."))] == parts


@pytest.mark.parametrize(
    ("there", "here", "found"),
    [
        (("s1", "c1"), ("s2", "c1"), []),
        (("s1", "c1"), ("s2", "c2"), ["base.text.settings differs"]),
        (("s1", None), ("s2", None), ["base.text.settings differs"]),
        (("s1", None), ("s2", "c1"), ["base.text.settings differs"]),
        (("s1", "c1"), ("s2", None), ["base.text.settings differs"]),
        (("s1", "c1"), ("s1", "c2"), []),
    ],
)
def test_settings_or_the_file_that_they_were_read_from_are_the_same(there, here, found):
    """Another transformers may read other settings from one file, another file may hold the same settings."""

    def named(settings, written):
        parts = {"base.text.settings": settings, "base.text.config.json": written}
        return {name: f"{MARK}{value}" for name, value in parts.items() if value} | {"base.text": f"{MARK}w"}

    assert differences(named(*there), named(*here)) == found
    weights = {"base.text": f"{MARK}other"}
    assert differences(named(*there), named(*here) | weights)[-1] == "base.text differs"


def test_a_digest_on_one_side_alone_is_called_one():
    assert differences({"x": f"{MARK}a"}, {"x": "1"}) == ["x is a digest there, 1 here"]
    assert differences({"x": "1"}, {"x": f"{MARK}a"}) == ["x is 1 there, a digest here"]
    assert differences({}, {"x": f"{MARK}a"}) == ["x is absent there, a digest here"]


@pytest.mark.parametrize(("length", "shown"), [(60, "x" * 60), (61, "x" * 59 + "\u2026"), (500, "x" * 59 + "\u2026")])
def test_a_long_value_is_cut(length, shown):
    assert differences({"n": "x" * length}, {"n": "y"}) == [f"n is {shown} there, y here"]


def test_at_most_six_differences_are_listed():
    phrases = [f"p{i}" for i in range(8)]
    assert listed(phrases[:6]) == "p0; p1; p2; p3; p4; p5" and listed(phrases) == listed(phrases[:6]) + "; and 2 more"
    assert listed(phrases[:7]) == listed(phrases[:6]) + "; and 1 more"


@pytest.mark.parametrize(
    ("own", "others", "said"),
    [
        ({}, [{"x": "1"}], "x is absent on rank 0, 1 on rank 1"),
        ({"x": "1"}, [{}], "x is 1 on rank 0, absent on rank 1"),
        ({"x": f"{MARK}a"}, [{}], "x of rank 1 is not rank 0's"),
        ({"x": f"{MARK}a"}, [{"x": f"{MARK}b"}] * 8, "x of ranks 1, 2, 3, 4, 5, 6 is not rank 0's"),
        ({"x": "1"}, [{"x": "2"}, {"x": "3"}], "x is 1 on rank 0, 2 on rank 1"),
        ({"x": "1", "y": "1"}, [{"y": "1"}, {"y": "3"}],
         "x is 1 on rank 0, absent on rank 1; y is 1 on rank 0, 3 on rank 2"),
        ({"x": "1"}, [{"x": "1"}, {"z": "1", "x": "1"}], "z is absent on rank 0, 1 on rank 2"),
    ],
)  # fmt: skip
def test_what_ranks_are_told(own, others, said, monkeypatch):
    monkeypatch.setattr(module.dist, "gather", lambda value: [value, *others])
    with pytest.raises(RankError) as error:
        require_same(own)
    assert str(error.value).split("same: ")[1] == said + "; give all of them the same arguments, files and versions"


# what a checkpoint's fingerprint is compared with


def saved(tmp_path, **state):
    return Checkpoint(tmp_path / "step-3", 3, False, {}, state)


def test_a_checkpoint_keeps_all_but_the_configuration_which_it_has_in_full(tmp_path):
    own = of()
    kept = resume.recorded(own)
    assert kept == {name: value for name, value in own.items() if not name.startswith("config.")}
    assert (
        resume.fingerprint_of(saved(tmp_path, fingerprint=kept, config=CONFIG)) == own
    )  # no configuration of ours: as it is
    assert resume.fingerprint_of(saved(tmp_path, fingerprint={"code.n": 3})) == {"code.n": "3"}
    assert resume.fingerprint_of(saved(tmp_path, fingerprint=["x"], config="y")) == {}


def test_a_saved_configuration_gets_the_defaults_that_have_come_since(tmp_path):
    least = {"model": {"llm": "l", "encoders": {"image": {"name": "v"}}}, "adapter": {"name": "mit", "layers": [1]}}
    least |= {"task": {"name": "answer"}, "data": {"name": "records", "root": "r"}, "train": {"steps": 2}}
    config = schema.from_dict(least).to_dict()
    older = json.loads(json.dumps(config))
    del older["train"]["hang_minutes"]
    assert resume.completed(older) == config != older
    assert resume.completed(None) == {} and resume.completed(CONFIG) is CONFIG


def test_the_same_run_goes_on_without_a_word(tmp_path, caplog):
    own = of()
    with caplog.at_level(logging.INFO):
        resume.compare(saved(tmp_path, fingerprint=resume.recorded(own), config=CONFIG), own, False)
        spread = {**CONFIG, "zero": 3, "kernels": {"gate": "x"}}
        there = saved(tmp_path, fingerprint=resume.recorded(own), config={**spread, "wandb": {"what": "p"}})
        resume.compare(there, own, False)
    assert caplog.messages == []


def test_what_decides_a_run_is_refused_without_the_word_and_named_with_it(tmp_path, caplog):
    own, there = of(), of([replace(SAMPLES[0], answer="dog"), *SAMPLES[1:]], base={"text": f"{MARK}bb"})
    found = saved(tmp_path, fingerprint=resume.recorded(there), config={**CONFIG, "seed": 5})
    named = "seed is 5 there, 0 here; data.train.answer differs; base.text differs"
    with pytest.raises(ConfigError) as error, caplog.at_level(logging.INFO):
        resume.compare(found, own, False)
    assert str(error.value) == (
        f"this is not the run that wrote {found.path}: {named}; undo that, start a new run, or go on all the same with"
        " --allow-changes"
    )
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING):
        resume.compare(found, own, True)
    assert caplog.messages == [f"going on from {found.path} with changes: {named}"]


def test_other_code_is_named_and_goes_on_and_what_was_not_recorded_is_refused(tmp_path, caplog):
    own = of()
    other = {**resume.recorded(own), "code.mitrain": "0.0"}
    with caplog.at_level(logging.WARNING):
        resume.compare(saved(tmp_path, fingerprint=other, config=CONFIG), own, False)
    path, here = tmp_path / "step-3", own["code.mitrain"]
    assert caplog.messages == [f"{path} was written by other code: code.mitrain is 0.0 there, {here} here"]
    with pytest.raises(ConfigError, match="data.train.samples is absent there, 3 here"):
        resume.compare(saved(tmp_path, config=CONFIG), own, False)


def test_what_another_rank_finds_changed_is_refused_here_too(tmp_path, monkeypatch):
    own, told = of(), []
    monkeypatch.setattr(
        resume.dist, "first_not_none", lambda value: told.append(value) or ["config.seed is 5 there, 0 here"]
    )
    with pytest.raises(ConfigError, match=": seed is 5 there, 0 here; undo"):
        resume.compare(saved(tmp_path, fingerprint=resume.recorded(own), config=CONFIG), own, False)
    assert told == [None]
