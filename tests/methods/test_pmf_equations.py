"""PMF beside its equations: one fusion layer written out by hand, a causal one by the model's own forward pass."""

import torch
from pmf_pairs import UNEVEN, models, pair
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

EXACT = 1e-12  # float64: the order of sums differs from torch's fused attention
HEADS = 4


def attend(x: Tensor, visible: Tensor, projections: list[nn.Linear]) -> Tensor:
    """Softmax attention of HEADS heads over the rows that ``visible`` (B, T) admits; its own loop over the heads."""
    queries, keys, values = (x @ p.weight.T + p.bias for p in projections)
    width, out = x.shape[-1] // HEADS, []
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        scores = queries[..., part] @ keys[..., part].transpose(1, 2) / width**0.5
        scores = scores.masked_fill(~visible[:, None], float("-inf"))
        out.append(torch.softmax(scores, -1) @ values[..., part])
    return torch.cat(out, -1)


def dense(x, linear):
    return x @ linear.weight.T + linear.bias


def norm(x, module):
    return layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)


def bert_layer(layer, x, visible):
    attention = layer.attention.self
    heads = attend(x, visible, [attention.query, attention.key, attention.value])
    x = norm(x + dense(heads, layer.attention.output.dense), layer.attention.output.LayerNorm)
    inner = gelu(dense(x, layer.intermediate.dense))
    return norm(x + dense(inner, layer.output.dense), layer.output.LayerNorm)


def vit_layer(layer, x, visible):
    attention = layer.attention
    y = norm(x, layer.layernorm_before)
    x = x + dense(attend(y, visible, [attention.q_proj, attention.k_proj, attention.v_proj]), attention.o_proj)
    return x + dense(gelu(dense(norm(x, layer.layernorm_after), layer.mlp.fc1)), layer.mlp.fc2)


def mapped(y: Tensor, own: dict[str, Tensor], link: str) -> Tensor:
    first = (y @ own[f"{link}.map.0.weight"].T + own[f"{link}.map.0.bias"]).clamp_min(0)
    return first @ own[f"{link}.map.2.weight"].T + own[f"{link}.map.2.bias"]


@torch.no_grad()
def test_two_fusion_layers_are_the_equations():
    case = pair("bert+vit", fusion_layers=2, **UNEVEN)
    own, batch = case.adapter.state_dict(), len(case.words.ids)
    text_layers, image_layers = case.backbones["text"].encoder.layer, case.backbones["encoder"].layers
    x_t, x_v = case.words.states, case.picture.states
    ones = torch.ones(batch, 64, dtype=torch.bool)
    count_t, count_v, queries = x_t.shape[1], x_v.shape[1], UNEVEN["query_prompts"]

    def rows(*names):
        return [own[name].expand(batch, -1, -1) for name in names]

    def seen(x):  # padding is hidden in both passes, prompts are visible
        return torch.cat([case.words.mask.bool(), ones], 1)[:, : x.shape[1]] if x.shape[-1] == 32 else ones[:, : x.shape[1]]

    for step in range(2):
        told, shown = text_layers[2 + step], image_layers[1 + step]
        out, back = f"fusion.{step}.text_to_image", f"fusion.{step}.image_to_text"
        asked_t = torch.cat([x_t, *rows(f"{out}.context", f"{out}.query")], 1)
        asked_v = torch.cat([x_v, *rows(f"{back}.context", f"{back}.query")], 1)
        y_v = mapped(bert_layer(told, asked_t, seen(asked_t))[:, -queries:], own, out)
        y_t = mapped(vit_layer(shown, asked_v, seen(asked_v))[:, -queries:], own, back)
        fused_t = torch.cat([x_t, *rows(f"{back}.fusion"), y_t], 1)
        fused_v = torch.cat([x_v, *rows(f"{out}.fusion"), y_v], 1)
        x_t = bert_layer(told, fused_t, seen(fused_t))[:, :count_t]
        x_v = vit_layer(shown, fused_v, seen(fused_v))[:, :count_v]
    reading = case.encode()
    visible = case.words.mask.bool()
    torch.testing.assert_close(reading.text[visible], x_t[visible], rtol=0, atol=EXACT)
    vector = norm(x_v, case.backbones["encoder"].layernorm)[:, 0]
    torch.testing.assert_close(reading.vectors["image"], vector, rtol=0, atol=EXACT)


@torch.no_grad()
def test_a_causal_text_model_has_its_prompts_in_front_and_its_queries_behind():
    """One layer of Llama by its own forward pass, row by row without padding, on [c ; x ; q] and on [p ; y ; x]."""
    backbones = models("llama+dinov2", num_hidden_layers=1)
    case = pair("llama+dinov2", backbones, fusion_layers=1, **UNEVEN)
    own, told = {n.removeprefix("fusion.0."): p for n, p in case.adapter.state_dict().items()}, backbones["text"].model
    reading, alone = case.encode(), case.adapter.encode(None, case.picture)
    assert (reading.vectors["image"] - alone.vectors["image"]).abs().max() > 1e-3
    shown = backbones["encoder"].encoder.layer[-1]

    def dino(*rows):
        return shown(torch.cat(rows)[None])[0]

    for row in range(3):
        x_t, x_v = case.words.states[row][case.words.mask[row].bool()], case.picture.states[row]
        asked = torch.cat([own["text_to_image.context"], x_t, own["text_to_image.query"]])
        told.norm, kept = nn.Identity(), told.norm
        answer = told(inputs_embeds=asked[None], use_cache=False).last_hidden_state[0, -3:]
        told.norm = kept
        fused_v = dino(x_v, own["text_to_image.fusion"], mapped(answer, own, "text_to_image"))
        vector = norm(fused_v, backbones["encoder"].layernorm)[0]
        torch.testing.assert_close(reading.vectors["image"][row], vector, rtol=0, atol=EXACT)
        answer = mapped(dino(x_v, own["image_to_text.context"], own["image_to_text.query"])[-3:], own, "image_to_text")
        fused = torch.cat([own["image_to_text.fusion"], answer, x_t])
        final = told(inputs_embeds=fused[None], use_cache=False).last_hidden_state[0, 4:]
        torch.testing.assert_close(reading.text[row, : len(x_t)], final, rtol=0, atol=EXACT)
