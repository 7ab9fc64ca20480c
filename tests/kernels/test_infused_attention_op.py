"""``infused_attention``: one contract for all backends, and what holds of the function whatever runs it."""

import re

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    CASES,
    GATES,
    MASKED,
    PACKED,
    SHAPES,
    Case,
    assert_backend_right,
    assert_right,
    bounds,
    frozen,
    largest,
    make,
    poisoned,  # noqa: F401
    run,
    some,
    truth,
    upstream_of,
)
from mitrain_kernels.infused_attention import GateSums, infused_attention, op

LOW = (torch.float32, torch.bfloat16, torch.float16)
HERE = ("reference", "sdpa", "auto")


def plain_id(value):
    """Of a case's changes or message; without the escapes by which the mutation run could not find it again."""
    return "-".join(value) if isinstance(value, dict) else re.sub(r"\W+", "_", value)


# The contract: output and every gradient against the float64 reference


@pytest.mark.parametrize("backend", HERE)
@some(CASES)
def test_output_and_gradients(case, backend, poisoned):  # noqa: F811
    assert_backend_right(case, backend)


@pytest.mark.parametrize("dtype", LOW)
@some(CASES)
def test_low_precision_loses_no_more_than_plain_attention_does(case, dtype, poisoned):  # noqa: F811
    assert_backend_right(case, "sdpa", dtype)


@some(CASES)
def test_recorded_by_autograd(case, monkeypatch):
    monkeypatch.setattr(op, "has_own_backward", lambda call: False)
    assert_backend_right(case, "sdpa")
    assert_backend_right(case, "sdpa", torch.bfloat16)


@some([case for case in [*SHAPES[1::4], *MASKED[::3]] if not case.k_add])
def test_flex_without_gradients(case):
    inputs, options = make(case)
    inputs = frozen(inputs, *inputs)
    got = {"output": infused_attention(**inputs, **options, backend="flex")}
    assert_right(got, inputs, upstream_of(inputs), **options)


@some([Case(gate, tk=70, d=16, G=1, padding=side) for gate in GATES for side in ("left", None)])
def test_more_tokens_than_a_block(case):
    assert_backend_right(case, "sdpa")
    assert_backend_right(case, "sdpa", torch.float32)


@pytest.mark.parametrize("shape", [(), (8,), (9, 1), (4, 1, 1)])
@some([Case(), Case(M=0), Case("none", M=0, base="mixed"), Case("sequence", G=1, padding="left"), Case("token")])
def test_an_expanded_upstream_gradient(case, shape):
    one = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_backend_right(case, "sdpa", upstream=one.expand(2, 4, 9, 8))


@pytest.mark.parametrize("gate", GATES)
def test_heads_and_samples_may_share_memory(gate):
    inputs, options = make(Case(gate))
    for name in "qkv":
        inputs[name] = inputs[name].detach()[:1, :1].expand(inputs[name].shape).requires_grad_()
    got = run(infused_attention, inputs, upstream_of(inputs), backend="sdpa", **options)
    assert_right(got, inputs, upstream_of(inputs), **options)


@pytest.mark.parametrize("gate", GATES[:2])
def test_zero_v_add_has_a_finite_gradient(gate):
    inputs, options = make(Case(gate))
    for name in ("k_mul", "v_mul", "v_add"):
        inputs[name] = torch.zeros_like(inputs[name]).requires_grad_()
    got = run(infused_attention, inputs, upstream_of(inputs), backend="sdpa", **options)
    assert_right(got, inputs, upstream_of(inputs), **options)
    assert largest(got["head_logit"]) == 0.0


# What a call must leave alone


@some([*SHAPES[::3], *MASKED[::4], *PACKED[::3]])
def test_two_runs_are_equal_and_the_inputs_stay_as_they_are(case):
    inputs, options = make(case, torch.float32)
    before = {n: x.detach().clone() for n, x in (inputs | options).items() if isinstance(x, torch.Tensor)}
    first, again = (run(infused_attention, inputs, upstream_of(inputs), backend="sdpa", **options) for _ in range(2))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert all(torch.equal(x, (inputs | options)[n]) for n, x in before.items())


@pytest.mark.parametrize("case", [Case(gate, M=M) for gate in GATES for M in (0, 1)], ids=str)
def test_results_do_not_share_memory_with_anything(case):
    inputs, options = make(case)
    upstream = upstream_of(inputs)
    kept = upstream.clone()
    got = run(infused_attention, inputs, upstream, backend="sdpa", **options)
    expected = {n: x.clone() for n, x in got.items()}
    assert torch.equal(upstream, kept)
    places = {x.untyped_storage().data_ptr() for x in (upstream, *inputs.values()) if x.numel()}
    assert not places & {x.untyped_storage().data_ptr() for x in got.values() if x.numel()}
    for name, x in got.items():
        x.fill_(float("nan"))
        assert all(torch.equal(got[n], expected[n]) for n in got if n > name)
        x.copy_(expected[name])


