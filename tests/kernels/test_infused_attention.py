"""Infused attention: the definition against plain loops, and the folded form against the definition.

Everything runs in float64, where the two forms differ by rounding alone. An output here is a sum of at most a few
hundred products of magnitude 10, a gradient one of a few thousand: 1e-11 is that times 2⁻⁵³, and a hundred times
what is measured.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from attention_cases import largest
from mitrain_kernels.infused_attention import (
    GATES,
    Call,
    GateSums,
    folded_coefficients,
    gate_values,
    infused_attention_folded,
    infused_attention_reference,
    keep_dead,
    prefix_sums,
)

B, H, G, D = 3, 4, 2, 8
EXACT = 1e-11
FOLDING = ("sequence", "prefix", "head", "none")
NAMES = ("q", "k", "v", "k_mul", "v_mul", "v_add", "head_logit")


def make(modalities=1, tq=7, tk=7, heads=H, groups=G, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, heads, tq, D), (B, groups, tk, D), (B, groups, tk, D)] + [(modalities, B, heads, D)] * 3
    shapes.append((modalities, heads))
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return {name: x.requires_grad_() for name, x in zip(NAMES, tensors, strict=True)}


def make_k_add(inputs, seed=1):
    return torch.randn(inputs["k_mul"].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pad(tk, kind):
    """True for tokens: row 0 hides 3 positions, with 'all' row 1 hides every one."""
    if kind is None:
        return None
    valid = torch.ones(B, tk, dtype=torch.bool)
    valid[0, slice(0, 3) if kind == "left" else slice(tk - 3, tk)] = False
    valid[1] = kind != "all"
    return valid


def written_out(i, gate, base, valid, window):
    """The definition in loops over numbers and vectors, without a line of the code under test."""
    q, k, v, k_mul, v_mul, v_add, logit = (i[name].detach() for name in NAMES)
    M, tq, tk = len(k_mul), q.shape[2], k.shape[2]
    out = torch.zeros_like(q)
    for b, h, t in itertools.product(range(B), range(H), range(tq)):
        now, group = tk - tq + t, h // (H // G)
        tokens = [j for j in range(tk) if valid is None or valid[b, j]]
        scores, values = [], []
        for j in (j for j in tokens if j <= now and (window is None or now - j < window)):
            key, value = base * k[b, group, j], base * v[b, group, j]
            for m in range(M):
                add = v_add[m, b, h]
                heard = {"sequence": tokens, "prefix": [x for x in tokens if x <= now], "token": [j]}.get(gate)
                cosine = 0.0
                if heard:
                    stream = torch.cat([v[b, group, x] for x in heard])
                    cosine = torch.cosine_similarity(stream, add.repeat(len(heard)), dim=0).item()
                g = 1.0 if gate == "none" else 1 / (1 + math.exp(-logit[m, h].item() - cosine))
                key = key + g * k[b, group, j] * k_mul[m, b, h]
                value = value + g * (v[b, group, j] * v_mul[m, b, h] + add)
            scores.append(torch.dot(q[b, h, t], key) / math.sqrt(D))
            values.append(value)
        if scores:
            out[b, h, t] = (torch.softmax(torch.stack(scores), 0)[:, None] * torch.stack(values)).sum(0)
    return out


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("base", [0, 1])
@pytest.mark.parametrize(("padding", "window", "tq"), [(None, None, 7), ("left", 3, 7), ("all", None, 7), ("right", 3, 2)])
def test_the_reference_is_the_definition(gate, base, padding, window, tq):
    inputs, valid = make(modalities=2, tq=tq), pad(7, padding)
    result = infused_attention_reference(**inputs, gate=gate, base=base, key_padding=valid, window=window)
    assert largest(result - written_out(inputs, gate, base, valid, window)) < EXACT


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("base", [0, 1])
def test_a_missing_modality_is_as_if_it_were_not_there(gate, base):
    inputs = make(2)
    present = torch.tensor([[True, True, False], [True, False, True]])
    for function in (infused_attention_reference, infused_attention_folded):
        some = function(**inputs, gate=gate, base=base, present=present)
        for row in range(B):
            there = present[:, row]
            alone = {
                n: x[row : row + 1] if n in "qkv" else x[there] if n == "head_logit" else x[there][:, row : row + 1]
                for n, x in inputs.items()
            }
            assert largest(some[row] - function(**alone, gate=gate, base=base)[0]) < EXACT


def test_base_may_differ_between_samples():
    inputs = make(2)
    mixed = torch.tensor([0, 1, 0])
    for function in (infused_attention_reference, infused_attention_folded):
        rows = [function(**inputs, base=int(base))[row] for row, base in enumerate(mixed)]
        assert largest(function(**inputs, base=mixed) - torch.stack(rows)) < EXACT


# k_add: dead exactly where the theorem says so


@pytest.mark.parametrize("gate", FOLDING)
def test_k_add_is_dead_under_a_gate_that_does_not_depend_on_the_key(gate):
    inputs = make(2)
    k_add = make_k_add(inputs).requires_grad_()
    without, with_it = (infused_attention_reference(**inputs, gate=gate, k_add=x) for x in (None, k_add))
    assert largest(without - with_it) < EXACT
    assert largest(torch.autograd.grad(with_it.sum(), k_add)[0]) < EXACT
    folded = infused_attention_folded(**inputs, gate=gate, k_add=k_add)
    zeros = torch.autograd.grad(folded.sum(), k_add)[0]
    assert torch.equal(zeros, torch.zeros_like(k_add))


@pytest.mark.parametrize("options", [{"gate": "token"}, {"softcap": 5.0}, {"gate": "none", "softcap": 5.0}])
def test_k_add_is_alive_where_the_conditions_fail(options):
    inputs = make(2)
    k_add = make_k_add(inputs)
    without, with_it = (infused_attention_reference(**inputs, **options, k_add=x) for x in (None, k_add))
    assert largest(without - with_it) > 1e-3


def test_keep_dead_leaves_the_output_and_its_gradient_alone():
    output, dead = torch.randn(3, requires_grad=True), torch.randn(2, 2, requires_grad=True)
    kept = keep_dead(output * 2, dead)
    assert torch.equal(kept, output * 2)
    kept.sum().backward()
    assert torch.equal(output.grad, torch.full((3,), 2.0)) and torch.equal(dead.grad, torch.zeros(2, 2))
    assert keep_dead(output, None) is output


# The gate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_sums_are_accumulated_in_float32(dtype, autocast):
    generator = torch.Generator().manual_seed(0)
    v = (torch.randn(1, 1, 4096, 16, generator=generator) + 0.5).to(dtype)
    v_add = torch.randn(1, 1, 2, 16, generator=generator).to(dtype)
    exact = prefix_sums(v.double(), v_add.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        sums = prefix_sums(v, v_add)
        gate = gate_values(torch.ones(1, 2), v_add, sums)
    for got, want in zip(sums, exact, strict=True):
        assert got.dtype == torch.float32
        # float32 rounds each of the 4096 additions by 2⁻²⁴ of the running sum; bfloat16 would lose 2⁻⁸
        assert largest(got - want) <= 4096 * 2**-24 * largest(want)
    assert gate.dtype == torch.float32
    assert largest(gate - gate_values(torch.ones(1, 2), v_add.double(), exact)) < 1e-5


@pytest.mark.parametrize("gate", FOLDING)
def test_folding_loses_no_more_than_the_plain_attention_of_the_same_precision(gate):
    exact, rough = make(1, seed=5), make(1, seed=5, dtype=torch.float32)
    truth = infused_attention_reference(**exact, gate=gate)
    lost = largest(infused_attention_folded(**rough, gate=gate) - truth)
    q, k, v = (rough[n] for n in "qkv")
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    plain_truth = torch.nn.functional.scaled_dot_product_attention(
        *(x.double() for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    growth = 1 + largest(truth) / largest(plain_truth)
    # q ⊙ α widens the scores by |α|, the affine map the output; each adds roundings of its own
    widest = 1 + largest(exact["k_mul"]) + largest(exact["v_mul"])
    assert lost < 4 * growth * widest * max(largest(plain - plain_truth), 2**-24)


def test_keys_and_values_reach_the_backend_untouched():
    inputs, seen = make(2), []

    def attend(q, k, v):
        seen.append((k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    output = infused_attention_folded(**inputs, attend=attend)
    assert seen[0][0] is inputs["k"] and seen[0][1] is inputs["v"]
    assert largest(output - infused_attention_reference(**inputs)) < EXACT


@pytest.mark.parametrize("gate", FOLDING)
def test_coefficients_have_one_row_per_query_only_where_the_gate_does(gate):
    inputs = make(2)
    maps = {n: inputs[n] for n in ("k_mul", "v_mul", "v_add", "head_logit")}
    coefficients, sums = folded_coefficients(inputs["v"], **maps, gate=gate)
    rows = 7 if gate == "prefix" else 1
    assert [x.shape for x in coefficients] == [(B, H, rows, D)] * 3
    assert isinstance(sums, GateSums) == (gate in ("prefix", "sequence"))


def test_zero_maps_are_exactly_plain_attention():
    inputs = make(2, dtype=torch.float32)
    maps = {n: torch.zeros_like(x) if n in ("k_mul", "v_mul", "v_add") else x for n, x in inputs.items()}
    q, k, v = (inputs[n] for n in "qkv")
    seen = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    for gate in FOLDING:
        assert torch.equal(infused_attention_folded(**maps, gate=gate), plain)


def test_packed_sequences_are_calls_of_their_own():
    bounds, generator = [0, 2, 5], torch.Generator().manual_seed(0)
    shapes = {name: (1, heads, 5, D) for name, heads in (("q", H), ("k", G), ("v", G))}
    shapes |= dict.fromkeys(("k_mul", "v_mul", "v_add", "k_add"), (1, 2, H, D)) | {"head_logit": (1, H)}
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    told = {"present": torch.tensor([[True, False]]), "base": torch.tensor([1.0, 0.0]), "window": 3, "gate": "head"}
    packed = Call(**given, **told, cu_seqlens=torch.tensor(bounds))
    parts = packed.sequences()
    assert len(parts) == 2
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        for name in ("q", "k", "v"):
            assert torch.equal(getattr(parts[i], name), given[name][:, :, start:end])
        for name in ("k_mul", "v_mul", "v_add", "k_add"):
            assert torch.equal(getattr(parts[i], name), given[name][:, i : i + 1])
        assert torch.equal(parts[i].present, told["present"][:, i : i + 1])
        assert torch.equal(parts[i].base, told["base"][i : i + 1])
        assert parts[i].head_logit is given["head_logit"] and parts[i].cu_seqlens is None
        assert (parts[i].window, parts[i].gate, parts[i].scale) == (3, "head", D**-0.5)
    plain = replace(packed, base=0, present=None, k_add=None).sequences()[1]
    assert (plain.base, plain.present, plain.k_add) == (0, None, None)
