"""Quantised models: what is replaced, what it costs while it happens, and that MiT trains on them as on float ones."""

import pytest
import torch
from dequantised import dequantised
from refusals import read_or_refused
from tiny import features, scramble, text, tiny
from torch import nn
from tracked import Tracked

from mitrain import MiTConfig, attach
from mitrain.core.errors import ConfigError, ModelError
from mitrain.models import loading, quant
from mitrain.models.quant import FrozenInt8Embedding, FrozenInt8Linear, FrozenNF4Linear, formats

LOW = quant.PRECISIONS[1:]


def frozen(name: str = "llama", **changes: object):
    model = tiny(name, **changes)
    loading.freeze(model)
    return model


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox", "gemma"])
def test_the_layers_matrices_are_replaced_under_their_names(name, precision):
    before, after = frozen(name), quant.quantise(frozen(name), precision)
    linears = {n for n, m in before.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
    kind = FrozenNF4Linear if precision == "nf4" else FrozenInt8Linear
    assert {n for n, m in after.named_modules() if type(m) is kind} == linears
    assert [n for n, _ in before.named_modules()] == [n for n, _ in after.named_modules()]
    steps = "absmax" if precision == "nf4" else "scale"
    names = {f"{n}.{part}" for n in linears for part in ("qweight", steps)}
    assert set(after.state_dict()) == set(before.state_dict()) - {f"{n}.weight" for n in linears} | names
    assert not any(p.requires_grad for p in after.parameters())
    inputs = text()
    with torch.no_grad():
        truth = dequantised(after)(**inputs).logits
        found = after(**inputs).logits
    if precision != "int8-activations":
        torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-4 * float(truth.abs().max()))


def test_trainable_layers_stay():
    model = frozen()
    model.model.layers[1].self_attn.q_proj.requires_grad_(True)
    quant.quantise(model, "int8")
    kinds = {n: type(m) for n, m in model.named_modules() if n.endswith("_proj")}
    assert [n for n, kind in kinds.items() if kind is nn.Linear] == ["model.layers.1.self_attn.q_proj"]


def test_refusals_are_one_line():
    for call, kind in (
        (lambda: quant.quantise(tiny(), "int8"), ModelError),  # not frozen
        (lambda: quant.quantise(frozen(), "int3"), ConfigError),
        (lambda: quant.quantise(frozen("gemma3"), "int8", embedding=True), ModelError),  # a scaled embedding
    ):
        assert read_or_refused(call, kind) is None


def test_one_matrix_is_held_twice_at_a_time(monkeypatch):
    """Above what is there: all payloads so far, and pieces of one matrix in fp32 (the old ones are freed unseen)."""
    monkeypatch.setattr(formats, "PIECE", 2048)
    model = frozen(hidden_size=128, intermediate_size=512, num_hidden_layers=3)
    expected = quant.bytes_in([ref.module.weight for ref in quant.linear_refs(model)], "int8")
    with Tracked() as found:
        quant.quantise(model, "int8")
    assert found.live == expected
    assert found.peak <= found.live + 6 * 4 * 2048 < found.live + 4 * 128 * 512


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("embedding", [False, True])
def test_bytes_are_what_the_arithmetic_says(precision, embedding):
    model = frozen(tie_word_embeddings=embedding)
    layers = [ref.module.weight for ref in quant.linear_refs(model)]
    table = [model.get_input_embeddings().weight] if embedding else []
    rest = 4 * (loading.count_parameters(model) - sum(weight.numel() for weight in (*layers, *table)))
    expected = quant.bytes_in(layers, quant.storage(precision)) + quant.bytes_in(table, "int8") + rest
    quant.quantise(model, precision, embedding=embedding)
    held = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    assert sum(held.values()) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_shares_the_embeddings_payload(dtype):
    model = quant.quantise(frozen(tie_word_embeddings=True, dtype=dtype), "int8", embedding=True)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(table) is FrozenInt8Embedding and type(head) is FrozenInt8Linear
    assert head.qweight is table.qweight and head.scale is table.scale
    ids = text()["input_ids"]
    assert table(ids).dtype == dtype
    torch.testing.assert_close(table(ids), table.dense(dtype)[ids], rtol=0, atol=0)
    logits = model(**text()).logits
    assert logits.dtype == dtype and logits.isfinite().all()


def test_an_untied_head_stays():
    model = quant.quantise(frozen(tie_word_embeddings=False), "int8", embedding=True)
    assert type(model.get_output_embeddings()) is nn.Linear


def test_only_the_rows_looked_up_become_floats():
    table = FrozenInt8Embedding.of(nn.Embedding(10_000, 16))
    with Tracked() as found:
        table(torch.tensor([[3, 9_999]]))
    assert found.peak < 1000


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_mit_starts_as_the_quantised_frozen_model(name, precision):
    model = quant.quantise(frozen(name), precision)
    with torch.no_grad():
        plain = model(**text()).logits
        attach(model, MiTConfig(modalities={"image": 6}, layers=[1, 3], init="identity"))
        infused = model(**text(), infused={"image": features()}).logits
    assert torch.equal(infused, plain)


@pytest.mark.parametrize("precision", LOW)
def test_mit_trains_on_a_quantised_model(precision):
    """Gradients of the maps equal those over the dequantised model; a few steps lower the loss."""
    model = quant.quantise(frozen(), precision)
    plain = dequantised(model)
    config = MiTConfig(modalities={"image": 6}, layers=[1, 2])
    grads = []
    for one in (model, plain):
        mit = attach(one, config)
        scramble(mit, spread=0.1)
        loss = one(**text(), labels=text()["input_ids"], infused={"image": features()}).loss
        grads.append((float(loss.detach()), torch.autograd.grad(loss, list(mit.parameters()))))
        if one is model:
            trained = mit
    if precision != "int8-activations":
        assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-5)
        for ours, theirs in zip(grads[0][1], grads[1][1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * max(1e-6, float(theirs.abs().max())))
    payload = {n: p.clone() for n, p in model.named_parameters() if "mit" not in n}
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**text(), labels=text()["input_ids"], infused={"image": features()}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(p, payload[n]) for n, p in model.named_parameters() if "mit" not in n)


@pytest.mark.parametrize("precision", LOW)
def test_checkpointed_layers_give_the_same_gradients(precision):
    model = quant.quantise(frozen(), precision)
    mit = attach(model, MiTConfig(modalities={"image": 6}, layers=[1, 2]))
    scramble(mit)
    grads = []
    for checkpoint in (False, True):
        mit.set_checkpointing(checkpoint)
        loss = model(**text(), labels=text()["input_ids"], infused={"image": features()}).loss
        grads.append(torch.autograd.grad(loss, list(mit.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_fused_feed_forward_takes_quantised_projections():
    model = quant.quantise(frozen(), "int8")
    attach(model, MiTConfig(modalities={"image": 6}, layers=[1]))
    assert type(model.model.layers[1].mlp).__name__ == "InfusedFeedForward"