# At the start of training, and with nothing to infuse


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tq", [1, 5, 9])
@pytest.mark.parametrize("gate", [gate for gate in GATES if gate != "token"])
def test_zero_maps_are_plain_attention_to_the_last_bit(gate, tq, masked, grad):
    case = Case(gate, tq=tq, padding="left" if masked else None)
    inputs, options = make(case, torch.float32)
    for name in ("k_mul", "v_mul", "v_add"):
        inputs[name] = torch.zeros_like(inputs[name]).requires_grad_()
    mask = torch.ones(1, 1, tq, 9, dtype=torch.bool).tril(9 - tq)
    mask = mask & options["key_padding"][:, None, None] if masked else mask
    whole = tq == 9 and not masked
    plain = F.scaled_dot_product_attention(
        *(inputs[n] for n in "qkv"), is_causal=whole, attn_mask=None if whole else mask, enable_gqa=True
    )
    with torch.set_grad_enabled(grad):
        assert torch.equal(infused_attention(**inputs, **options, backend="sdpa"), plain)


@pytest.mark.parametrize("backend", HERE)
@some([Case(gate, base=base, k_add=True) for gate in GATES for base in (0, 1)])
def test_no_modality_present_is_no_modality(case, backend):
    inputs, options = make(case)
    present = torch.zeros(case.M, case.B, dtype=torch.bool)
    got = run(infused_attention, inputs, upstream_of(inputs), present=present, backend=backend, **options)
    empty = {n: x if n in "qkv" else x[:0] for n, x in inputs.items()}
    assert largest(got["output"] - infused_attention(**empty, **options, backend="reference")) < 1e-14
    assert all(largest(x) == 0.0 for n, x in got.items() if n not in ("q", "k", "v", "output"))


@pytest.mark.parametrize("backend", ["sdpa", "auto"])
@pytest.mark.parametrize("gate", [gate for gate in GATES if gate != "token"])
def test_a_dead_k_add_gets_explicit_zeros(gate, backend):
    inputs, options = make(Case(gate, k_add=True))
    output = infused_attention(**inputs, **options, backend=backend)
    (zeros,) = torch.autograd.grad(output.sum(), inputs["k_add"])
    assert torch.equal(zeros, torch.zeros_like(inputs["k_add"]))


# A mask says what causal, window and key_padding say


@pytest.mark.parametrize("kind", ["bool", "additive", "expanded", "sliced"])
@some([case for case in MASKED if case.softcap is None and case.gate != "token" and not case.k_add])
def test_a_mask_is_the_same_structure_ready_made(case, kind):
    inputs, options = make(case)
    tq, i = inputs["q"].shape[2], torch.arange(9)
    ahead = i[9 - tq :, None] - i
    seen = (ahead >= 0) | (not case.causal)
    seen = seen & (ahead.abs() < (case.window or 99))
    seen = (seen & options.get("key_padding", torch.ones(1, 9, dtype=torch.bool))[:, None])[:, None]
    if kind == "expanded":
        seen = seen.expand(2, 1, tq, 9)
    if kind == "sliced":
        seen = torch.cat([seen, seen], dim=-1)[..., :9]
    mask = seen if kind == "bool" else torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    got = run(infused_attention, inputs, upstream_of(inputs), mask=mask, backend="sdpa", **options)
    assert_right(got, inputs, upstream_of(inputs), **options)


# Decoding


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("padding", [None, "left"])
def test_decoding_token_by_token_is_the_whole_pass(padding, own, monkeypatch):
    monkeypatch.setattr(op, "has_own_backward", op.has_own_backward if own else lambda call: False)
    inputs, options = make(Case(padding=padding, present=True))
    valid = options.pop("key_padding", torch.ones(2, 9, dtype=torch.bool))
    inputs = {n: x.detach() for n, x in inputs.items()}
    whole = infused_attention(**inputs, **options, key_padding=valid, backend="reference")
    state, pieces = None, []
    for start, end in ((0, 4), (4, 5), (5, 6), (6, 8), (8, 9)):
        now = inputs | {n: inputs[n][:, :, a:end] for n, a in (("q", start), ("k", 0), ("v", 0))}
        asked = options | {"key_padding": valid[:, :end], "return_state": True, "backend": "sdpa"}
        piece, sums = infused_attention(**now, **asked, state_in=state)
        assert isinstance(sums, GateSums) and sums.count.shape[-1] == end - start
        state = sums.last()
        pieces.append(piece)
    assert largest(torch.cat(pieces, dim=2) - whole) < 1e-12


