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


def outputs_and_gradients(function, inputs, **options):
    output = function(**inputs, **options)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=output.dtype)
    gradients = torch.autograd.grad(output, list(inputs.values()), upstream, allow_unused=True)
    return output, {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(inputs.items(), gradients, strict=True)}


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0


def assert_same(inputs, **options):
    slow, slow_gradients = outputs_and_gradients(infused_attention_reference, inputs, **options)
    fast, fast_gradients = outputs_and_gradients(infused_attention_folded, inputs, **options)
    assert largest(slow - fast) < EXACT
    for name, gradient in slow_gradients.items():
        assert gradient.isfinite().all()
        assert largest(gradient - fast_gradients[name]) < EXACT * max(1.0, largest(gradient)), name


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
@pytest.mark.parametrize("modalities", [0, 1, 2, 3])
@pytest.mark.parametrize("padding", [None, "left", "right", "all"])
def test_folded_equals_reference(gate, base, modalities, padding):
    for tq, window in ((7, None), (7, 3), (3, None), (3, 2), (1, None)):
        inputs = make(modalities, tq=tq)
        assert_same(inputs, gate=gate, base=base, key_padding=pad(7, padding), window=window)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1), (1, 1)])
def test_folded_equals_reference_for_every_grouping_of_heads(gate, heads, groups):
    assert_same(make(2, heads=heads, groups=groups), gate=gate, key_padding=pad(7, "left"))


@pytest.mark.parametrize("gate", GATES)
def test_folded_equals_reference_for_one_token_and_for_all_texts(gate):
    assert_same(make(1, tq=1, tk=1), gate=gate)
    assert_same(make(2), gate=gate, causal=False)
    assert_same(make(2), gate=gate, causal=False, window=3, key_padding=pad(7, "right"))
    assert_same(make(2), gate=gate, softcap=5.0, scale=0.4, key_padding=pad(7, "left"))
    assert_same(make(2), gate=gate, softcap=5.0, causal=False)


@pytest.mark.parametrize("gate", GATES)
def test_non_contiguous_inputs(gate):
    inputs = make(2)
    for name in ("q", "k", "v"):
        inputs[name] = inputs[name].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert_same(inputs, gate=gate)


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
    assert_same(inputs, gate=gate, base=base, present=present)


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


def test_k_add_under_the_token_gate_folded_equals_reference():
    inputs = make(2)
    inputs["k_add"] = make_k_add(inputs).requires_grad_()
    assert_same(inputs, gate="token", key_padding=pad(7, "left"))


def test_k_add_that_would_be_lost_is_refused():
    inputs = make(1)
    with pytest.raises(ValueError, match="k_add is alive under a softcap"):
        infused_attention_folded(**inputs, softcap=5.0, k_add=make_k_add(inputs), attend=lambda q, k, v: v)
    with pytest.raises(ValueError, match="gate 'prefx' is unknown"):
        infused_attention_folded(**inputs, gate="prefx")


def test_keep_dead_leaves_the_output_and_its_gradient_alone():
    output, dead = torch.randn(3, requires_grad=True), torch.randn(2, 2, requires_grad=True)
    kept = keep_dead(output * 2, dead)
    assert torch.equal(kept, output * 2)
    kept.sum().backward()
    assert torch.equal(output.grad, torch.full((3,), 2.0)) and torch.equal(dead.grad, torch.zeros(2, 2))
    assert keep_dead(output, None) is output


# What must not change a sample's result


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("function", [infused_attention_reference, infused_attention_folded])
def test_padding_and_batch_mates_change_nothing(gate, side, function):
    whole = make(2, seed=4)
    for row in range(B):
        alone = {
            n: x.detach() if n == "head_logit" else x.detach()[row : row + 1] if n in "qkv" else x.detach()[:, row : row + 1]
            for n, x in whole.items()
        }
        expected = function(**alone, gate=gate)
        assert largest(function(**whole, gate=gate)[row] - expected[0]) < 1e-12
        amount = (0, 0, 2, 0) if side == "left" else (0, 0, 0, 2)
        padded = {n: torch.nn.functional.pad(x, amount, value=7.0) if n in "qkv" else x for n, x in alone.items()}
        valid = torch.nn.functional.pad(torch.ones(1, 7, dtype=torch.bool), amount[2:])
        result = function(**padded, gate=gate, key_padding=valid)
        assert largest(result[:, :, valid[0]] - expected) < 1e-12


