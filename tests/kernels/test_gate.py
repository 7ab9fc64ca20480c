"""The gate's arithmetic and what is hidden from it, by hand on a few numbers."""

import pytest
import torch
import torch.nn.functional as F
from mitrain_kernels.infused_attention import (
    folded_coefficients,
    infused_attention_reference,
    infused_keys_values,
    prefix_sums,
)
from mitrain_kernels.infused_attention.gate import (
    ORDINARY,
    by_group,
    by_modality,
    constant_gate,
    cosine_gate,
    finite,
    gate_backward,
    per_query_head,
    shield,
    spread,
    token_sums,
    whole_sums,
    without_hidden,
    without_missing,
)

NAN, INF = float("nan"), float("inf")


def test_maps_of_a_missing_modality_are_zero_with_their_gradients():
    present = torch.tensor([[True, False], [False, True]])
    x = torch.full((2, 2, 3, 2), NAN)
    x[0, 0] = 1.0
    x[1, 1] = 2.0
    x.requires_grad_()
    found, nothing = without_missing(present, x, None)
    assert nothing is None and found[0, 0].eq(1).all() and found[1, 1].eq(2).all()
    assert found[0, 1].eq(0).all() and found[1, 0].eq(0).all()
    found.sum().backward()
    assert torch.equal(x.grad, present[:, :, None, None].expand_as(x).to(x))
    assert without_missing(None, x, None) == [x, None]


def test_only_what_is_immense_or_no_number_in_hidden_rows_becomes_zero():
    row = [NAN, INF, -INF, ORDINARY, -2 * ORDINARY, ORDINARY / 2, -3.0]
    x = torch.tensor(row).expand(2, 1, 2, 7)
    valid = torch.tensor([[False, True, False], [True, False, True]])
    found = without_hidden(x, valid)  # the rows are the last two of three
    cleaned = torch.tensor([0, 0, 0, 0, 0, ORDINARY / 2, -3.0])
    assert torch.equal(found[0, 0, 1], cleaned) and torch.equal(found[1, 0, 0], cleaned)
    for kept in (found[0, 0, 0], found[1, 0, 1]):
        torch.testing.assert_close(kept, torch.tensor(row), rtol=0, atol=0, equal_nan=True)
    assert without_hidden(x, None) is x


def test_a_sum_that_overflows_in_half_precision_is_finite_in_float32():
    assert finite(torch.full((8,), 6e4, dtype=torch.float16), None, torch.ones(2, dtype=torch.float64))
    assert finite(torch.full((2,), 1e300, dtype=torch.float64))
    assert not finite(torch.ones(2), None, torch.tensor([1.0, NAN]))
    assert not finite(torch.tensor([INF, -INF])) and finite()


def test_the_shield_hands_the_output_on_and_cleans_its_gradient():
    output = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    valid = torch.tensor([[False, True]])
    shielded = shield(output, valid)
    assert torch.equal(shielded, output) and shielded is not output
    shielded.backward(torch.tensor([[[[NAN, 1.0], [2.0, 3.0]]]]))
    assert output.grad.tolist() == [[[[0.0, 1.0], [2.0, 3.0]]]]
    assert shield(output, None) is output and shield(still := output.detach(), valid) is still


M, B, H, G, T, D = 2, 3, 4, 2, 5, 3
PRESENT = torch.tensor([[True, False, True], [True, True, False]])


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def right_padding():
    """(B, T): every token sees one that is valid; row 0 hides its last two."""
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[0, -2:] = False
    return valid


@pytest.mark.parametrize("present", [None, PRESENT])
@pytest.mark.parametrize("valid", [None, right_padding()])
@pytest.mark.parametrize(("sums_of", "gates"), [(prefix_sums, T), (prefix_sums, 2), (whole_sums, 1)])
def test_the_gates_own_backward_pass_is_autograds(sums_of, gates, valid, present):
    v, v_add, logit, upstream = drawn(1, B, G, T, D), drawn(2, M, B, H, D), drawn(3, M, H), drawn(4, M, B, H, gates)
    sums = sums_of(v, v_add, valid).last(gates)
    gate = cosine_gate(logit, v_add, sums, present)
    expected = torch.autograd.grad(gate.value, (v, v_add, logit), upstream)
    with torch.no_grad():
        back = gate_backward(upstream, gate, sums.square, sums.count, v_add, T, valid)
        dv = torch.einsum("bgxt,bgxd->bgtd", back.dot, by_group(v_add, G)) - back.square[..., None] * v
        of_sums = torch.einsum("bgxt,bgtd->bgxd", back.dot, v)
        found = (dv, by_modality(of_sums, M, H) - back.norm[..., None] * v_add, back.head_logit)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


