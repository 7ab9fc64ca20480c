"""The task caption: what it is trained on, what it says, and how pictures are scored."""

from dataclasses import replace

import pytest
import torch
from answers import FEATURES
from answers import make as make_answer
from modalities import pictures
from pydantic import ValidationError

from mitrain.core.errors import DataError
from mitrain.data.formats.captions import CaptionSample, with_captions
from mitrain.data.formats.records import AnswerSample
from mitrain.tasks import base
from mitrain.tasks.base import Batch, Splits
from mitrain.tasks.caption import CaptionConfig, CaptionTask
from mitrain.tasks.caption_metrics import caption_metrics

PICTURES = ["a.png", "b.png", "a.png", "c.png", "b.png"]
TEXTS = ["a red square", "this thing is blue", "red", "a green square", "blue square"]


def make(folder, **config):
    return CaptionTask(CaptionConfig(**{"template": "this picture is", **config}), make_answer(folder).parts).eval()


def samples():
    pairs = zip(PICTURES, TEXTS, strict=True)
    return with_captions([CaptionSample(str(i), {"image": image}, text, image) for i, (image, text) in enumerate(pairs)])


def batch(some=None):
    """Samples of one picture have its features."""
    some = samples() if some is None else some
    rows = torch.tensor([PICTURES.index(s.files) for s in some])
    return Batch(some, pictures(torch.cat([FEATURES, FEATURES.flip(1)])[rows]))


def test_the_loss_is_that_of_an_answer_behind_the_template(folder):
    task, answer = make(folder), make_answer(folder)
    asked = [AnswerSample(s.id, s.inputs, "this picture is", s.text) for s in samples()]
    one, other = task.loss(batch()), answer.loss(Batch(asked, batch().inputs))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and float(one[1]) > 5
    assert task.tokens(samples()) == answer.tokens(asked) and task.texts(samples(), True) == answer.texts(asked, False)


def test_every_picture_is_described_once_as_it_would_be_alone(folder, monkeypatch):
    task = make(folder, max_new_tokens=4)
    spoken, asked = task.spoken, []
    monkeypatch.setattr(task, "spoken", lambda some, inputs: asked.append(len(some)) or spoken(some, inputs))
    found = task.predict(batch())
    assert asked == [3] and found[0].values["predicted"] == found[2].values["predicted"]
    alone = [task.predict(batch([s]))[0].values["predicted"] for s in samples()]
    assert [p.values["predicted"] for p in found] == alone and len(set(alone)) > 1
    assert found[0].values["captions"] == ["a red square", "red"]
    other = Batch(samples(), pictures(torch.cat([FEATURES, FEATURES.flip(1)])[:5]))  # of one picture, but shown two
    assert len({p.values["predicted"] for p in task.predict(other)}) > 3
    without = task.predict(Batch(samples(), None))
    assert len({p.values["predicted"] for p in without}) == 1  # the picture alone makes a difference


def test_logits_that_are_no_numbers_are_reported_of_each_picture(folder):
    task, seen = make(folder), batch()
    seen.inputs.feature[[1, 4]] = torch.nan  # both of b.png
    assert [p.finite for p in task.predict(seen)] == [True, False, True, True, False]


def test_beams_and_their_length_reach_the_search(folder):
    assert make(folder).config.options() == {"max_new_tokens": 30, "num_beams": 1}
    wide = make(folder, max_new_tokens=3, beams=6, length_penalty=-2.0)
    assert wide.config.options() == {"max_new_tokens": 3, "num_beams": 6, "length_penalty": -2.0}
    said = [p.values["predicted"] for p in wide.predict(batch())]
    assert said == [wide.predict(batch([s]))[0].values["predicted"] for s in samples()]  # rows of beams keep their picture


def test_drawn_words_depend_on_the_samples_alone(folder):
    task = make(folder, temperature=5.0, max_new_tokens=6)
    torch.manual_seed(1)
    first, state = task.predict(batch()), torch.random.get_rng_state()
    torch.manual_seed(2)
    again = task.predict(batch())
    assert [p.values for p in first] == [p.values for p in again]
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())  # nothing else is drawn otherwise for it
    other = [replace(s, id=f"x{s.id}") for s in samples()]
    assert [p.values for p in task.predict(batch(other))] != [p.values for p in first]
    likeliest = make(folder, temperature=5.0, top_p=1e-6, max_new_tokens=6).predict(batch())
    assert [p.values for p in likeliest] == [p.values for p in make(folder, max_new_tokens=6).predict(batch())]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beams": 2, "temperature": 1.0}, "set one of them"),
        ({"top_p": 0.9}, "set temperature, too"),
        ({"length_penalty": 2.0}, "set beams, too"),
        ({"template": "a {text}"}, "this template has no field"),
        ({"template": "a } b"}, "this template has no field"),
    ],
)
def test_settings_that_would_not_act_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        CaptionConfig(**settings)


def test_pictures_are_scored_once_each_with_all_their_captions(folder):
    task = make(folder)
    said = {"a.png": "a red thing", "b.png": "blue square", "c.png": "a green square"}
    found = [replace(p, values={"predicted": said[p.inputs["image"]]}) for p in task.predict(batch())]
    expected = caption_metrics(list(said.values()), [[TEXTS[0], TEXTS[2]], [TEXTS[1], TEXTS[4]], [TEXTS[3]]])
    scores = task.score(samples(), found)
    counts = {"samples": 5, "images": 3, "captions": 5, "different": 1.0}
    assert scores == pytest.approx(expected | counts) and 0 < scores["rouge_l"] < 1
    part = task.score(samples()[:2], found[:2])  # of --samples: a.png still has both of its captions
    assert part["captions"] == 4 and part["images"] == 2


def test_baselines_say_what_training_said(folder):
    table = {"a.png": [1.0, 0.0], "b.png": [0.0, 1.0], "c.png": [0.1, 2.0]}
    train = [s for s in samples() if s.files != "c.png"]
    splits = Splits(samples()[3:], lambda: ([*train, replace(train[0], id="y")], []), lambda: [], None, 0)
    splits.features = lambda part: torch.tensor([table[s.files] for s in part])
    found = make(folder).baselines(splits)
    expected = [["a green square"], ["this thing is blue", "blue square"]]
    assert found["commonest caption"]["cider"] == caption_metrics(["a red square"] * 2, expected)["cider"]
    nearest = caption_metrics(["blue square"] * 2, expected)["cider"]
    assert found["caption of the nearest picture"]["cider"] == pytest.approx(nearest)


def test_captions_that_no_word_tells_apart_are_refused():
    same = with_captions([CaptionSample("0", {"image": "a.png"}, "red"), CaptionSample("1", {"image": "b.png"}, "red")])
    with pytest.raises(DataError, match="val: every picture has the same captions"):
        base.cautions(CaptionTask, same, "val")
    assert base.cautions(CaptionTask, samples(), "val") == []
