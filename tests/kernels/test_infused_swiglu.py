"""``infused_swiglu``: the definition, every gradient of the fast form, and the operator's manners under torch."""

import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mitrain_kernels.infused_swiglu import BACKENDS, infused_swiglu, infused_swiglu_reference, op
from swiglu_cases import (
    NAMES,
    PACKED,
    PADDED,
    across,
    assert_backend_right,
    assert_right,
    bounds,
    frozen,
    make,
    poison,
    run,
    strided,
    upstream_of,
)
from torch.utils.checkpoint import checkpoint

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HERE = ("reference", "torch", "auto")


# The definition


def test_the_reference_is_the_definition():
    inputs, _ = make((2, 3, 4))
    gate, up, f = (x.tolist() for x in inputs.values())
    for b, t, i in torch.cartesian_prod(*map(torch.arange, (2, 3, 4))).tolist():
        x = torch.tensor(gate[b][t][i], dtype=torch.float64)
        expected = x / (1 + torch.exp(-x)) * up[b][t][i] * f[b][i]
        assert abs(infused_swiglu_reference(**inputs)[b, t, i] - expected) < 1e-14


@pytest.mark.parametrize("backend", HERE)
def test_packing_is_one_row_per_sample(backend):
    inputs, cu_seqlens = make(6, lengths=[3, 0, 2])
    packed = infused_swiglu(**inputs, cu_seqlens=cu_seqlens, backend=backend)
    first, _, last = (infused_swiglu(*(inputs[n][None, s] for n in NAMES[:2]), inputs["f"][i : i + 1])
                      for i, s in enumerate((slice(0, 3), slice(3, 3), slice(3, 5))))  # fmt: skip
    assert torch.equal(packed, torch.cat([first[0], last[0]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", HERE)
def test_a_factor_of_one_is_the_frozen_activation_to_the_last_bit(dtype, backend):
    inputs, _ = make((3, 11, 70), dtype)
    hidden = F.silu(inputs["gate"]) * inputs["up"]
    assert torch.equal(infused_swiglu(inputs["gate"], inputs["up"], torch.ones(3, 70), backend=backend), hidden)


# Output and gradients against the float64 truth


@pytest.mark.parametrize("block", [1, 8, 100, op.CPU_BLOCK])
@pytest.mark.parametrize("backend", HERE)
def test_output_and_gradients(backend, block, monkeypatch):
    monkeypatch.setattr(op, "CPU_BLOCK", block)
    poison(monkeypatch)
    for shape in PADDED:
        assert_backend_right(make(shape)[0], backend=backend)
    for lengths, width in PACKED:
        assert_backend_right(*make(width, lengths=lengths), backend=backend)


@pytest.mark.parametrize(
    ("shape", "block", "sizes"),
    [((4, 6, 5), 30, [30] * 4), ((4, 6, 5), 60, [60, 60]), ((5, 6, 5), 60, [60, 60, 30]), ((2, 6, 5), 20, [20, 10] * 2),
     ((2, 3, 5), 1, [5] * 6), ((1, 2, 5), 1 << 18, [10])],
)  # fmt: skip
def test_blocks_hold_as_much_as_they_may(shape, block, sizes, monkeypatch):
    monkeypatch.setattr(op, "CPU_BLOCK", block)
    gate = torch.empty(shape)
    assert [gate[where].numel() for where, _ in op.blocks(gate, None)] == sizes
    whole = [gate.to("meta")[where].numel() for where, _ in op.blocks(gate.to("meta"), None)]
    assert whole == [gate.numel()]  # elsewhere memory is not cut


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_low_precision_is_computed_in_float32(dtype, monkeypatch):
    poison(monkeypatch)
    assert_backend_right(make((2, 300, 9), dtype)[0])
    assert_backend_right(*make(9, dtype, lengths=[40, 0, 260]))
    inputs, _ = make((2, 5, 9), dtype)
    inputs["f"] = inputs["f"].detach().to(dtype).requires_grad_()
    assert_backend_right(inputs)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5),
    st.integers(1, 12),
    st.integers(1, 40),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
    st.booleans(),
)
def test_any_shape(batch, tokens, width, dtype, seed, packed):
    if packed:
        lengths = torch.randint(0, tokens + 1, (batch,), generator=torch.Generator().manual_seed(seed)).tolist()
        assert_backend_right(*make(width, dtype, lengths=lengths, seed=seed))
    else:
        assert_backend_right(make((batch, tokens, width), dtype, seed=seed)[0])


@pytest.mark.parametrize("asked", [NAMES[:1], NAMES[1:2], NAMES[2:], NAMES[:2], NAMES[1:], NAMES[::2]])
def test_only_the_gradients_asked_for_are_computed(asked, monkeypatch):
    inputs = frozen(make((2, 7, 5))[0], *set(NAMES) - set(asked))
    computed = []
    backward = op.eager_backward
    monkeypatch.setattr(op, "eager_backward", lambda *args: computed.append(backward(*args)) or computed[-1])
    got = assert_backend_right(inputs)
    assert set(got) == {"output", *asked}
    assert [x.numel() > 0 for x in computed[0]] == [name in asked for name in NAMES]


def test_without_gradients_nothing_is_kept():
    inputs = frozen(make((2, 7, 5))[0], *NAMES)
    assert infused_swiglu(**inputs).grad_fn is None


@pytest.mark.parametrize("layout", [strided, across])
def test_inputs_that_are_not_contiguous(layout):
    assert_backend_right(layout(make((3, 4, 6))[0]))
    inputs, cu_seqlens = make(6, lengths=[2, 3])
    assert_backend_right(layout(inputs), cu_seqlens)


def test_an_expanded_upstream_gradient():
    inputs, _ = make((3, 4, 6))
    for ones in (torch.ones(()), torch.ones(6), torch.ones(4, 1)):
        assert_backend_right(inputs, upstream=ones.double().expand(3, 4, 6))


def test_large_activations_stay_finite():
    inputs, _ = make((1, 4, 3), torch.float32)
    inputs["gate"] = torch.tensor([-1e30, -1e4, 1e4, 3e4]).view(1, 4, 1).expand(1, 4, 3).requires_grad_()
    assert all(x.isfinite().all() for x in run(infused_swiglu, inputs, upstream_of(inputs)).values())


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_compute(shape):
    inputs, _ = make(shape)
    got = run(infused_swiglu, inputs, upstream_of(inputs))
    assert torch.equal(got["f"], torch.zeros_like(inputs["f"])) and got["output"].shape == shape


# What is kept for backward


def test_nothing_but_the_inputs_is_saved():
    inputs, saved = make((2, 7, 5))[0], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        infused_swiglu(**inputs)
    own = {x.data_ptr() for x in inputs.values()}
    assert len(saved) == 3 and {x.data_ptr() for x in saved} == own


def test_under_activation_checkpointing():
    inputs, upstream = make((2, 7, 5))[0], upstream_of(make((2, 7, 5))[0])
    recomputed = run(lambda **i: checkpoint(infused_swiglu, *i.values(), use_reentrant=False), inputs, upstream)
    assert_right(recomputed, inputs, upstream)


def test_a_second_derivative_is_refused():
    inputs, _ = make((2, 3, 4))
    (gradient,) = torch.autograd.grad(infused_swiglu(**inputs).sum(), inputs["gate"], create_graph=True)
    with pytest.raises(RuntimeError, match="infused_swiglu has no second derivative: use backend='reference'"):
        gradient.sum().backward()


# One operator for torch


def test_the_operators_keep_torchs_rules():
    inputs, _ = make((2, 3, 4))
    packed, cu_seqlens = make(4, lengths=[2, 0, 1])
    ops = torch.ops.mitrain_kernels
    for arguments in ((*inputs.values(), None, "auto"), (*packed.values(), cu_seqlens, "torch")):
        torch.library.opcheck(ops.infused_swiglu.default, arguments)
        values = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        for needs in ([True, True, True], [False, True, False]):
            torch.library.opcheck(ops.infused_swiglu_backward.default, (torch.ones_like(values[0]), *values, needs))


@pytest.mark.parametrize("names", [(), ("up",), ("gate", "f")])
def test_called_directly_it_is_the_operator_of_torchs_library(names):
    inputs, _ = make((2, 3, 4))
    inputs, upstream = frozen(inputs, *names), upstream_of(inputs)
    by_library = run(lambda **i: torch.ops.mitrain_kernels.infused_swiglu(*i.values(), None, "auto"), inputs, upstream)
    directly = run(infused_swiglu, inputs, upstream)
    assert set(directly) == set(by_library) == {"output", *NAMES} - set(names)
    assert all(torch.equal(directly[n], by_library[n]) for n in directly)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_it_is_one_node(dynamic):
    seen = []

    def backend(graph, _):
        seen.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch.compiler.reset()
    inputs, upstream = make((2, 7, 5))[0], upstream_of(make((2, 7, 5))[0])
    for compiler in (backend, "aot_eager"):
        compiled = torch.compile(infused_swiglu, backend=compiler, fullgraph=True, dynamic=dynamic)
        assert_right(run(compiled, inputs, upstream), inputs, upstream)
    assert [str(x) for x in seen[0] if "swiglu" in str(x)] == ["mitrain_kernels.infused_swiglu.default"]
    torch.compiler.reset()


def test_exported_it_is_one_node():
    class Module(torch.nn.Module):
        def forward(self, gate, up, f):
            return infused_swiglu(gate, up, f)

    arguments = tuple(x.detach() for x in make((2, 7, 5))[0].values())
    tokens = torch.export.Dim("tokens")
    shapes = {"gate": {1: tokens}, "up": {1: tokens}, "f": None}
    program = torch.export.export(Module(), arguments, dynamic_shapes=shapes)
    longer = tuple(x.detach() for x in make((2, 9, 5))[0].values())
    assert torch.equal(program.module()(*longer), infused_swiglu(*longer))
    assert sum("infused_swiglu" in str(node.target) for node in program.graph.nodes) == 1


def test_under_autocast():
    gate, up, f = (x.detach().float() for x in make((2, 7, 5))[0].values())
    weight = torch.randn(5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = infused_swiglu(gate @ weight, up @ weight, f.requires_grad_())
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert weight.grad.dtype == f.grad.dtype == torch.float32 and f.grad.abs().min() > 0


# Refusals, and who is chosen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "cuda"}, "backend 'cuda' is unknown: choose one of auto, reference, torch, triton"),
        ({"backend": "triton"}, "backend 'triton' does not compute in float64"),
        ({"up": torch.ones(2, 3, 4)}, "of one floating-point type and f of any, not torch.float64, torch.float32"),
        ({"f": torch.ones(2, 4, dtype=torch.int64)}, "floating-point"),
        ({"up": torch.ones(2, 4, 4).double()}, r"must both be \(B, T, F\), not \(2, 3, 4\) and \(2, 4, 4\)"),
        ({"f": torch.ones(3, 4)}, r"f must be one row per sample, \(2, 4\), not \(3, 4\)"),
        ({"f": torch.ones(2, 1)}, r"f must be one row per sample, \(2, 4\), not \(2, 1\)"),
        ({"f": torch.ones(2, 1, 4)}, r"not \(2, 1, 4\)"),
        ({"f": torch.ones(2, 4, device="meta")}, "on one device, not cpu, cpu and meta"),
        ({"cu_seqlens": bounds([3])}, r"must both be \(R, F\) with cu_seqlens, not \(2, 3, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        infused_swiglu(**{**make((2, 3, 4))[0], **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (bounds([3, 2]).long(), r"cu_seqlens must be \(S \+ 1,\) int32, not \(3,\) torch.int64"),
        (bounds([3, 2])[None], r"\(S \+ 1,\) int32"),
        (bounds([]), r"\(S \+ 1,\) int32"),
        (bounds([3, 1]), r"must rise from 0 to the number of tokens, 5: \[0, 3, 4\]"),
        (bounds([7, -2]), "must rise from 0"),
        (bounds([3, 2]) + 1, "must rise from 0"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_wrong_bounds_are_refused(cu_seqlens, message, backend):
    inputs, _ = make(4, lengths=[3, 2])
    with pytest.raises(ValueError, match=message):
        infused_swiglu(**inputs, cu_seqlens=cu_seqlens, backend=backend)


@pytest.mark.parametrize(
    ("device", "wide", "choice"), [("cpu", False, "torch"), ("cuda", False, "triton"), ("cuda", True, "torch")]
)
def test_auto_says_once_what_it_chose(device, wide, choice, caplog):
    op.automatic.cache_clear()
    with caplog.at_level(logging.INFO, logger="mitrain_kernels"):
        assert [op.automatic(device, wide) for _ in range(3)] == [choice] * 3
    assert len(caplog.messages) == 1 and f"backend '{choice}'" in caplog.messages[0]
    op.automatic.cache_clear()


def test_triton_needs_a_gpu(monkeypatch):
    from mitrain_kernels.infused_swiglu import triton_kernel

    monkeypatch.setattr(triton_kernel, "INTERPRETED", False)
    with pytest.raises(ValueError, match="backend 'triton' needs a GPU, but tensors are on cpu: use backend='torch'"):
        infused_swiglu(**make((2, 3, 4), torch.float32)[0], backend="triton")


# The kernels compile for every target; what they compute is tested in interpreted/ and, here, on a GPU


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_audit_cases_name_every_argument(target):
    from bench.machine_code.swiglu_cases import audit_cases

    cases = audit_cases(target)
    assert [case.name for case in cases] == ["infused_swiglu_forward", "infused_swiglu_backward"]
    for case in cases:
        assert not case.dots and case.kernel.arg_names == [
            name for name in case.kernel.arg_names if (name in case.signature) != (name in case.constants)
        ]
        assert set(case.aligned) <= set(case.signature)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(backend, dtype):
    if backend == "triton" and dtype == torch.float64:
        return
    for shape in [*PADDED, (2, 700, 1030), (1, 4096, 512)]:
        inputs, _ = make(shape, dtype, device="cuda")
        assert_backend_right(inputs, backend=backend)
        assert_backend_right(strided(inputs), backend=backend)
        assert_backend_right(inputs, backend=backend, upstream=torch.ones((), dtype=dtype, device="cuda").expand(shape))
    for lengths, width in [*PACKED, ([3000, 1, 0, 40], 520)]:
        inputs, cu_seqlens = make(width, dtype, lengths=lengths, device="cuda")
        first, again = (assert_backend_right(inputs, cu_seqlens, backend) for _ in range(2))
        assert all(torch.equal(first[name], again[name]) for name in first)
