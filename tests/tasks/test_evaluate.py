"""Controls, the linear probe, figures: what an evaluation shows a model, and what it draws."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mitrain.cli import parser
from mitrain.core import dist
from mitrain.core.errors import ConfigError, DataError, UserError
from mitrain.data import figures
from mitrain.data.formats.labels import LabelSample
from mitrain.data.formats.records import AnswerSample
from mitrain.data.formats.refcoco import ReferSample
from mitrain.tasks.base import Batch, Prediction
from mitrain.tasks.probe import chosen_by_ridge, probe_answers
from mitrain.training.evaluate import CONTROLS, controlled, evaluate


def answers(count=12):
    return [
        AnswerSample(str(i), {"image": f"{i}.png"}, "p", "ab"[i % 2], ("a", "b"), "k", f"o{i // 2}") for i in range(count)
    ]


def expressions():
    names = ["frog", "boat", "rose", "drum"]
    return [
        ReferSample(f"{i}", {"image": f"scene{i // 2}.png"}, f"the {names[i % 4]}", (8, 8), None, names[i % 4])
        for i in range(8)
    ]


def images_of(*arguments):
    """`controlled`, with each sample's image in place of its inputs."""
    shown, inputs, extra = controlled(*arguments)
    return shown, [given["image"] for given in inputs], extra


class Echo:
    """A model that predicts what it was shown."""

    keeps, own_metric = "", None

    def __init__(self, shuffles):
        self.shuffles, self.task, self.blind = shuffles, self, []

    def evaluation_batch(self, samples, paths, images, blind=False):
        self.blind.append(blind)
        return Batch(list(zip(samples, paths, strict=True)), None)

    def order(self, samples):
        """Another one than the samples': predictions come back in theirs."""
        return sorted(range(len(samples)), key=lambda i: (i % 3, i))

    def must_generate(self, samples):
        return False

    def predict(self, batch):
        return [Prediction(s.id, path, {"text": getattr(s, "expression", s.id)}) for s, path in batch.samples]

    def score(self, samples, predictions):
        own = [p.inputs["image"] == s.inputs["image"] for s, p in zip(samples, predictions, strict=True)]
        return {"own image": sum(own), "samples": len(samples)}


@pytest.mark.parametrize(("control", "own"), [("none", 12), ("frozen", 12), ("other-inputs", 0), ("shuffle", 0)])
def test_controls_replace_the_image(control, own):
    model = Echo("samples")
    found = evaluate(model, None, answers(), control=control, batch=5)
    assert found.metrics["own image"] == own and found.metrics["control"] == control
    assert set(model.blind) == {control == "frozen"}
    assert sorted(p.inputs["image"] for p in found.predictions) == sorted(s.inputs["image"] for s in answers())


def test_scores_of_what_is_no_number_and_of_nothing_are_refused():
    model = Echo("samples")
    sound = model.predict
    model.predict = lambda batch: [replace(p, finite=p.id not in ("3", "7")) for p in sound(batch)]
    message = "val at step 7: 2 of 12 samples are scored with numbers that are not finite .*'3'.*lower train.lr"
    with pytest.raises(UserError, match=message):
        evaluate(model, None, answers(), batch=5, what="val at step 7")
    with pytest.raises(UserError, match="^evaluation: 2 of 12 samples"):
        evaluate(model, None, answers())
    with pytest.raises(DataError, match="^evaluation: there is no sample to score; give a split that has some$"):
        evaluate(model, None, [])


@pytest.mark.parametrize(("asked", "must"), [(False, False), (True, False), (False, True)])
def test_every_batch_is_generated_where_a_sample_of_the_split_needs_it(asked, must):
    model, seen = Echo("samples"), []
    sound = model.predict
    model.must_generate = lambda samples: must and len(samples) == 12
    model.predict = lambda batch, generate=False: seen.append(generate) or sound(batch)
    evaluate(model, None, answers(), batch=5, generate=asked)
    assert seen == [asked or must] * 3