@pytest.mark.parametrize("own", [True, False])
def test_a_state_remembers_values_that_are_gone(own, monkeypatch):
    monkeypatch.setattr(op, "has_own_backward", op.has_own_backward if own else lambda call: False)
    inputs, options = make(Case(window=3))
    inputs = {n: x.detach() for n, x in inputs.items()}
    whole = infused_attention(**inputs, **options, backend="reference")
    early = {n: x[:, :, :6] if n in "qkv" else x for n, x in inputs.items()}
    _, state = infused_attention(**early, **options, return_state=True, backend="sdpa")
    late = {n: x[:, :, {"q": 6}.get(n, 4) :] if n in "qkv" else x for n, x in inputs.items()}
    assert largest(infused_attention(**late, **options, state_in=state.last(), backend="sdpa") - whole[:, :, 6:]) < 1e-12


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("padding", [None, "left"])
def test_gradients_of_a_continued_pass(padding, own, monkeypatch):
    monkeypatch.setattr(op, "has_own_backward", op.has_own_backward if own else lambda call: False)
    inputs, options = make(Case(tq=3, padding=padding))
    valid = options.get("key_padding")
    with torch.no_grad():
        _, state = infused_attention(
            **{n: x[:, :, :6] if n in ("k", "v") else x for n, x in inputs.items()},
            **options | {"key_padding": None if valid is None else valid[:, :6]}, return_state=True, backend="sdpa",
        )  # fmt: skip
    upstream = upstream_of(inputs)
    got = run(infused_attention, inputs, upstream, state_in=state.last(), backend="sdpa", **options)
    expected = run(continued, inputs, upstream, state=state.last(), **options)
    for name in expected:
        assert largest(got[name] - expected[name]) < 1e-11 * max(1, largest(expected[name])), name


