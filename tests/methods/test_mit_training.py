"""Training: what is frozen stays so, the trunk saves nothing, checkpointing changes nothing but memory."""

from collections import Counter

import pytest
import torch
from tiny import CACHE, NAMES, features, scramble, text, tiny
from torch import nn
from transformers import DynamicCache, Trainer, TrainingArguments

import mitrain
from mitrain import MiTConfig
from mitrain.core.errors import ModelError


def attached(name="llama", dtype=torch.float64, **settings):
    model = tiny(name, dtype)
    mit = mitrain.attach(model, MiTConfig(**{"modalities": {"image": 6}, "layers": [2, 3], **settings}))
    scramble(mit)
    return model, mit


def loss_of(model, feature=None, **changes):
    inputs = {**text(padding="right"), **changes}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    feature = features() if feature is None else feature
    return model(**inputs, labels=labels, infused={"image": feature}).loss


def gradients(model, mit):
    mit.zero_grad()
    loss_of(model).backward()
    return {name: p.grad for name, p in mit.named_parameters()}


def frozen_state(model, mit):
    own = {id(p) for p in mit.parameters()}
    return {name: p.detach().clone() for name, p in model.named_parameters() if id(p) not in own}


# Frozen


def test_only_the_adapter_is_trainable_and_in_train_mode():
    model, mit = attached()
    model.train()
    own = set(mit.modules())
    assert mit.training and all(m.training == (m in own) for m in model.modules())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in mit.parameters()}
    model.eval()
    assert not any(m.training for m in model.modules())


def test_a_model_with_dropout_is_deterministic_while_it_trains():
    model = tiny("gpt_neox", hidden_dropout=0.5, attention_dropout=0.5)
    mitrain.attach(model, MiTConfig(modalities={"image": 6}, layers=[3]))
    model.train()
    assert torch.equal(loss_of(model), loss_of(model))


def test_the_first_step_from_the_identity_trains_the_maps_and_leaves_the_head_logits():
    model = tiny()
    mit = mitrain.attach(model, MiTConfig(modalities={"image": 6}, layers=[2, 3]))
    loss_of(model).backward()
    for name, parameter in mit.named_parameters():
        moved = parameter.grad.abs().max() > 0
        assert moved != name.endswith("head_logit"), name


# The keyword, the loop, the Trainer


def test_the_keyword_is_the_binding():
    model, mit = attached()
    inputs = text()
    with mit.bind({"image": features()}):
        bound = model(**inputs).logits
        unbound = model(**inputs, infused=None).logits  # the keyword speaks for its own call
        again = model(**inputs).logits
    assert torch.equal(model(**inputs, infused={"image": features()}).logits, bound) and torch.equal(again, bound)
    assert torch.equal(model(**inputs).logits, unbound) and not torch.equal(unbound, bound)
    base = model.model  # the decoder itself takes it too, when the adapter is attached to it
    mit.detach()
    mit.attach({"text": base})
    assert torch.equal(model.lm_head(base(**inputs, infused={"image": features()}).last_hidden_state), bound)


def test_an_error_inside_a_call_does_not_leave_features_behind():
    model, mit = attached()
    frozen = model(**text()).logits
    with pytest.raises(ModelError, match="unknown modality"):
        model(**text(), infused={"sound": features()})
    with pytest.raises(ModelError, match="batch has 3 rows"):
        model(**text(), infused={"image": features(rows=2)})
    with pytest.raises(ModelError, match="batch has 3 rows"), mit.bind({"image": features(rows=2)}):
        model(**text())
    assert torch.equal(model(**text()).logits, frozen)