def test_a_plain_evaluation_shows_each_sample_its_own_picture_in_batches_of_32():
    model, counts, handed = Echo("samples"), [], []
    sound = model.evaluation_batch
    model.evaluation_batch = lambda *a, **k: handed.append(a[2]) or sound(*a, **k)
    pictures = object()
    found = evaluate(model, pictures, answers(70), progress=counts.append)
    assert found.metrics == {"own image": 70, "samples": 70, "control": "none"}
    assert [p.id for p in found.predictions] == [s.id for s in answers(70)]
    assert counts == [32, 32, 6] and handed == [pictures] * 3


@pytest.mark.parametrize("seed", range(5))
def test_a_scene_with_another_reference_beside_it_is_no_other_scene(seed):
    """The control would show the decoder the true picture; without names nothing else keeps its expressions apart."""
    both = [replace(s, object="", expression=s.id, inputs={**s.inputs, "reference": f"{s.id}.png"}) for s in expressions()]
    _, shown, _ = images_of(both, "expressions", "other-inputs", seed)
    assert all(path != s.inputs["image"] for path, s in zip(shown, both, strict=True))
    swapped, _, _ = images_of(both, "expressions", "shuffle", seed)
    scenes = {s.expression: s.inputs["image"] for s in both}
    assert all(scenes[new.expression] != s.inputs["image"] for new, s in zip(swapped, both, strict=True))


@pytest.mark.parametrize("seed", [None, 0, 1, 5])
@pytest.mark.parametrize("shuffles", ["samples", "files"])
def test_a_control_is_drawn_from_the_seed_as_the_task_shuffles(seed, shuffles):
    given = {} if seed is None else {"seed": seed}
    found = evaluate(Echo(shuffles), None, answers(), control="shuffle", batch=12, **given)
    _, paths, clashes = images_of(answers(), shuffles, "shuffle", seed or 0)
    assert [p.inputs["image"] for p in found.predictions] == paths and found.metrics["control_clashes"] == clashes[
        "control_clashes"
    ]


@pytest.mark.parametrize(("world", "rank", "own"), [(2, 0, [0, 10]), (2, 1, [5, 5]), (3, 2, [10]), (4, 3, [0])])
def test_ranks_take_the_batches_in_turn_and_keep_those_of_their_own(monkeypatch, world, rank, own):
    """Three batches of 12 samples. A rank that has none, or no more, predicts another again and does not keep it."""
    model, gathered, counts = Echo("samples"), [], []
    sound = model.evaluation_batch
    model.order = lambda samples: range(len(samples))
    starts = []
    model.evaluation_batch = lambda samples, *a, **k: starts.append(int(samples[0].id)) or sound(samples, *a, **k)
    whole = {
        start: [Prediction(str(i), {"image": ""}, {}) for i in range(start, min(start + 5, 12))] for start in (0, 5, 10)
    }
    rounds = [len(range(0, 12, 5)[r::world]) for r in range(world)]

    def gather(value):
        gathered.append(value)
        return rounds if isinstance(value, int) else [value, whole]

    for name, value in (("rank", rank), ("world", world)):
        monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr(dist, "gather", gather)
    found = evaluate(model, None, answers(), batch=5, progress=counts.append)
    assert starts == own and list(gathered[1]) == list(range(0, 12, 5)[rank::world])
    assert counts == [min(5, 12 - start) for start in gathered[1]]
    assert [p.id for p in found.predictions] == [s.id for s in answers()]


def test_shuffling_does_not_look_at_objects_and_counts_what_stays_within_one():
    """Two pictures an object: over seeds a blind permutation gives some its object's other picture; other-inputs never."""
    own = {s.inputs["image"]: s.object for s in answers()}
    stayed = []
    for seed in range(10):
        _, paths, extra = images_of(answers(), "samples", "shuffle", seed)
        stayed.append(sum(own[path] == s.object for s, path in zip(answers(), paths, strict=True)))
        assert extra["control_clashes"] == {"object": stayed[-1]}
    assert max(stayed) > 0


def test_the_other_image_is_of_another_object():
    samples, paths, extra = images_of(answers(), "samples", "other-inputs", 0)
    objects = {s.inputs["image"]: s.object for s in answers()}
    assert all(objects[path] != s.object for s, path in zip(samples, paths, strict=True))
    assert extra["control_clashes"]["object"] == 0


