"""The folded form, and the definition, under every option: held to the definition in float64, output and every gradient."""

import itertools

import pytest
import torch
from attention_cases import (
    BENT,
    EXACT,
    GATES,
    LAYOUTS,
    MASKED,
    SHAPES,
    Case,
    assert_right,
    largest,
    make,
    options_of,
    run,
    some,
    upstream_of,
)
from mitrain_kernels.infused_attention import (
    Call,
    folded_coefficients,
    infused_attention_folded,
    infused_attention_reference,
    keep_dead,
    prefix_sums,
)
from mitrain_kernels.infused_attention.folded import coefficients, visible_keys

ALIVE = [*BENT, Case("token", k_add=True, softcap=2.0, present=True)]
FORMS = (infused_attention_reference, infused_attention_folded)


def assert_folded_right(case, dtype=torch.float64, **more):
    inputs, options = make(case, dtype)
    options |= more
    upstream = upstream_of(inputs)
    assert_right(run(infused_attention_folded, inputs, upstream, **options), inputs, upstream, **options)


@some([*SHAPES, *MASKED, *BENT, *LAYOUTS])
def test_the_folded_form_is_the_definition(case):
    assert_folded_right(case)


@some([*ALIVE, Case("token", k_add=True, base="mixed"), Case("prefix", base="mixed")])
def test_in_bfloat16(case):
    assert_folded_right(case, torch.bfloat16)


@pytest.mark.parametrize("gate", ["sequence", "prefix", "token"])
def test_the_root_takes_the_eps_that_is_given(gate):
    assert_folded_right(Case(gate), eps=0.5)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("causal", [True, False])
def test_every_pattern_of_padding_under_every_window(causal, softcap):
    """As many tokens as query heads, so that neither can stand for the other."""
    patterns = torch.tensor(list(itertools.product([True, False], repeat=4)))
    for window, tq in itertools.product((None, 1, 2, 3), (4, 2)):
        case = Case(B=len(patterns), H=4, G=2, tk=4, tq=tq, d=4, causal=causal, window=window, softcap=softcap)
        assert_folded_right(case, key_padding=patterns)


def test_queries_without_padding_see_what_the_window_says():
    inputs, _ = make(Case(tk=3, tq=2))
    assert visible_keys(Call(**inputs, causal=False)) is None
    assert visible_keys(Call(**inputs))[0, 0].tolist() == [[True, True, False], [True, True, True]]
    assert visible_keys(Call(**inputs, causal=False, window=1))[0, 0].tolist() == [
        [False, True, False],
        [False] * 2 + [True],
    ]


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_sums_that_began_before_are_gone_on_with(padding):
    inputs, options = make(Case(tk=9, padding=padding))
    valid = options.get("key_padding")
    early = None if valid is None else valid[:, :6]
    state = prefix_sums(inputs["v"][:, :, :6], inputs["v_add"], early).last()
    rest = inputs | {"q": inputs["q"][:, :, 6:]}
    found = infused_attention_folded(**rest, **options, state_in=state)
    assert largest(found - infused_attention_reference(**rest, **options)) < EXACT


@pytest.mark.parametrize("function", FORMS)
def test_tensors_may_be_given_by_position(function):
    inputs, options = make(Case())
    assert torch.equal(function(*inputs.values(), **options), function(**inputs, **options))


@pytest.mark.parametrize("function", FORMS)
@some([Case(gate, k_add=True) for gate in GATES] + [Case(softcap=2.0, k_add=True)])
def test_a_modality_that_no_sample_has_may_hold_anything(function, case):
    inputs, options = make(case)
    maps = [name for name in inputs if name not in "qkv"]
    kept = inputs | {name: inputs[name][1:].detach().requires_grad_() for name in maps}
    with torch.no_grad():
        for name in maps:
            inputs[name][0] = torch.nan
    present = torch.tensor([[False, False], [True, False]])
    upstream = upstream_of(inputs)
    found = run(function, inputs, upstream, **options, present=present)
    expected = run(infused_attention_reference, kept, upstream, **options, present=present[1:])
    for name, wanted in expected.items():
        got = found[name]
        if name in maps:
            assert torch.equal(got[0], torch.zeros_like(got[0])), name
            got = got[1:]
        assert largest(got - wanted) < EXACT * max(1.0, largest(wanted)), name  # NaN is not


@pytest.mark.parametrize("gate", [gate for gate in GATES if gate != "token"])
def test_coefficients_of_a_modality_that_no_sample_has(gate):
    inputs, _ = make(Case(gate, M=1))
    maps = {name: torch.full_like(inputs[name], torch.nan) for name in inputs if name not in "qkv"}
    present = torch.zeros(1, 2, dtype=torch.bool)
    for found, expected in zip(
        folded_coefficients(inputs["v"], **maps, present=present, gate=gate)[0], (1, 1, 0), strict=True
    ):
        assert torch.equal(found, torch.full_like(found, expected))


def test_coefficients_are_as_precise_as_the_gate():
    gate, maps = torch.ones(1, 2, 3, 1), torch.ones(3, 1, 2, 3, 4, dtype=torch.bfloat16)
    for found in coefficients(gate, *maps, torch.tensor([0.0, 1.0], dtype=torch.float64)):
        assert found.dtype == gate.dtype and torch.equal(found[0], torch.ones(3, 1, 4))
    alpha, gamma, delta = coefficients(gate, *maps)  # by itself the frozen key and value stay
    assert alpha.eq(2).all() and gamma.eq(2).all() and delta.eq(1).all()


def test_what_cannot_be_done_is_said_whole():
    inputs, _ = make(Case(k_add=True))
    with pytest.raises(ValueError, match=r"^gate 'prefx' is unknown: choose one of sequence, prefix, token, head, none$"):
        infused_attention_folded(**inputs, gate="prefx")
    with pytest.raises(ValueError, match=r"^k_add is alive under a softcap, .* does not take it: leave attend out$"):
        infused_attention_folded(**inputs, softcap=2.0, attend=lambda q, k, v: q)
    heard = infused_attention_folded(**inputs, gate="token", softcap=2.0, attend=lambda q, k, v: v)  # k_add is in the keys
    assert heard.shape == (2, 4, 9, 8)


# On a device that is not the default one


@some([Case(padding="left", window=3), Case("token", k_add=True), Case(causal=False), BENT[0]])
def test_everything_that_is_made_lies_where_the_queries_do(case):
    inputs = {name: x.detach().to("meta") for name, x in make(case)[0].items()}
    options = options_of(case, "meta")
    output = infused_attention_reference(**inputs, **options)
    assert output.device.type == "meta" and output.shape == inputs["q"].shape
    seen = visible_keys(Call(**inputs, **options | {"key_padding": None}))
    assert seen is None or seen.device.type == "meta"


def test_the_zeros_of_what_is_dead_lie_where_it_does():
    output, dead = (torch.zeros(3, device="meta", requires_grad=True) for _ in range(2))
    given = torch.autograd.grad(keep_dead(output, dead).sum(), (output, dead))
    assert [x.device.type for x in given] == ["meta", "meta"]
