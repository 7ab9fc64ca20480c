"""Hugging Face's Trainer with AdapterCallback: small checkpoints, and a killed run that is resumed as if it had gone on."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_beside_peft import lora_of, with_lora
from tiny import VOCABULARY, scramble, tiny
from transformers import Trainer, TrainerCallback, TrainingArguments

import mitrain
from mitrain.core.errors import CheckpointError, ModelError

ROWS = 12


def attached(lora=False, layers=(2, 3)):
    model = with_lora(tiny()) if lora else tiny()
    mit = mitrain.attach(model, mitrain.MiTConfig(modalities={"image": 6}, layers=list(layers)))
    scramble(mit)
    for parameter in lora_of(model):
        parameter.requires_grad_(True)
    return model, mit


def collate(rows):
    ids = torch.stack([row["ids"] for row in rows])
    return {"input_ids": ids, "labels": ids, "infused": {"image": torch.stack([row["image"] for row in rows])}}


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed


def trainer(model, folder, *callbacks, **changes):
    draw = torch.Generator().manual_seed(0)
    rows = [
        {"ids": torch.randint(3, VOCABULARY, (5,), generator=draw), "image": torch.randn(6, generator=draw)}
        for _ in range(ROWS)
    ]
    options = {"output_dir": str(folder), "max_steps": 5, "save_steps": 2, "save_strategy": "steps", **changes}
    arguments = TrainingArguments(
        **options,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        label_names=["labels"],
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collate,
        callbacks=list(callbacks),
    )


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora", [False, True])
def test_a_killed_run_goes_on_from_a_checkpoint_of_the_adapter_alone(tmp_path, caplog, lora):
    straight, mit = attached(lora)
    trainer(straight, tmp_path / "straight", mitrain.AdapterCallback()).train()
    killed, _ = attached(lora)
    with pytest.raises(Killed):
        trainer(killed, tmp_path / "killed", mitrain.AdapterCallback(), KillAt(3)).train()
    saved = tmp_path / "killed" / "checkpoint-2"
    held = load_file(saved / "model.safetensors")
    assert held.keys() == trained(straight).keys()
    assert any("mit.infused" in name for name in held) and any("lora" in name for name in held) == lora
    assert not (saved / "config.json").exists()
    resumed, again = attached(lora)
    scramble(again, seed=9)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="transformers"):
        trainer(resumed, tmp_path / "killed", mitrain.AdapterCallback()).train(resume_from_checkpoint=str(saved))
    assert "missing keys" not in caplog.text
    expected, found = trained(straight), trained(resumed)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any(torch.equal(held[name], expected[name]) for name in expected)
    mit.save_pretrained(tmp_path / "adapter")
    mit.detach()
    straight.save_pretrained(tmp_path / "whole")  # as it was
    assert (tmp_path / "whole" / ("adapter_config.json" if lora else "config.json")).exists()


def test_the_best_model_comes_back(tmp_path):
    model, mit = attached()
    changes = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    run = trainer(model, tmp_path, mitrain.AdapterCallback(), metric_for_best_model="loss", **changes)
    run.train()
    best = load_file(Path(run.state.best_model_checkpoint) / "model.safetensors")
    assert all(torch.equal(tensor, best[f"mit.{name}"]) for name, tensor in mit.state_dict().items())


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    model, _ = attached(layers=(3,))
    trainer(model, tmp_path, mitrain.AdapterCallback(), max_steps=2).train()
    for layers, first, count in (((2, 3), 2, 9), ((0,), 0, 18)):
        with pytest.raises(CheckpointError, match=rf"here differ in {count} tensors \(mit.infused.{first}.head_logit"):
            other, _ = attached(layers=layers)
            trainer(other, tmp_path, mitrain.AdapterCallback()).train(resume_from_checkpoint=True)
    trainer(more := attached()[0], tmp_path / "more", mitrain.AdapterCallback(), max_steps=2).train()
    with pytest.raises(CheckpointError, match=r"here differ in 9 tensors \(mit.infused.2.head_logit"):
        more.load_state_dict(load_file(tmp_path / "checkpoint-2" / "model.safetensors"), strict=False)
    with pytest.raises(CheckpointError, match=r"here differ in 9 tensors \(mit.infused.2.head_logit"):
        run = trainer(attached(layers=(3,))[0], tmp_path / "more", mitrain.AdapterCallback())
        run.train(resume_from_checkpoint=True)
    held = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    wrong = {name: tensor[..., :1].contiguous() for name, tensor in held.items()}
    save_file(wrong, tmp_path / "checkpoint-2" / "model.safetensors")
    with pytest.raises(RuntimeError, match="size mismatch"):
        trainer(attached(layers=(3,))[0], tmp_path, mitrain.AdapterCallback()).train(resume_from_checkpoint=True)


def test_misuse_is_said(tmp_path):
    with pytest.raises(ModelError, match="no adapter is attached to this LlamaForCausalLM"):
        trainer(tiny(), tmp_path, mitrain.AdapterCallback())
    model, _ = attached()
    late = trainer(model, tmp_path)
    late.add_callback(mitrain.AdapterCallback())
    with pytest.raises(ModelError, match="give AdapterCallback to the Trainer itself"):
        late.train()
    with pytest.raises(ModelError, match="has a mit adapter attached, which save_pretrained"):
        trainer(model, tmp_path / "without").train()
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(ModelError, match="brings no best model back to PEFT's"):
        trainer(attached(lora=True)[0], tmp_path, mitrain.AdapterCallback(), **best)