def labelled(count=12):
    return [
        LabelSample(f"{i}", {"image": f"{i}.png"}, f"text {i // 3}", "ab"[i % 2], object=f"o{i // 3}") for i in range(count)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_other_text_is_another_objects_and_leaves_the_image(seed):
    shown, paths, extra = images_of(labelled(), "samples", "other-text", seed)
    assert paths == [s.inputs["image"] for s in labelled()]
    assert all(
        new == replace(old, text=new.text) and new.text != old.text for new, old in zip(shown, labelled(), strict=True)
    )
    assert sorted(s.text for s in shown) == sorted(s.text for s in labelled())
    assert extra["control_clashes"] == {"object": 0}


@pytest.mark.parametrize(
    ("samples", "shuffles"), [(answers(), "samples"), (expressions(), "expressions"), (labelled(), "files")]
)
def test_only_texts_beside_pictures_are_exchanged(samples, shuffles):
    with pytest.raises(ConfigError) as error:
        images_of(samples, shuffles, "other-text", 0)
    assert str(error.value) == (
        "the control other-text exchanges the texts that `classify` and `regress` read beside other inputs; this task"
        " has none: use shuffle or other-inputs"
    )


@pytest.mark.parametrize("control", CONTROLS)
def test_the_command_line_offers_every_control(control):
    assert parser().parse_args(["eval", "run", "--control", control]).control == control


@pytest.mark.parametrize("control", ["shuffle", "other-inputs"])
def test_all_samples_of_an_image_are_given_the_same_other_one_and_clashes_count_images(control):
    """Eight pictures of two samples each, two pictures an object."""
    samples = [AnswerSample(f"{i}", {"image": f"{i // 2}.png"}, "p", "a", (), "k", f"o{i // 4}") for i in range(16)]
    own, seen = {s.inputs["image"]: s.object for s in samples}, set()
    for seed in range(8):
        shown, paths, extra = images_of(samples, "files", control, seed)
        assert shown == samples and paths[::2] == paths[1::2] and sorted(paths[::2]) == sorted(own)
        assert all(path != s.inputs["image"] for s, path in zip(samples, paths, strict=True))
        same = sum(own[path] == s.object for s, path in zip(samples[::2], paths[::2], strict=True))
        assert extra == {"control_clashes": {"object": same}} and (control == "shuffle" or same == 0)
        seen.add(tuple(paths))
    assert len(seen) > 1


def test_samples_without_an_object_are_objects_of_their_own():
    samples = [replace(s, object="") for s in answers()]
    _, paths, extra = images_of(samples, "samples", "other-inputs", 0)
    assert extra == {"control_clashes": {"object": 0}} and sorted(paths) == sorted(s.inputs["image"] for s in samples)


@pytest.mark.parametrize(
    ("samples", "shuffles", "control"),
    [
        (answers(), "samples", "other-inputs"),
        (answers(), "files", "shuffle"),
        (expressions(), "expressions", "shuffle"),
        (labelled(), "samples", "other-text"),
    ],
)
def test_every_control_is_drawn_from_its_seed(samples, shuffles, control):
    drawn = [str(images_of(samples, shuffles, control, seed)) for seed in (*range(6), *range(6))]
    assert drawn[:6] == drawn[6:] and len(set(drawn)) > 1


def test_one_text_for_most_samples_cannot_be_exchanged():
    with pytest.raises(DataError) as error:
        images_of([replace(s, text="same") for s in labelled()], "samples", "other-text", 0)
    assert str(error.value) == (
        "the other-text control is impossible: one text makes up more than half of the 12 samples; evaluate more samples"
    )


def test_shuffled_expressions_name_nothing_of_the_scene():
    shown, paths, extra = images_of(expressions(), "expressions", "shuffle", 0)
    inside = {"scene0.png": {"frog", "boat"}, "scene2.png": {"frog", "boat"}}
    for original, changed, path in zip(expressions(), shown, paths, strict=True):
        assert path == original.inputs["image"] and changed == replace(original, expression=changed.expression)
        own = inside.get(path, {"rose", "drum"})
        assert not any(name in changed.expression for name in own)
    assert extra["control_clashes"]["named"] == 0


def test_shuffled_expressions_name_nothing_that_no_sample_asks_about():
    """The scene of sample 0 also holds a rose: of the other scenes' expressions only the drum is left for it."""
    samples = [
        replace(s, present=("boat", "frog", "rose")) if s.inputs["image"] == "scene0.png" else s for s in expressions()
    ]
    for seed in range(10):
        shown, _, extra = images_of(samples, "expressions", "shuffle", seed)
        assert {s.expression for s in shown if s.inputs["image"] == "scene0.png"} == {"the drum"}
        assert extra["control_clashes"]["named"] == 0


def test_the_probe_learns_separable_features_and_falls_back():
    generator = torch.Generator().manual_seed(0)
    train, val, test = ([replace(s, id=f"{part}{s.id}") for s in answers(40)] for part in "abc")
    centres = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 1.0])}
    table = {s.id: centres[s.answer] + 0.1 * torch.randn(2, generator=generator) for s in train + val + test}

    def features(samples):
        return torch.stack([table[s.id] for s in samples])

    assert probe_answers(features, train, val, test)[0] == {s.id: s.answer for s in test}
    single = [replace(s, answer="a") for s in train]
    assert set(probe_answers(features, single, val, test)[0].values()) == {"a"}
    assert set(probe_answers(features, [], [], test)[0].values()) == {""}
    unseen = [replace(s, answer=f"new {s.answer}") for s in val]  # as names of objects held out: no probe could say them
    said, chosen = probe_answers(features, train, unseen, test)
    assert set(said.values()) == {"a"} and set(chosen.values()) == {0.0}


