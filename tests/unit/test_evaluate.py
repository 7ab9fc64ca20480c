"""Controls, the linear probe, figures: what an evaluation shows a model, and what it draws."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mitrain import figures
from mitrain.cli import parser
from mitrain.data.labels import LabelSample
from mitrain.data.records import AnswerSample
from mitrain.data.refcoco import ReferSample
from mitrain.errors import ConfigError, DataError, UserError
from mitrain.evaluate import CONTROLS, controlled, evaluate
from mitrain.probe import probe_accuracy
from mitrain.tasks.base import Batch, Prediction


def answers(count=12):
    return [AnswerSample(str(i), f"{i}.png", "p", "ab"[i % 2], ("a", "b"), "k", f"o{i // 2}") for i in range(count)]


def expressions():
    names = ["frog", "boat", "rose", "drum"]
    return [
        ReferSample(f"{i}", f"scene{i // 2}.png", f"the {names[i % 4]}", (8, 8), None, names[i % 4]) for i in range(8)
    ]


class Echo:
    """A model that predicts what it was shown."""

    def __init__(self, shuffles):
        self.shuffles, self.task, self.blind = shuffles, self, []

    def evaluation_batch(self, samples, paths, images, blind=False):
        self.blind.append(blind)
        return Batch(list(zip(samples, paths, strict=True)), None)

    def must_generate(self, samples):
        return False

    def predict(self, batch):
        return [Prediction(s.id, path, {"text": getattr(s, "expression", s.id)}) for s, path in batch.samples]

    def score(self, samples, predictions):
        own = [p.image == s.image for s, p in zip(samples, predictions, strict=True)]
        return {"own image": sum(own), "samples": len(samples)}


@pytest.mark.parametrize(("control", "own"), [("none", 12), ("frozen", 12), ("no-image", 0), ("shuffle", 0)])
def test_controls_replace_the_image(control, own):
    model = Echo("samples")
    found = evaluate(model, None, answers(), control=control, batch=5)
    assert found.metrics["own image"] == own and found.metrics["control"] == control
    assert set(model.blind) == {control == "frozen"}
    assert sorted(p.image for p in found.predictions) == sorted(s.image for s in answers())


def test_scores_of_what_is_no_number_and_of_nothing_are_refused():
    model = Echo("samples")
    sound = model.predict
    model.predict = lambda batch: [replace(p, finite=p.id not in ("3", "7")) for p in sound(batch)]
    message = "val at step 7: 2 of 12 samples are scored with numbers that are not finite .*'3'.*lower train.lr"
    with pytest.raises(UserError, match=message):
        evaluate(model, None, answers(), batch=5, what="val at step 7")
    with pytest.raises(DataError, match="no sample to score"):
        evaluate(model, None, [])


@pytest.mark.parametrize(("asked", "must"), [(False, False), (True, False), (False, True)])
def test_every_batch_is_generated_where_a_sample_of_the_split_needs_it(asked, must):
    model, seen = Echo("samples"), []
    sound = model.predict
    model.must_generate = lambda samples: must and len(samples) == 12
    model.predict = lambda batch, generate=False: seen.append(generate) or sound(batch)
    evaluate(model, None, answers(), batch=5, generate=asked)
    assert seen == [asked or must] * 3


def test_shuffling_does_not_look_at_objects_and_counts_what_stays_within_one():
    """Two pictures an object: over seeds a blind permutation gives some sample its object's other picture, no-image none."""
    own = {s.image: s.object for s in answers()}
    stayed = []
    for seed in range(10):
        _, paths, extra = controlled(answers(), "samples", "shuffle", seed)
        stayed.append(sum(own[path] == s.object for s, path in zip(answers(), paths, strict=True)))
        assert extra["control_clashes"] == {"object": stayed[-1]}
    assert max(stayed) > 0


def test_the_other_image_is_of_another_object():
    samples, paths, extra = controlled(answers(), "samples", "no-image", 0)
    objects = {s.image: s.object for s in answers()}
    assert all(objects[path] != s.object for s, path in zip(samples, paths, strict=True))
    assert extra["control_clashes"]["object"] == 0