def continued(q, k, v, k_mul, v_mul, v_add, head_logit, state, key_padding=None, eps=1e-6, **_):
    """The definition with sums that began before: the first tokens' are constants."""
    tq, (B, H, T, d), G = q.shape[2], k.shape, k.shape[1]
    H = q.shape[1]
    valid = torch.ones(B, T, dtype=torch.bool) if key_padding is None else key_padding
    k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    new = torch.where(valid[:, None, -tq:, None], v[:, :, -tq:], 0)
    square = state.square.repeat_interleave(H // G, dim=1) + new.square().sum(-1).cumsum(-1)
    dot = state.dot + (new * v_add[..., None, :]).sum(-1).cumsum(-1)
    count = state.count + valid[:, -tq:].cumsum(-1)
    cosine = dot / (square * count[:, None] * v_add.square().sum(-1)[..., None] + eps**2).sqrt()
    g = torch.sigmoid(head_logit[:, None, :, None] + cosine)[..., None]
    alpha, gamma = (1 + (g * x[..., None, :]).sum(0) for x in (k_mul, v_mul))
    seen = valid[:, None, None] & torch.ones(tq, T, dtype=torch.bool).tril(T - tq)
    weights = torch.softmax(((q * alpha) @ k.mT * d**-0.5).masked_fill(~seen, float("-inf")), dim=-1)
    return weights @ v * gamma + (g * v_add[..., None, :]).sum(0)


# Refusals


def changed(**changes):
    inputs, _ = make(Case(B=2, tk=5))
    return {**{n: x.detach() for n, x in inputs.items()}, **changes}


def zeros(*shape, dtype=torch.float64):
    return torch.zeros(shape, dtype=dtype)


STATE = GateSums(zeros(2, 2, 4, 1), zeros(2, 2, 1), zeros(2, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": zeros(2, 4, 8)}, r"q, k, v must be .* but are \(2, 4, 8\), "),
        ({"v": zeros(2, 2, 4, 8)}, "q, k, v must be"),
        ({"q": zeros(1, 4, 5, 8)}, "q, k, v must be"),
        ({"q": zeros(2, 4, 5, 6)}, "q, k, v must be"),
        ({"q": zeros(2, 3, 5, 8)}, "3 query heads cannot share 2 key/value heads"),
        ({"k": zeros(2, 0, 5, 8), "v": zeros(2, 0, 5, 8)}, "4 query heads cannot share 0"),
        ({"q": zeros(2, 4, 6, 8)}, "6 queries are more than 5 keys"),
        ({"gate": "prefx"}, "gate 'prefx' is unknown: choose one of sequence, prefix"),
        ({"backend": "cuda"}, "backend 'cuda' is unknown: choose one of auto, reference"),
        ({"q": zeros(2, 4, 5, 8, dtype=torch.float32)}, "must share a floating type, but are torch.float32"),
        ({"v": zeros(2, 2, 5, 8, dtype=torch.int64)}, "must share a floating type"),
        ({"window": 0}, "window=0 shows no key"),
        ({"cu_seqlens": bounds([2, 3])}, r"packed q, k, v must be \(1, heads, all tokens, d\)"),
        ({"k_mul": zeros(2, 3, 4, 8)}, r"k_mul must be \(M, B, H, d\) = \(2, 2, 4, 8\), but is \(2, 3, 4, 8\)"),
        ({"v_mul": zeros(1, 2, 4, 8)}, "v_mul must be"),
        ({"v_add": zeros(2, 2, 2, 8)}, "v_add must be"),
        ({"k_add": zeros(2, 2, 4, 4)}, "k_add must be"),
        ({"head_logit": zeros(2, 3)}, r"head_logit must be \(M, H\) = \(2, 4\), but is \(2, 3\)"),
        ({"present": zeros(2, 2)}, r"present must be \(M, B\) = \(2, 2\) bool"),
        ({"present": zeros(2, 3, dtype=torch.bool)}, "present must be"),
        ({"base": zeros(3)}, r"base must be 0, 1 or \(B,\) = \(2,\), but is \(3,\)"),
        ({"key_padding": zeros(2, 4, dtype=torch.bool)}, r"key_padding must be \(B, Tk\) = \(2, 5\) bool"),
        ({"key_padding": zeros(2, 5)}, "key_padding must be"),
        ({"mask": zeros(2, 5, 5)}, r"mask must be \(B or 1, 1, Tq, Tk\)"),
        ({"mask": zeros(2, 1, 5, 4)}, "mask must be"),
        ({"gate": "sequence", "return_state": True}, "gate 'sequence' has no state to decode with"),
        ({"gate": "head", "state_in": STATE}, "gate 'head' has no state"),
        (
            {"state_in": GateSums(*(x.expand(*x.shape[:-1], 2) for x in STATE))},
            "state_in must be the sums of one token",
        ),
        ({"state_in": STATE, "backend": "reference"}, "backend 'reference' cannot do this: .* use backend='auto'"),
    ],
    ids=plain_id,
)
def test_what_does_not_fit_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        infused_attention(**changed(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_padding": torch.ones(1, 5, dtype=torch.bool)}, "cu_seqlens excludes key_padding, mask and state"),
        ({"mask": zeros(1, 1, 5, 5)}, "cu_seqlens excludes"),
        ({"return_state": True}, "cu_seqlens excludes"),
        ({"cu_seqlens": bounds([2, 3]).float()}, r"cu_seqlens must be \(sequences \+ 1,\) integers, but is \(3,\)"),
        ({"cu_seqlens": bounds([2, 3])[None]}, "cu_seqlens must be"),
        ({"cu_seqlens": bounds([])}, "cu_seqlens must be"),
    ],
    ids=plain_id,
)
def test_what_does_not_fit_packed_is_refused_in_one_line(changes, message):
    inputs, options = make(Case(lengths=(2, 3)))
    with pytest.raises(ValueError, match=message) as caught:
        infused_attention(**inputs, **options | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", [name for name in op.BACKENDS if name not in HERE])
def test_backends_that_need_a_gpu_say_so(backend):
    with pytest.raises(ValueError, match=f"backend '{backend}' .*use backend='auto'") as caught:
        infused_attention(**make(Case(), torch.float32)[0], backend=backend)
    assert "\n" not in str(caught.value)


# Which gradients are asked for


FROZEN = (("q", "k", "v"), ("k", "v"), ("k_mul", "v_mul", "v_add", "head_logit"), ("v_add", "q"), ("head_logit", "v"))


@pytest.mark.parametrize("names", FROZEN)
@some([Case(gate, padding="left", k_add=True) for gate in GATES])
def test_frozen_inputs_get_no_gradient(case, names):
    inputs, options = make(case)
    inputs = frozen(inputs, *names)
    got = run(infused_attention, inputs, upstream_of(inputs), backend="sdpa", **options)
    assert not set(names) & set(got)
    assert_right(got, inputs, upstream_of(inputs), **options)


def test_without_gradients_nothing_is_recorded():
    inputs, options = make(Case())
    with torch.no_grad():
        quick = infused_attention(**inputs, **options, backend="sdpa")
    still = infused_attention(**frozen(inputs, *inputs), **options, backend="sdpa")
    assert quick.grad_fn is None and still.grad_fn is None
    assert largest(quick - truth(inputs, upstream_of(inputs), **options)["output"]) < 1e-12
    assert torch.equal(quick, still)