def test_answers_that_training_never_gave_are_chosen_by_a_ridge_regression_to_their_words():
    """Features are the answer's vector turned by a right angle, and noise: what holds for some words holds for others."""
    generator = np.random.default_rng(0)
    vector_of = {f"word {i}": generator.normal(size=2) for i in range(40)}

    def asked(part, words, offered=()):
        return [replace(answers(1)[0], id=f"{part}{w}", answer=w, candidates=offered or words) for w in words]

    words = sorted(vector_of)
    train, val, test = asked("a", tuple(words[:30])), asked("b", tuple(words[30:34])), asked("c", tuple(words[34:]))
    turned = np.array([[0.0, 1.0], [-1.0, 0.0]])

    def features(samples):
        noise = 0.01 * generator.normal(size=(len(samples), 2))
        return torch.tensor(np.stack([vector_of[s.answer] @ turned for s in samples]) + noise)

    def vectors(texts):
        return np.stack([vector_of[text] for text in texts])

    def said(train, val, test):
        return chosen_by_ridge(features, vectors, lambda sample: sample.candidates, train, val, test)

    assert said(train, val, test) == {s.id: s.answer for s in test}
    exchanged = [replace(s, answer=other.answer) for s, other in zip(test, test[1:] + test[:1], strict=True)]
    assert sum(said(train, val, exchanged)[s.id] == s.answer for s in test) < 3, "it follows the features, not the order"
    nothing = [replace(s, candidates=()) for s in test[:2]]
    assert set(said(train, val, [*nothing, *test[2:]])) == {s.id for s in test[2:]}
    assert said(train, train[:4], test) == {}, "what training knows is the probe's"


def test_overlay_marks_the_mask_alone():
    picture = Image.new("RGB", (6, 4), (100, 100, 100))
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:5] = True
    pixels = np.asarray(figures.overlay(picture, mask)).astype(int)
    assert ((pixels[..., 0] - pixels[..., 1] > 50) == mask).all()
    edge = (np.asarray(figures.outlined(picture, mask)) == figures.OUTLINE).all(-1)
    assert (edge <= mask).all() and edge.sum() == 6


def test_a_sheet_holds_every_panel_and_shortens_text():
    panels = [figures.Panel(Image.new("RGB", (50, 30), (i * 20, 0, 0)), ["word " * 40, "b"], i % 2 == 0) for i in range(5)]
    sheet = figures.sheet(panels, columns=2, side=60)
    assert sheet.width == 2 * 68 + 8 and sheet.height == 3 * (60 + 2 * figures.LINE + 8 + 8) + 8
    corner = np.asarray(sheet)[8 + 30, 8 + 30]
    assert tuple(corner) == (0, 0, 0)