def labelled(count=12):
    return [LabelSample(f"{i}", f"{i}.png", f"text {i // 3}", "ab"[i % 2], object=f"o{i // 3}") for i in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_the_other_text_is_another_objects_and_leaves_the_image(seed):
    shown, paths, extra = controlled(labelled(), "samples", "other-text", seed)
    assert paths == [s.image for s in labelled()]
    assert all(
        new == replace(old, text=new.text) and new.text != old.text for new, old in zip(shown, labelled(), strict=True)
    )
    assert sorted(s.text for s in shown) == sorted(s.text for s in labelled())
    assert extra["control_clashes"] == {"object": 0}


@pytest.mark.parametrize(
    ("samples", "shuffles"), [(answers(), "samples"), (expressions(), "expressions"), (labelled(), "images")]
)
def test_only_texts_beside_pictures_are_exchanged(samples, shuffles):
    with pytest.raises(ConfigError, match="use shuffle or no-image"):
        controlled(samples, shuffles, "other-text", 0)


@pytest.mark.parametrize("control", CONTROLS)
def test_the_command_line_offers_every_control(control):
    assert parser().parse_args(["eval", "run", "--control", control]).control == control


def test_shuffled_expressions_name_nothing_of_the_scene():
    shown, paths, extra = controlled(expressions(), "expressions", "shuffle", 0)
    inside = {"scene0.png": {"frog", "boat"}, "scene2.png": {"frog", "boat"}}
    for original, changed, path in zip(expressions(), shown, paths, strict=True):
        assert path == original.image and changed == replace(original, expression=changed.expression)
        own = inside.get(path, {"rose", "drum"})
        assert not any(name in changed.expression for name in own)
    assert extra["control_clashes"]["named"] == 0


def test_shuffled_expressions_name_nothing_that_no_sample_asks_about():
    """The scene of sample 0 also holds a rose: of the other scenes' expressions only the drum is left for it."""
    samples = [replace(s, present=("boat", "frog", "rose")) if s.image == "scene0.png" else s for s in expressions()]
    for seed in range(10):
        shown, _, extra = controlled(samples, "expressions", "shuffle", seed)
        assert {s.expression for s in shown if s.image == "scene0.png"} == {"the drum"}
        assert extra["control_clashes"]["named"] == 0


def test_the_probe_learns_separable_features_and_falls_back():
    generator = torch.Generator().manual_seed(0)
    train, val, test = ([replace(s, id=f"{part}{s.id}") for s in answers(40)] for part in "abc")
    centres = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 1.0])}
    table = {s.id: centres[s.answer] + 0.1 * torch.randn(2, generator=generator) for s in train + val + test}

    def features(samples):
        return torch.stack([table[s.id] for s in samples])

    assert probe_accuracy(features, train, val, test)["accuracy"] == 1.0
    single = [replace(s, answer="a") for s in train]
    assert probe_accuracy(features, single, val, test)["accuracy"] == 0.5
    assert probe_accuracy(features, [], [], test)["accuracy"] == 0.0


def test_overlay_marks_the_mask_alone():
    picture = Image.new("RGB", (6, 4), (100, 100, 100))
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:5] = True
    pixels = np.asarray(figures.overlay(picture, mask)).astype(int)
    assert ((pixels[..., 0] - pixels[..., 1] > 50) == mask).all()
    edge = (np.asarray(figures.outlined(picture, mask)) == figures.OUTLINE).all(-1)
    assert (edge <= mask).all() and edge.sum() == 6


def test_a_sheet_holds_every_panel_and_shortens_text():
    panels = [
        figures.Panel(Image.new("RGB", (50, 30), (i * 20, 0, 0)), ["word " * 40, "b"], i % 2 == 0) for i in range(5)
    ]
    sheet = figures.sheet(panels, columns=2, side=60)
    assert sheet.width == 2 * 68 + 8 and sheet.height == 3 * (60 + 2 * figures.LINE + 8 + 8) + 8
    corner = np.asarray(sheet)[8 + 30, 8 + 30]
    assert tuple(corner) == (0, 0, 0)