def test_a_gate_without_a_cosine_is_the_logits_or_one_and_zero_where_missing():
    logit = drawn(1, M, H)
    there = PRESENT[:, :, None, None].expand(M, B, H, 1)
    opened = torch.sigmoid(logit)[:, None, :, None].expand(M, B, H, 1)
    assert torch.equal(constant_gate(logit, B, PRESENT), torch.where(there, opened, 0))
    assert torch.equal(constant_gate(logit, B, PRESENT, cosine=False), there.double())
    assert torch.equal(constant_gate(logit, B, None, cosine=False), torch.ones_like(opened))
    assert torch.equal(
        constant_gate(logit.detach().half(), B, None),
        torch.sigmoid(logit.half().float())[:, None, :, None].expand(M, B, H, 1),
    )


def infusion(missing):
    """q, k, v and maps; those of a missing modality are ``missing``."""
    tensors = {"q": (B, H, T, D), "k": (B, G, T, D), "v": (B, G, T, D)}
    tensors |= dict.fromkeys(("k_mul", "v_mul", "v_add", "k_add"), (M, B, H, D)) | {"head_logit": (M, H)}
    found = {name: drawn(seed, *shape).detach() for seed, (name, shape) in enumerate(tensors.items())}
    hidden = ~PRESENT[:, :, None, None]
    return {n: x.masked_fill(hidden, missing) if x.shape == (M, B, H, D) else x for n, x in found.items()}


@pytest.mark.parametrize("base", [None, 0, torch.tensor([1, 0, 1])])
@pytest.mark.parametrize("gate", ["prefix", "sequence", "head", "none"])
def test_coefficients_around_plain_attention_are_the_definition(gate, base):
    inputs, valid = infusion(NAN), right_padding()
    k_add = inputs.pop("k_add")
    options = {"gate": gate, "present": PRESENT, "key_padding": valid} | ({} if base is None else {"base": base})
    expected = infused_attention_reference(**infusion(0.0), **options)
    q, k = inputs.pop("q"), inputs.pop("k")
    (alpha, gamma, delta), _ = folded_coefficients(**inputs, **options)
    seen = valid[:, None, None] & torch.ones(T, T, dtype=torch.bool).tril()
    found = F.scaled_dot_product_attention(q * alpha, k, inputs["v"], seen, enable_gqa=True) * gamma + delta
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert k_add.isnan().any()


@pytest.mark.parametrize("base", [None, 0, torch.tensor([1, 0, 1])])
@pytest.mark.parametrize("adds", [False, True])
def test_keys_and_values_of_each_token_under_plain_attention_are_the_definition(adds, base):
    inputs, clean = infusion(NAN), infusion(0.0)
    if not adds:
        del inputs["k_add"], clean["k_add"]
    options = {"present": PRESENT} | ({} if base is None else {"base": base})
    expected = infused_attention_reference(**clean, gate="token", **options)
    q = inputs.pop("q")
    k, v = infused_keys_values(**inputs, **options)
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, is_causal=True), expected, rtol=0, atol=1e-12)


def test_coefficients_have_the_precision_of_the_values():
    inputs = {n: x.float() for n, x in infusion(0.0).items() if n not in ("q", "k", "k_add")}
    exact, _ = folded_coefficients(**inputs)
    rough, sums = folded_coefficients(**inputs | {"v": inputs["v"].bfloat16()})
    assert [x.dtype for x in (*exact, *rough)] == [torch.float32] * 3 + [torch.bfloat16] * 3
    assert sums.dot.dtype == sums.square.dtype == torch.float32
    for mine, theirs in zip(rough, exact, strict=True):
        torch.testing.assert_close(mine.float(), theirs, rtol=2**-7, atol=2**-5)


def test_the_last_tokens_are_counted_along_the_tokens():
    sums = prefix_sums(drawn(1, B, G, T, D), drawn(2, M, B, H, D))
    assert sums.last(H).dot.shape == (M, B, H, H) and torch.equal(sums.last(H).dot, sums.dot[..., -H:])
    assert sums.last(T) is sums


def test_heads_are_counted_along_the_heads_and_not_copied_where_there_is_one_for_each():
    x = torch.arange(2 * H).view(1, 2, H)  # as long as there are query heads
    assert torch.equal(per_query_head(x, H)[0], x[0, [0, 0, 1, 1]])
    assert per_query_head(x, 2) is x


def test_tokens_are_counted_as_precisely_as_values_are_summed():
    values = drawn(1, B, G, T, D), drawn(2, M, B, H, D), right_padding()
    for sums in (token_sums(*values), prefix_sums(*values), whole_sums(*values)):
        assert sums.count.dtype == torch.float64


def test_the_gradient_of_a_sum_reaches_its_terms_and_those_before():
    x = torch.tensor([[[[1.0, 10.0, 100.0]]]])
    assert spread(x, 3).tolist() == [[[[111.0, 110.0, 100.0]]]]
    assert spread(x, 5).tolist() == [[[[111.0, 111.0, 111.0, 110.0, 100.0]]]]
    assert spread(x[..., :1], 3).tolist() == [[[[1.0, 1.0, 1.0]]]]
