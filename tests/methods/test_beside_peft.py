"""An adapter beside a user's own LoRA, on the ``PeftModel`` that PEFT made around the language model."""

import logging
import warnings

import pytest
import torch
from folders import llm_folder
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import scramble, tiny
from transformers import AutoModelForCausalLM

import mitrain
from mitrain.core.errors import ModelError

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
FEATURES = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
CONFIG = mitrain.MiTConfig(modalities={"image": 6}, layers=[1])


def with_lora(model, spread=0.3):
    """A PeftModel around ``model`` whose LoRA is not the identity."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return wrapped.eval()


def lora_of(model):
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


@torch.no_grad()
def test_the_lora_stays_in_effect_and_the_model_is_as_it_was_after_detaching():
    model, plain = with_lora(tiny()), tiny()
    alone = model(IDS).logits
    mit = mitrain.attach(model, CONFIG)
    scramble(mit)
    shown = model(input_ids=IDS, infused={"image": FEATURES}).logits
    assert torch.equal(model(IDS).logits, alone) and not torch.allclose(alone, plain(IDS).logits, atol=1e-3)
    with mit.bind({"image": FEATURES}):
        assert torch.equal(model(IDS).logits, shown)
        said = model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
        assert torch.equal(said[:, 4], shown[:, -1].argmax(-1))
    with model.disable_adapter():
        mitrain.attach(plain, CONFIG).load_state_dict(mit.state_dict())
        found = model(IDS, infused={"image": FEATURES}).logits
        assert torch.equal(found, plain(IDS, infused={"image": FEATURES}).logits)
    assert not torch.allclose(found, shown, atol=1e-3)
    mit.detach()
    assert torch.equal(model(IDS).logits, alone) and all(p.requires_grad for p in lora_of(model))


def test_what_was_to_be_trained_is_frozen_with_a_line_and_can_be_trained_beside(caplog):
    model = with_lora(tiny())
    mit = mitrain.attach(model, CONFIG)
    (line,) = caplog.messages
    assert line.startswith("mit froze 16 tensors that were to be trained (model.layers.0.self_attn.q_proj.lora_A")
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in mit.parameters()}
    for parameter in lora_of(model):
        parameter.requires_grad_(True)
    model(input_ids=IDS, labels=IDS, infused={"image": FEATURES}).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() for p in (*mit.infused["1"].maps.parameters(), *lora_of(model)))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        mitrain.attach(tiny(), CONFIG)
        mitrain.attach(tiny().requires_grad_(False), CONFIG)
    assert not caplog.messages  # a model as transformers loads it, and a frozen one


def test_neither_saving_nor_features_are_lost_in_silence(tmp_path):
    model = with_lora(tiny())
    with pytest.raises(ModelError, match="called with infused=, which nothing reads"):
        model(IDS, infused={"image": FEATURES})
    mit = mitrain.attach(model, CONFIG)
    for part in (model, model.base_model, model.get_base_model()):
        with pytest.raises(ModelError, match="has a mit adapter attached, which save_pretrained"):
            part.save_pretrained(tmp_path / "saved")
    mit.detach()
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()


def test_vectors_before_the_text_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ModelError, match=r"puts trained vectors before the text \(PROMPT_TUNING\)"):
        mitrain.attach(model, CONFIG)


def test_a_saved_adapter_knows_the_base_and_the_lora_that_it_was_trained_on(tmp_path, caplog):
    folder = llm_folder(tmp_path / "llm", layers=2)
    read = lambda name=folder: AutoModelForCausalLM.from_pretrained(name).eval()  # noqa: E731
    mit = mitrain.attach(model := with_lora(read()), CONFIG)
    scramble(mit)
    mit.save_pretrained(tmp_path / "mit")
    expected = model(IDS, infused={"image": FEATURES}).logits
    caplog.clear()
    mitrain.load_adapter(again := with_lora(read()), tmp_path / "mit")
    assert torch.equal(again(IDS, infused={"image": FEATURES}).logits, expected)
    for other in (read(), with_lora(read(), spread=0.2)):
        with pytest.raises(ModelError, match=r"was trained on \(text\.peft "):
            mitrain.load_adapter(other, tmp_path / "mit")
    scramble(changed := read())
    changed.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=r"was trained on \(text\.weights differs"):
        mitrain.load_adapter(with_lora(read(tmp_path / "other")), tmp_path / "mit")
    again.mit.detach()
    mitrain.load_adapter(read(), tmp_path / "mit", allow_changes=True)
    assert "was trained on other frozen models: text.peft is a digest there, absent here" in caplog.text
