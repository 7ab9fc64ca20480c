"""Retrieval that starts from a BLIP checkpoint: before a step it scores as BLIP itself does."""

import logging

import pytest
import torch
from folders import llm_folder
from modalities import pictures
from safetensors.torch import load_file, save_file
from tiny_pair import aurora, blip, pixels
from transformers import AutoTokenizer, BlipForImageTextRetrieval

from mitrain.data.formats.captions import CaptionSample
from mitrain.data.hidden_states import TextStates
from mitrain.models import TextBackbone
from mitrain.models import blip as checkpoint
from mitrain.models.frozen import trunk_states
from mitrain.tasks.base import Batch, Parts
from mitrain.tasks.contrast import Everyone
from mitrain.tasks.retrieve import RetrieveConfig, RetrieveTask

TEXTS = ["a red square", "green on the left", "blue"]
OWN = {"readout": ("cls",), "dim": 8}  # as wide as the checkpoint's common space


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("blip")
    blip(torch.float32).save_pretrained(path)
    AutoTokenizer.from_pretrained(llm_folder(path / "llm")).save_pretrained(path)
    return path


def opened(folder, **settings) -> tuple[RetrieveTask, Batch]:
    """The task with an untrained Aurora on the checkpoint's encoders, and a batch of three pairs."""
    text = TextBackbone.load(folder, torch.float32)
    image = checkpoint.load(folder, "vision_model", torch.float32)
    adapter = aurora({"text": text.model, "encoder": image}, preset="released", rank=3, ice=False, dropout=0.0).eval()
    torch.manual_seed(0)
    parts = Parts(text, adapter, TextStates(text, 0, None))
    task = RetrieveTask(RetrieveConfig(**{**OWN, **settings}), parts, {"image": image.config.hidden_size}).eval()
    states = trunk_states(image, 0, pixel_values=pixels(3, torch.float32))
    feature = torch.zeros(3, image.config.hidden_size)
    samples = [CaptionSample(str(i), {"image": f"{i}.png"}, text, f"o{i}") for i, text in enumerate(TEXTS)]
    batch = Batch(samples, pictures(feature, states))
    task.fit(samples, lambda chosen: batch)
    return task, batch


def blips_own(folder, task) -> tuple[torch.Tensor, torch.Tensor]:
    """BLIP's cosines (3 pictures, 3 texts), and how likely its matching head finds each pair, [ENC] in its place."""
    model = BlipForImageTextRetrieval.from_pretrained(folder).eval()
    ids, mask = task.parts.text.pad([task._ids(text) for text in TEXTS])
    encoded = ids.clone()
    encoded[:, 0] = model.config.text_config.vocab_size - 1
    cosines, matched = [], []
    with torch.no_grad():
        for picture in pixels(3, torch.float32):
            shown = picture.expand(3, -1, -1, -1)
            cosines.append(model(ids, shown, attention_mask=mask, use_itm_head=False).itm_score[0])
            matched.append(model(encoded, shown, attention_mask=mask).itm_score.softmax(-1)[:, 1])
    return torch.stack(cosines), torch.stack(matched)


def test_before_a_step_the_scores_are_blips_own(folder):
    task, batch = opened(folder)
    cosines, matched = blips_own(folder, task)
    with torch.no_grad():
        found = task.file_vectors(batch.inputs) @ task.partner_vectors(TEXTS).T
        pairs = batch.inputs.rows(torch.arange(3).repeat_interleave(3))
        values = task.match_values(TEXTS * 3, pairs).view(3, 3)
    assert cosines.std() > 1e-3 and matched.std() > 1e-3
    torch.testing.assert_close(found, cosines, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values.sigmoid(), matched, rtol=1e-5, atol=1e-6)
    one = Batch(batch.samples[:1], batch.inputs.rows(slice(1)))
    expected = cosines[0] + matched[0].logit()
    torch.testing.assert_close(torch.tensor(task.fits(one, TEXTS)), expected, rtol=1e-4, atol=1e-5)


def test_the_matching_loss_of_such_a_start_is_that_of_the_matching_value_alone(folder):
    task, batch = opened(folder)
    with torch.no_grad():
        everyone = Everyone(
            task.file_vectors(batch.inputs), task.partner_vectors(TEXTS), batch, task.keys(batch.samples), True
        )
        text, image, known = everyone.hardest()
        picture = batch.inputs
        wrong = type(picture).joined([picture.rows(i.view(1)) for i in image])
        right = task.match_values(TEXTS, picture)
        other_text = task.match_values([TEXTS[i] for i in text], picture)
        other_image = task.match_values(TEXTS, wrong)
        losses = torch.nn.functional.softplus(other_text - right) + torch.nn.functional.softplus(other_image - right)
        found = task._matching(batch, everyone)
    assert float(found) == pytest.approx(float(0.5 * (losses * known).sum()), rel=1e-5)


def test_what_does_not_fit_or_is_not_wanted_starts_anew_and_is_reported(folder, caplog):
    for settings, told in (({"dim": 16}, True), ({"readout": ("mean",)}, True), ({"start": "fresh"}, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            task, _ = opened(folder, **settings)
        assert not task.own and not task.match.weight.any()
        assert ("task.dim=8" in caplog.text) == told


def test_a_checkpoint_of_another_task_has_no_maps_to_start_from(folder, tmp_path, caplog):
    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("itm_head")}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    task, _ = opened(tmp_path)
    assert not task.own and not task.match.weight.any()
