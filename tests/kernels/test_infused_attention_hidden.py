"""What padding, a mask or a missing modality hides is nothing in every backend, even where it is no number."""

import pytest
import torch
from attention_cases import (
    GATES,
    HIDDEN,
    NAMES,
    WORST,
    Case,
    assert_hidden_is_nothing,
    assert_right,
    frozen,
    largest,
    make,
    run,
    some,
    upstream_of,
)
from mitrain_kernels.infused_attention import (
    folded_coefficients,
    infused_attention,
    infused_attention_reference,
    op,
)

RIGHT = [Case(gate, M=3, present=True, padding="right") for gate in GATES]
ALL = [
    Case(M=3, present=True, padding="all", base="mixed", tq=6),
    Case("sequence", M=1, present=True, padding="left", window=3),
    Case("token", M=2, present=True, padding="all", k_add=True),
    Case("prefix", M=2, present=True, padding="right", softcap=2.0, k_add=True),
]


@pytest.mark.parametrize(("backend", "value"), [("reference", WORST[0]), *(("sdpa", value) for value in WORST)])
@pytest.mark.parametrize("what", HIDDEN)
@some(RIGHT + ALL)
def test_nothing_that_is_hidden_counts(case, backend, what, value):
    assert_hidden_is_nothing(case, backend, what, value)


@pytest.mark.parametrize("what", HIDDEN)
@some(RIGHT + ALL)
def test_what_is_hidden_is_nothing_in_low_precision(case, what):
    assert_hidden_is_nothing(case, "sdpa", what, torch.inf, torch.bfloat16)


@pytest.mark.parametrize("what", HIDDEN)
@some(RIGHT[:2])
def test_recorded_by_autograd(case, what, monkeypatch):
    monkeypatch.setattr(op, "has_own_backward", lambda call: False)
    assert_hidden_is_nothing(case, "sdpa", what, torch.nan)


@pytest.mark.parametrize("what", HIDDEN[:-1])
@some([case for case in RIGHT + ALL if not (case.softcap and case.k_add)])
def test_in_flex(case, what):
    assert_hidden_is_nothing(case, "flex", what, torch.nan, trains=False)


def test_flex_takes_inputs_that_would_train_where_nothing_is_recorded():
    inputs, options = make(Case(padding="left", M=2))
    with torch.no_grad():
        got = {"output": infused_attention(**inputs, **options, backend="flex")}
    still = frozen(inputs, *NAMES)
    assert_right(got, still, upstream_of(inputs), **options)
    with pytest.raises(ValueError, match="FlexAttention has no backward pass on a CPU"):
        infused_attention(**inputs, **options, backend="flex")


def test_a_living_k_add_that_alone_trains_is_trained():
    inputs, options = make(Case("token", k_add=True))
    inputs = frozen(inputs, *NAMES)
    assert_right(run(infused_attention, inputs, upstream_of(inputs), **options, backend="sdpa"),
                 inputs, upstream_of(inputs), **options)  # fmt: skip
    with pytest.raises(ValueError, match="FlexAttention has no backward pass on a CPU"):
        infused_attention(**inputs, **options, backend="flex")


@some([Case(gate, M=2) for gate in GATES])
def test_maps_of_a_modality_that_no_sample_has_may_be_nan_with_their_logit(case):
    """As if it were not there, in the function, in the definition, and in the coefficients of the folded form."""
    inputs, options = make(case)
    options["present"] = torch.tensor([[True, True], [False, False]])
    own = {n: x.detach() if n in "qkv" else x.detach()[:1] for n, x in inputs.items()}
    alone = infused_attention_reference(**own, **{**options, "present": None})
    for name in ("k_mul", "v_mul", "v_add", "head_logit"):
        inputs[name] = torch.cat([own[name], torch.full_like(own[name], torch.nan)]).requires_grad_()
    for backend in ("reference", "sdpa"):
        got = run(infused_attention, inputs, upstream_of(inputs), **options, backend=backend)
        assert largest(got.pop("output") - alone) < 1e-11 and all(x.isfinite().all() for x in got.values())
    if case.gate != "token":
        asked = {n: inputs[n] for n in ("v", "k_mul", "v_mul", "v_add", "head_logit")}
        factors, _ = folded_coefficients(**asked, gate=case.gate, present=options["present"])
        assert all(x.isfinite().all() for x in factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lowest", ["-inf", "finfo.min"])
@some([Case(padding="all"), Case("sequence", padding="all", tq=6, base="mixed"), Case("token", padding="left")])
def test_an_additive_mask_that_hides_whole_rows(case, lowest, dtype):
    """Of the lowest finite number, as of -inf: a query without a key gives 0, where softmax alone gives the mean."""
    inputs, options = make(case, dtype)
    tq, tk = inputs["q"].shape[2], inputs["k"].shape[2]
    seen = options["key_padding"][:, None, None] & torch.ones(tq, tk, dtype=torch.bool).tril(tk - tq)
    low = -torch.inf if lowest == "-inf" else torch.finfo(dtype).min
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, low)
    assert not seen.any(-1).all()
    got = run(infused_attention, inputs, upstream_of(inputs), **options, mask=mask, backend="sdpa")
    assert_right(got, inputs, upstream_of(inputs), **options)
    assert largest(got["output"].masked_fill(seen.any(-1, keepdim=True), 0)) == 0.0


def test_finite_numbers_are_computed_once(monkeypatch):
    """The usual way costs a sum over the output; a number that is no number where it counts comes out as such."""
    calls = []
    for way in ("forward", "backward"):
        function = getattr(op.sdpa, way)
        monkeypatch.setattr(op.sdpa, way, lambda *a, w=way, f=function, **k: calls.append(w) or f(*a, **k))
    inputs, options = make(Case(padding="right"), torch.float32)
    run(infused_attention, inputs, upstream_of(inputs), **options, backend="sdpa")
    assert calls == ["forward", "backward"]
    inputs["v"] = inputs["v"].detach().index_fill(2, torch.tensor([1]), torch.nan).requires_grad_()
    output = infused_attention(**inputs, **options, backend="sdpa")
    assert output[:, :, 1:].isnan().all()
