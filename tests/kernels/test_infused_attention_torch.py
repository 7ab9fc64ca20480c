"""``infused_attention`` among torch's own machinery: autocast, checkpointing, compile, export, and what is saved."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from attention_cases import GATES, NAMES, Case, assert_right, frozen, largest, make, run, some, upstream_of
from mitrain_kernels.infused_attention import Call, GateSums, infused_attention, op, sdpa
from torch.utils.checkpoint import checkpoint

FOLDING = tuple(gate for gate in GATES if gate != "token")
OPS = torch.ops.mitrain_kernels
SOME = [Case(gate) for gate in GATES] + [
    Case(tq=4, padding="all", present=True, base="mixed"),
    Case("sequence", M=0),
    Case("token", k_add=True, padding="left"),
    Case(window=3, G=4),
]


# What is kept for backward


def saved_bytes(function, inputs):
    """Bytes of the storages that backward will read, the inputs' included."""
    sizes = {}

    def keep(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = function(**inputs)
    assert output.grad_fn is not None
    return sum(sizes.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [128, 512])
@pytest.mark.parametrize("gate", FOLDING)
def test_little_more_is_saved_than_by_plain_attention(gate, tokens, dtype):
    inputs, options = make(Case(gate, M=1, B=4, H=9, G=3, d=64, tk=tokens), dtype)
    plain = saved_bytes(
        lambda q, k, v, **_: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), inputs
    )
    assert saved_bytes(lambda **i: infused_attention(**i, **options, backend="sdpa"), inputs) <= 1.05 * plain


@pytest.mark.parametrize("gate", FOLDING)
def test_the_masks_of_a_padded_batch_are_all_that_is_added(gate):
    inputs, options = make(Case(gate, M=1, B=2, H=8, G=2, d=64, tk=64), torch.float32)
    valid = torch.ones(2, 64, dtype=torch.bool)
    plain = saved_bytes(lambda **i: infused_attention(**i, **options, backend="sdpa"), inputs)
    padded = saved_bytes(lambda **i: infused_attention(**i, **options, key_padding=valid, backend="sdpa"), inputs)
    assert padded <= plain + 2 * 64 * 64 + 2 * (2 * 64) + 8 * 64


# The gradient's ways


@some(SOME)
def test_under_activation_checkpointing(case):
    inputs, options = make(case)

    def layer(*tensors):
        return infused_attention(**dict(zip(inputs, tensors, strict=True)), **options, backend="sdpa")

    straight = run(infused_attention, inputs, upstream_of(inputs), **options, backend="sdpa")
    again = run(lambda **i: checkpoint(layer, *i.values(), use_reentrant=False), inputs, upstream_of(inputs))
    assert all(torch.equal(straight[name], again[name]) for name in straight)


@pytest.mark.parametrize("gate", FOLDING)
def test_a_second_derivative_is_refused(gate):
    inputs, options = make(Case(gate))
    output = infused_attention(**inputs, **options, backend="sdpa")
    (gradient,) = torch.autograd.grad(output.sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="use backend='reference' for second derivatives") as caught:
        gradient.sum().backward()
    assert "\n" not in str(caught.value)


def test_the_reference_has_a_second_derivative():
    inputs, options = make(Case(B=1, H=2, G=1, tk=3, d=2))
    names = [n for n in inputs if n != "head_logit"]

    def attend(*tensors):
        own = inputs | dict(zip(names, tensors, strict=True))
        return infused_attention(**own, **options, backend="reference")

    assert torch.autograd.gradgradcheck(attend, [inputs[n] for n in names])


@pytest.mark.parametrize("asked", [NAMES[:1], NAMES[2:3], NAMES[3:], NAMES[3:4], NAMES[6:], NAMES[::2]])
def test_only_the_gradients_asked_for_leave_the_operator(asked, monkeypatch):
    inputs, options = make(Case())
    inputs = frozen(inputs, *set(NAMES) - set(asked))
    returned, backward = [], op.compute_gradients
    monkeypatch.setattr(op, "compute_gradients", lambda *a: returned.append(backward(*a)) or returned[-1])
    got = run(infused_attention, inputs, upstream_of(inputs), **options, backend="sdpa")
    assert set(got) == {"output", *asked}
    assert [x.numel() > 0 for x in returned[0]] == [name in asked for name in (*NAMES, "k_add")]
    assert_right(got, inputs, upstream_of(inputs), **options)


def test_backward_meets_the_queries_that_forward_attended_with(monkeypatch):
    """In low precision the forward pass rounds q ⊙ α; weights of what was not rounded would be others."""
    seen, backward = [], "_scaled_dot_product_flash_attention_for_cpu_backward"
    aten = SimpleNamespace(_scaled_dot_product_flash_attention_for_cpu=sdpa.aten._scaled_dot_product_flash_attention_for_cpu)
    setattr(aten, backward, lambda *a, **o: seen.append(a[1]) or getattr(torch.ops.aten, backward)(*a, **o))
    monkeypatch.setattr(sdpa, "aten", aten)
    inputs, options = make(Case(), torch.bfloat16)
    run(infused_attention, inputs, upstream_of(inputs), **options, backend="sdpa")
    (q,) = seen
    assert q.dtype == torch.float32 and torch.equal(q, q.bfloat16().float())


def test_nothing_happens_without_an_upstream_gradient():
    inputs, options = make(Case())
    output, state = infused_attention(**inputs, **options, return_state=True, backend="sdpa")
    assert output.requires_grad and not any(x.requires_grad for x in state)


# Autocast