def colours(rows, seed):
    """The last token tells which of two features came with the text: learnable through the infusion alone."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 2, (rows,), generator=generator)
    ids = torch.tensor([[5, 6, 7, 8]]).repeat(rows, 1)
    ids[:, -1] = 20 + kinds
    return ids, torch.stack([torch.ones(6), -torch.ones(6)])[kinds]


def test_a_plain_loop_learns_what_only_the_features_tell():
    model = tiny()
    mit = mitrain.attach(model, MiTConfig(modalities={"image": 6}, layers="last half"))
    optimizer = torch.optim.AdamW(mit.parameters(), lr=1e-2)
    ids, feature = colours(16, seed=0)
    losses = []
    for _ in range(40):
        logits = model(input_ids=ids, infused={"image": feature}).logits[:, -2]
        losses.append(nn.functional.cross_entropy(logits, ids[:, -1]))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 2 and losses[-1] < 0.1
    ids, feature = colours(16, seed=1)
    with torch.no_grad(), mit.bind({"image": feature}):
        assert (model(input_ids=ids).logits[:, -2].argmax(-1) == ids[:, -1]).all()


def collate(rows):
    return {
        "input_ids": torch.stack([ids for ids, _ in rows]),
        "labels": torch.stack([ids for ids, _ in rows]),
        "infused": {"image": torch.stack([feature for _, feature in rows])},
    }


def test_hugging_faces_trainer_trains_the_adapter_alone(tmp_path):
    model = tiny()
    mit = mitrain.attach(model, MiTConfig(modalities={"image": 6}, layers="last half"))
    before, start = frozen_state(model, mit), {n: p.detach().clone() for n, p in mit.named_parameters()}
    rows = list(zip(*colours(16, seed=0), strict=True))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        use_cpu=True,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        label_names=["labels"],
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * first
    assert all(torch.equal(value, before[name]) for name, value in frozen_state(model, mit).items())
    assert all(not torch.equal(p, start[n]) for n, p in mit.named_parameters())


# The frozen trunk


def saved_by_layer(model, mit):
    """How many tensors autograd keeps for backward, by the layer that runs; -1 before the layers, 9 after them."""
    now, saved = [-1], Counter()
    handles = []
    for index, layer in enumerate(model.model.layers):
        handles.append(layer.register_forward_pre_hook(lambda *_, i=index: now.__setitem__(0, i)))
        handles.append(layer.register_forward_hook(lambda *_: now.__setitem__(0, 9)))

    def pack(tensor):
        saved[now[0]] += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model)
    for handle in handles:
        handle.remove()
    return saved, loss


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_trunk_below_the_first_infused_layer_saves_nothing(checkpointing, mode):
    model, mit = attached(layers=[2])
    mit.set_checkpointing(checkpointing)
    getattr(model, mode)()
    saved, loss = saved_by_layer(model, mit)
    assert not saved[-1] and not saved[0] and not saved[1]
    assert saved[3] > 0 and saved[9] > 0  # the layer above passes gradients down, and so does the head
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in mit.parameters())


def test_checkpointing_keeps_less_for_backward():
    model, mit = attached(layers=[2, 3])
    plain, _ = saved_by_layer(model, mit)
    mit.set_checkpointing(True)
    frugal, _ = saved_by_layer(model, mit)
    assert plain[2] > 10_000 and frugal[2] + frugal[3] < 0.1 * (plain[2] + plain[3])


# Checkpointing


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [{}, {"rank": 2, "gate": "sequence"}, {"gate": "token"}])
def test_checkpointing_gives_the_same_gradients(name, settings):
    model, mit = attached(name, torch.float32 if name == "gemma2" else torch.float64, layers=[1, 3], **settings)
    expected = gradients(model, mit)
    mit.set_checkpointing(True)
    for parameter, gradient in gradients(model, mit).items():
        assert torch.equal(gradient, expected[parameter]), parameter


def test_each_recomputation_sees_the_features_of_its_own_forward_pass():
    model, mit = attached()
    expected = {}
    for checkpointing in (False, True):
        mit.set_checkpointing(checkpointing)
        mit.zero_grad()
        losses = []
        for seed in (4, 5):
            feature = features(seed=seed).double().requires_grad_()
            with mit.bind({"image": feature}):
                losses.append(model(**text(), labels=text()["input_ids"]).loss)
        loss_of(model, feature=(features(), torch.tensor([True, False, True])))  # a pass without a backward in between
        sum(losses).backward()
        found = {name: p.grad for name, p in mit.named_parameters()} | {"feature": feature.grad}
        expected = expected or found
        assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())


def test_a_checkpointed_layer_is_transparent():
    model, mit = attached("gemma3")
    layers, names = list(model.model.layers), set(model.state_dict())
    inputs = text()
    plain = model(**inputs, output_hidden_states=True, infused={"image": features()})
    mit.set_checkpointing(True)
    assert model.model.layers[2] is not layers[2] and model.model.layers[0] is layers[0]
    assert model.model.layers[2].self_attn is layers[2].self_attn
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = model.model.layers[2].nothing
    wrapped = model(**inputs, output_hidden_states=True, infused={"image": features()})
    assert wrapped.past_key_values is None  # nothing could be kept in it: the second computation would fill it again
    for one, other in zip(plain.hidden_states, wrapped.hidden_states, strict=True):
        assert torch.equal(one, other)
    with torch.no_grad(), mit.bind({"image": features()}):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    mit.detach()
    assert list(model.model.layers) == layers and not names & {n for n in model.state_dict() if ".layer." in n}


def test_checkpointing_refuses_a_cache():
    model, mit = attached()
    mit.set_checkpointing(True)
    with pytest.raises(ModelError, match="checkpointing cannot fill a KV cache"):
        loss_of(model, **{CACHE: DynamicCache()})


def test_attach_with_checkpointing():
    model, other = tiny(), tiny()
    mit = mitrain.MiTConfig(modalities={"image": 6}, layers=[3])
    adapter = mitrain.methods.build(mit)
    adapter.attach({"text": model}, checkpoint=True)
    assert type(model.model.layers[3]).__name__ == "CheckpointedLayer"
    adapter.detach()
    assert type(model.model.layers[3]) is type(other.model.layers[3])
