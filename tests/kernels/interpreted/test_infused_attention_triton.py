"""The Triton kernels of ``infused_attention`` against the float64 reference: output and every gradient.

Tiles are 16 by 16 here, so that 20 tokens are two blocks with a ragged end.
"""

import pytest
import torch
from attention_cases import (
    GATES,
    HIDDEN,
    NAMES,
    Case,
    assert_hidden_is_nothing,
    assert_right,
    faint,
    frozen,
    largest,
    make,
    poisoned,
    run,
    some,
    truth,
    upstream_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mitrain_kernels.infused_attention import infused_attention, triton_launch

__all__ = ["poisoned"]
SMALL = {"B": 2, "H": 2, "G": 1, "d": 16, "tk": 20, "M": 1}


def small(gate="prefix", **changes):
    return Case(gate, **SMALL | changes)


CASES = [
    *(small(gate, B=1) for gate in GATES),
    *(small(gate, M=3, base="mixed", present=True, tq=5, padding="left") for gate in GATES),
    *(small(gate, M=2, lengths=(2, 0, 18), present=True) for gate in GATES),
    *(small(gate, padding="all", d=20, tk=18, M=2, base=0) for gate in GATES),
    small("prefix", tk=37, H=3, B=1),
    small("sequence", padding="right", causal=False),
    small("token", tk=33, window=5, B=1, k_add=True),
    small("prefix", window=6, tk=35, H=1, B=1),
    small("token", window=3, causal=False, B=1),
    small("prefix", window=3, causal=False, tq=18, padding="left"),
    small("prefix", softcap=2.0, padding="left", M=2),
    small("token", softcap=2.0, k_add=True, base=0, M=2),
    small("token", k_add=True, lengths=(3, 17), causal=False),
    small("prefix", M=0),
    small("token", M=0, tk=9),
    small("prefix", tk=1, B=1, H=1, M=4),
    small("sequence", tq=1, H=4, G=2, M=2),
    small("prefix", lengths=(4, 18), window=4, base="mixed", layout="tokens first"),
    small("prefix", layout="columns", tq=7, scale=0.5),
    small("token", layout="tokens first", d=5, tk=12),
    *(small("prefix", B=1, H=1, tq=4, tk=tk) for tk in (18, 19)),  # the first query sees one key less than a tile, or all
]


def assert_kernel_right(case, dtype=torch.float32, hidden=(), upstream=None, names=(), seed=0):
    """``hidden``: inputs whose padding rows are NaN. Converting to bfloat16 truncates here: twice the rounding."""
    inputs, options = make(case, dtype, seed)
    inputs = frozen(inputs, *names)
    upstream = upstream_of(inputs) if upstream is None else upstream
    given = dict(inputs)
    for name in hidden:
        rows = ~options["key_padding"][:, None, -inputs[name].shape[2] :, None]
        given[name] = inputs[name].detach().masked_fill(rows, float("nan")).requires_grad_()
    got = run(infused_attention, given, upstream, backend="triton", **options)
    assert_right(got, inputs, upstream, slack=2 if dtype == torch.bfloat16 else 1, **options)
    return got


@some(CASES)
def test_output_and_gradients(case, poisoned):
    assert_kernel_right(case)


ONE = {"B": 1, "H": 1}


TILES = [
    triton_launch.Tile(32, 16, 4, 1),
    triton_launch.Tile(16, 32, 4, 1),
    triton_launch.Tile(32, 16, 4, 1, apart=True),  # dV and dK one after the other
]


@pytest.mark.parametrize("tile", TILES, ids=str)
@some(
    [
        small("prefix", **ONE, tk=70),  # a block's tiles: masked by causality, whole, and a ragged one
        small("prefix", **ONE, tk=53, tq=37, padding="left"),
        small("none", **ONE, tk=41, causal=False),
        small("prefix", **ONE, tk=50, window=20),
        small("token", **ONE, tk=50),
        small("head", **ONE, lengths=(40, 0, 21)),
    ]
)
def test_tiles_that_are_not_square(case, tile, poisoned, monkeypatch):
    monkeypatch.setattr(triton_launch, "tile_for", lambda *_: tile)
    assert_kernel_right(case)


@some([small(gate, tk=37, H=1, B=1, M=2) for gate in ("prefix", "sequence", "token")])
def test_scans_go_on_from_block_to_block(case, poisoned, monkeypatch):
    monkeypatch.setattr(triton_launch, "SCAN", 16)
    assert_kernel_right(case)


@some([small(gate, B=1, padding=side) for gate, side in zip(GATES[:3], ("right", "left", "right"), strict=True)])
def test_padded_keys_and_values_may_hold_anything(case, poisoned):
    got = assert_kernel_right(case, hidden=("k", "v"))
    rows = slice(-2, None) if case.padding == "right" else slice(0, 2)
    assert all(largest(got[name][0, :, rows]) == 0.0 for name in ("k", "v"))


@some([small(gate, B=1, tk=18) for gate in ("prefix", "sequence", "token")])
def test_the_root_adds_epsilon_squared(case, poisoned):
    inputs, options = faint(case)
    got = run(infused_attention, inputs, upstream_of(inputs), backend="triton", **options)
    assert_right(got, inputs, upstream_of(inputs), **options)


@pytest.mark.parametrize("what", HIDDEN)
@some([small(gate, M=2, H=1, present=True, padding="right", tk=18) for gate in ("prefix", "sequence", "token")])
def test_nothing_that_is_hidden_counts(case, what, poisoned):
    assert_hidden_is_nothing(case, "triton", what, torch.nan if what in "qkv" else torch.inf)


@some([small(gate, M=2, H=1, tk=5) for gate in ("prefix", "token", "sequence", "head")])
def test_a_modality_that_no_sample_has_may_have_a_logit_that_is_nan(case, poisoned):
    inputs, options = make(case, torch.float32)
    inputs["head_logit"] = torch.cat([inputs["head_logit"].detach()[:1], torch.full((1, 1), torch.nan)])
    options["present"] = torch.tensor([[True, True], [False, False]])
    got = run(infused_attention, inputs, upstream_of(inputs), backend="triton", **options)
    assert all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@some([small("prefix", B=1, padding="left"), small("token", B=1, k_add=True)])
def test_low_precision(case, dtype, poisoned):
    assert_kernel_right(case, dtype)


FROZEN = (("q", "k", "v"), ("k", "v"), ("k_mul", "v_mul", "v_add", "head_logit"), ("q",))


@pytest.mark.parametrize("names", FROZEN)
@some([small(gate, B=1, tk=17) for gate in ("prefix", "token")])
def test_frozen_inputs(case, names, poisoned):
    got = assert_kernel_right(case, names=names)
    assert not set(names) & set(got)


@some([small("prefix", H=1, B=1)])
def test_the_lowest_layer_runs_no_kernel_for_keys(case, monkeypatch):
    def unwanted(*_, **__):
        raise AssertionError("dK and dV are computed for nobody")

    monkeypatch.setattr(triton_launch, "key_side", unwanted)
    assert_kernel_right(case, names=("q", "k", "v"))


@pytest.mark.parametrize("shape", [(), (16,), (9, 1)])
def test_an_expanded_upstream_gradient(shape):
    one = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert_kernel_right(small("prefix", tk=9), upstream=one.expand(2, 2, 9, 16))


@settings(deadline=None, max_examples=6, derandomize=True)
@given(
    st.sampled_from(GATES),
    st.integers(0, 3),
    st.integers(1, 2),
    st.sampled_from([(1, 1), (2, 1), (2, 2), (6, 2)]),
    st.integers(1, 40),
    st.integers(1, 32),
    st.data(),
)
def test_any_shape(gate, M, B, heads, tk, d, data):
    tq = data.draw(st.integers(1, tk))
    more = {
        "padding": data.draw(st.sampled_from([None, "left", "right", "all"])) if tk > 2 else None,
        "window": data.draw(st.sampled_from([None, None, 1, 7])),
        "causal": data.draw(st.booleans()),
        "present": data.draw(st.booleans()),
        "base": data.draw(st.sampled_from([0, 1, "mixed"])),
    }
    assert_kernel_right(Case(gate, M=M, B=B, H=heads[0], G=heads[1], tk=tk, tq=tq, d=d, **more))


# Decoding: split keys, and the gate's state


@pytest.mark.parametrize("programs", [1, 99])
@some(
    [small(gate, tq=1, tk=40, M=2, padding="all") for gate in GATES if gate != "token"]
    + [small("prefix", tq=1, tk=33, window=7), small("prefix", tq=1, softcap=2.0, H=6, G=2, base="mixed", M=0)]
)
def test_decoding_without_gradients(case, programs, poisoned, monkeypatch):
    monkeypatch.setattr(triton_launch, "PROGRAMS", programs)
    monkeypatch.setattr(triton_launch, "DECODE", triton_launch.DECODE._replace(step=16))
    inputs, options = make(case, torch.float32)
    inputs = frozen(inputs, *inputs)
    got = {"output": infused_attention(**inputs, **options, backend="triton")}
    assert_right(got, inputs, upstream_of(inputs), **options)


@pytest.mark.parametrize("M", [2, 0])
@pytest.mark.parametrize("padding", [None, "left"])
def test_token_by_token_is_the_whole_pass(padding, M, poisoned):
    inputs, options = make(small("prefix", padding=padding, M=M, tk=21, present=M > 0), torch.float32)
    inputs = frozen(inputs, *inputs)
    expected = truth(inputs, upstream_of(inputs), **options)["output"]
    valid, state, pieces = options.pop("key_padding", torch.ones(2, 21, dtype=torch.bool)), None, []
    for start, end in ((0, 17), (17, 18), (18, 20), (20, 21)):
        now = inputs | {n: inputs[n][:, :, a:end] for n, a in (("q", start), ("k", 0), ("v", 0))}
        asked = options | {"key_padding": valid[:, :end], "return_state": True, "backend": "triton"}
        piece, sums = infused_attention(**now, **asked, state_in=state)
        state = sums.last()
        pieces.append(piece)
    assert_right({"output": torch.cat(pieces, dim=2)}, inputs, upstream_of(inputs), **options, key_padding=valid)
    assert expected.shape == inputs["q"].shape and torch.equal(state.count[:, 0], valid.sum(1).float())


def test_gradients_of_a_continued_pass(poisoned):
    """Only the new tokens' values are in the sums: as ``sdpa`` has it, whose own test is against the definition."""
    inputs, options = make(small("prefix", tq=4, padding="left", M=2), torch.float32)
    early = {n: x.detach()[:, :, :16] if n in ("k", "v") else x.detach() for n, x in inputs.items()}
    early["q"], valid = torch.zeros(2, 2, 16, 16), options["key_padding"]
    _, state = infused_attention(**early, key_padding=valid[:, :16], return_state=True, backend="sdpa")
    exact = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    wide = type(state)(*(x.double() for x in state.last()))
    expected = run(infused_attention, exact, upstream_of(exact), state_in=wide, backend="sdpa", **options)
    got = run(infused_attention, inputs, upstream_of(inputs), state_in=state.last(), backend="triton", **options)
    for name, result in got.items():
        assert largest(result - expected[name]) < 1e-5 * max(1.0, largest(expected[name])), name
    assert set(got) == {"output", *NAMES}


def test_two_runs_are_equal():
    first, again = (assert_kernel_right(small("prefix", B=1, tk=17)) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


# What the kernels cannot do


def test_refusals():
    inputs, options = make(small("prefix", k_add=True, softcap=2.0), torch.float32)
    with pytest.raises(ValueError, match="backend 'triton' cannot do this: k_add is alive under a softcap"):
        infused_attention(**inputs, **options, backend="triton")
    with pytest.raises(ValueError, match="backend 'triton' cannot do this: it does not compute in float64"):
        infused_attention(**make(small())[0], backend="triton")
    for scale in (0.0, -1.0):
        inputs, options = make(small(scale=scale), torch.float32)
        with pytest.raises(ValueError, match=f"backend 'triton' cannot do this: scale is {scale}"):
            infused_attention(**inputs, **options, backend="triton")