@pytest.mark.parametrize("function", [infused_attention_reference, infused_attention_folded])
@pytest.mark.parametrize("gate", GATES)
def test_which_gates_are_causal(gate, function):
    inputs = {n: x.detach() for n, x in make(1).items()}
    changed = {n: torch.cat([x[:, :, :5], x[:, :, 5:] + 1], dim=2) if n in "qkv" else x for n, x in inputs.items()}
    difference = largest((function(**inputs, gate=gate) - function(**changed, gate=gate))[:, :, :5])
    assert difference > 1e-3 if gate == "sequence" else difference < 1e-12


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_the_prefix_gate_at_the_last_token_is_the_sequence_gate(padding):
    inputs, valid = make(2), pad(7, padding)
    options = {"v": inputs["v"], "v_add": inputs["v_add"], "head_logit": inputs["head_logit"], "key_padding": valid}
    maps = {"k_mul": inputs["k_mul"], "v_mul": inputs["v_mul"]}
    whole, _ = folded_coefficients(**options, **maps, gate="sequence")
    so_far, _ = folded_coefficients(**options, **maps, gate="prefix")
    for one, many in zip(whole, so_far, strict=True):
        assert one.shape[2] == 1 and largest(many[:, :, -1:] - one) < EXACT
        assert largest(many[:, :, 3:4] - one) > 1e-3


@pytest.mark.parametrize("gate", GATES)
def test_a_query_that_sees_nothing_gives_zero_and_no_gradient(gate):
    inputs, valid = make(2), pad(7, "all")
    valid[0] = torch.tensor([False] * 3 + [True] * 4)
    for function in (infused_attention_reference, infused_attention_folded):
        output = function(**inputs, gate=gate, key_padding=valid)
        assert torch.equal(output[1], torch.zeros_like(output[1]))
        assert torch.equal(output[0, :, :3], torch.zeros_like(output[0, :, :3]))
        gradients = torch.autograd.grad(output.sum(), list(inputs.values()), allow_unused=True)
        for name, gradient in zip(NAMES, gradients, strict=True):
            if gradient is None:
                continue
            assert gradient.isfinite().all()
            blind = gradient[:, 1] if gradient.shape[:2] == (2, B) else gradient[1] if name in "qkv" else gradient[:0]
            assert largest(blind) == 0.0, name


# The gate


@pytest.mark.parametrize("gate", ["sequence", "prefix", "token"])
def test_zero_v_add_gives_sigma_of_the_logit_with_a_finite_gradient(gate):
    inputs = make(1)
    inputs["v_add"] = torch.zeros_like(inputs["v_add"]).requires_grad_()
    assert_same(inputs, gate=gate)
    head_only = infused_attention_folded(**inputs, gate="head")
    assert largest(infused_attention_folded(**inputs, gate=gate) - head_only) < EXACT
    inputs = {n: torch.zeros_like(x).requires_grad_() if n in ("k_mul", "v_mul") else x for n, x in inputs.items()}
    _, gradients = outputs_and_gradients(infused_attention_folded, inputs, gate=gate)
    assert 1e-3 < largest(gradients["v_add"]) < 1e2  # the identity init: nothing but δ's own gradient is left
    assert largest(gradients["head_logit"]) == 0.0


def test_decoding_token_by_token_gives_the_same_coefficients():
    inputs, valid = make(2, tk=9), pad(9, "left")
    maps = {n: inputs[n] for n in ("k_mul", "v_mul", "v_add", "head_logit")}
    whole, sums = folded_coefficients(inputs["v"], **maps, key_padding=valid)
    state, pieces = None, []
    for start, end in ((0, 4), (4, 5), (5, 6), (6, 9)):
        piece, state = folded_coefficients(
            inputs["v"][:, :, start:end], **maps, key_padding=valid[:, start:end], before=state and state.last()
        )
        pieces.append(piece)
    for expected, parts in zip(whole, zip(*pieces, strict=True), strict=True):
        assert largest(expected - torch.cat(parts, dim=2)) < EXACT
    for expected, got in zip(sums.last(), state.last(), strict=True):
        assert largest(expected - got) < EXACT


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
