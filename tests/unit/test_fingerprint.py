"""What two processes, or a run and its checkpoint, must have in common."""

import json
from dataclasses import replace

import pytest

from mitrain import fingerprint as module
from mitrain.data.records import AnswerSample
from mitrain.data.refcoco import ReferSample
from mitrain.errors import RankError
from mitrain.fingerprint import MARK, differences, digest, fingerprint, flat, listed, require_same

SAMPLES = [AnswerSample(f"s{i}", f"{i}.png", "What is it?", "cat", ("cat", "dog")) for i in range(3)]
CONFIG = {"seed": 0, "train": {"lr": 1e-3, "steps": 10}, "model": {"vision": [{"name": "v"}]}, "wandb": {}}
BASE = {"text": f"{MARK}aa"}


def of(samples=SAMPLES, config=CONFIG, content=str.upper, base=BASE):
    return fingerprint(config, {"train": samples}, content, base)


def test_the_same_run_has_the_same_fingerprint_also_after_json():
    assert json.loads(json.dumps(of())) == of()
    assert differences(of(), of()) == []


def test_every_field_of_a_sample_and_the_content_of_its_picture_counts():
    for field, value in [
        ("id", "other"),
        ("image", "other.png"),
        ("prompt", "Which?"),
        ("answer", "dog"),
        ("candidates", ("dog", "cat")),
        ("kind", "k"),
        ("object", "o"),
    ]:
        changed = [*SAMPLES[:2], replace(SAMPLES[2], **{field: value})]
        expected = [f"data.train.{field} differs"] + ["data.train.pictures differs"] * (field == "image")
        assert differences(of(), of(changed)) == expected
    assert differences(of(), of(content=str.lower)) == ["data.train.pictures differs"]


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
        return [ReferSample("a", "a.png", "the dog", (2, 2), {"size": [2, 2], "counts": counts})]

    assert differences(of(refer(b"04")), of(refer(b"13"))) == ["data.train.segmentation differs"]


def test_configuration_names_its_keys_and_values():
    other = {**CONFIG, "train": {"lr": 0.5, "steps": 10}, "wandb": {"project": "p"}}
    assert differences(of(), of(config=other), ignoring=["config.wandb"]) == [
        "config.train.lr is 0.001 there, 0.5 here"
    ]
    assert 'config.wandb.project is absent there, "p" here' in differences(of(), of(config=other))
    assert flat(CONFIG)["model.vision"] == '[{"name": "v"}]'


def test_ignoring_a_section_does_not_ignore_what_begins_alike():
    there, here = of(config={"zero": 1}), of(config={"zeroed": 1})
    assert len(differences(there, here, ignoring=["config.zero"])) == 1


def test_frozen_weights_and_code_are_parts():
    assert differences(of(), of(base={"text": f"{MARK}bb"})) == ["base.text differs"]
    assert differences(of(), of(base={})) == ["base.text is a digest there, absent here"]
    assert of()["code.sources"].startswith(MARK) and of()["code.mitrain"]


def test_a_message_is_bounded():
    phrases = [f"p{i}" for i in range(9)]
    assert listed(phrases, 2) == "p0; p1; and 7 more" and listed(phrases[:2], 2) == "p0; p1"
    (long,) = differences({"config.name": "x" * 500}, {"config.name": "y" * 500})
    assert len(long) < 200


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