@pytest.mark.parametrize("backend", ["sdpa", "auto"])
@some(SOME)
def test_autocast_hands_over_what_torchs_attention_gets(case, backend):
    inputs, options = make(case, torch.float32)
    upstream = upstream_of(inputs).bfloat16()

    def cast(q, k, v, **others):
        return infused_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **others)

    by_hand = run(cast, inputs, upstream, **options, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        automatic = run(infused_attention, inputs, upstream, **options, backend=backend)
    assert automatic["output"].dtype == torch.bfloat16 and automatic["k_mul"].dtype == torch.float32
    if case.gate != "token":
        assert all(torch.equal(by_hand[name], automatic[name]) for name in by_hand)


@some(SOME)
def test_autocast_activations_meet_maps_in_float32(case):
    inputs, options = make(case, torch.float32)
    low = {n: x.detach().bfloat16().requires_grad_() if n in "qkv" else x for n, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        output = infused_attention(**low, **options)
    assert output.dtype == torch.bfloat16
    got = {"output": output.detach()}
    asked = torch.autograd.grad(output, list(low.values()), upstream_of(low), allow_unused=True)
    got |= {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(low.items(), asked, strict=True)}
    assert_right(got, low, upstream_of(low), **options)


# One operator for torch


def arguments(case, trains=True, state=None, dtype=torch.float64):
    """Those of the operator for the CPU's own path."""
    inputs, options = make(case, dtype)
    return *op.pack(Call(**inputs, **options, state_in=state), "sdpa"), "sdpa", trains


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@some(
    [
        Case("prefix"),
        Case("prefix", layout="tokens first"),
        Case(tq=4, padding="all", present=True, base="mixed"),
        Case("sequence", layout="columns", base=0),
        Case("sequence", tq=1),
        Case("head", M=0, padding="left"),
        Case("none", layout="tokens first"),
    ]
)
def test_the_operators_keep_torchs_rules(case, dtype):
    given = arguments(case, dtype=dtype)
    torch.library.opcheck(OPS.infused_attention.default, given)
    still = [x.detach() if isinstance(x, torch.Tensor) else x for x in given]
    torch.library.opcheck(OPS.infused_attention.default, (*still[:-1], False))
    output, *kept, _, square, count = OPS.infused_attention.default(*still)
    for needs in ([True] * 7 + [False], [False, False, False, True, False, True, True, False]):
        rest = (still[: op.SAVED], [*kept, square, count], *still[op.SAVED : -1], needs)
        torch.library.opcheck(OPS.infused_attention_backward.default, (torch.ones_like(output), *rest))


def test_the_operators_keep_torchs_rules_with_a_state():
    inputs, _ = make(Case(tq=3))
    with torch.no_grad():
        _, state = infused_attention(**{n: x[:, :, :6] if n in "kv" else x for n, x in inputs.items()},
                                     return_state=True, backend="sdpa")  # fmt: skip
    torch.library.opcheck(OPS.infused_attention.default, arguments(Case(tq=3), state=state.last()))


def names_of(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("backend", ["sdpa", "auto"])
@some([case for case in SOME if case.gate != "token"])
def test_compiled_it_is_one_node(case, backend):
    seen = []

    def look(graph, _):
        seen.append(names_of(graph.graph))
        return graph.forward

    torch.compiler.reset()
    inputs, options = make(case)
    for compiler in (look, "aot_eager"):
        compiled = torch.compile(infused_attention, backend=compiler, fullgraph=True)
        got = run(compiled, inputs, upstream_of(inputs), **options, backend=backend)
        assert_right(got, inputs, upstream_of(inputs), **options)
    assert [name for name in seen[0] if "infused" in name] == ["mitrain_kernels.infused_attention.default"]
    assert not [name for name in seen[0] if "matmul" in name or "softmax" in name]
    torch.compiler.reset()


def test_compiled_for_any_number_of_tokens():
    torch.compiler.reset()
    compiled = torch.compile(infused_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (9, 12, 17):
        inputs, options = make(Case(tk=tokens, padding="left"))
        got = run(compiled, inputs, upstream_of(inputs), **options, backend="sdpa")
        assert_right(got, inputs, upstream_of(inputs), **options)
    torch.compiler.reset()


def test_exported_it_is_one_node():
    class Module(torch.nn.Module):
        def forward(self, q, k, v, k_mul, v_mul, v_add, head_logit):
            return infused_attention(q, k, v, k_mul, v_mul, v_add, head_logit, backend="sdpa")

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    shapes = {name: {2: tokens} if name in "qkv" else None for name in NAMES}
    given = tuple(x.detach() for x in make(Case())[0].values())
    program = torch.export.export(Module(), given, dynamic_shapes=shapes)
    longer = tuple(x.detach() for x in make(Case(tk=13))[0].values())
    assert largest(program.module()(*longer) - infused_attention(*longer, backend="sdpa")) == 0.0
    assert sum("infused_attention" in name for name in names_of(program.graph)) == 1


def test_a_call_survives_packing():
    inputs, options = make(Case(window=3, padding="left", present=True, scale=0.5))
    inputs["k_add"] = torch.zeros(2, 2, 4, 8)
    mask, state = torch.ones(1, 1, 9, 9, dtype=torch.bool), GateSums(*torch.ones(3, 1))
    for base, softcap in ((torch.tensor([0, 1]), None), (0.0, 2.0), (1.0, None)):
        call = Call(**inputs, **options | {"base": base, "softcap": softcap, "mask": mask, "state_in": state, "eps": 0.1})
        again = vars(op.unpack(*op.pack(call, "sdpa")))
        expected = vars(call) | {"k_add": call.k_add if softcap else None}
        assert [name for name in expected if not same(again[name], expected[name])] == []
        assert op.unpack(*op.pack(call, "triton")).mask is None


def same(x, y):
    if isinstance(x, GateSums):
        return all(a is b for a, b in zip(x, y, strict=True))
    return x is y if isinstance(x, torch.Tensor) else x == y
