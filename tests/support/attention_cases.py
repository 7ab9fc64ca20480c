"""What every backend of ``infused_attention`` is held to: cases, the float64 truth and tolerances derived from it."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from mitrain_kernels.infused_attention import infused_attention, infused_attention_reference

NAMES = ("q", "k", "v", "k_mul", "v_mul", "v_add", "head_logit")
GATES = ("sequence", "prefix", "token", "head", "none")
EXACT = 1e-11  # float64: sums of at most a few thousand products, whose roundings of 2⁻⁵³ add up to a hundredth of it


@dataclass(frozen=True)
class Case:
    """One way to call ``infused_attention``; ``lengths`` packs sequences, tq = tk unless given."""

    gate: str = "prefix"
    M: int = 2
    B: int = 2
    H: int = 4
    G: int = 2
    tk: int = 9
    tq: int | None = None
    d: int = 8
    base: int | str = 1
    padding: str | None = None
    present: bool = False
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    k_add: bool = False
    lengths: tuple[int, ...] | None = None
    layout: str = "contiguous"

    def __str__(self) -> str:
        changed = {n: x for n, x in vars(self).items() if n != "gate" and x != getattr(Case, n)}
        return "-".join([self.gate, *(f"{n}={x}" for n, x in changed.items())]).replace(" ", "")

    @property
    def samples(self) -> int:
        return self.B if self.lengths is None else len(self.lengths)


SHAPES = [
    *(Case(gate) for gate in GATES),
    *(Case(gate, M=M, base=base) for gate, M, base in zip(GATES, (0, 1, 3, 4, 1), (0, 0, 0, "mixed", 0), strict=True)),
    *(Case(gate, M=0) for gate in ("prefix", "token")),
    *(Case(gate, M=4, present=True, base="mixed", tq=4) for gate in GATES),
    *(Case(gate, tq=1) for gate in GATES),
    *(Case(gate, tk=1) for gate in ("prefix", "sequence", "token")),
    Case(B=1, H=1, G=1, tk=1, M=1),
    Case("token", B=1, H=1, G=1, M=3, base=0),
    Case(H=3, G=1),
    Case("sequence", H=6, G=6, M=1),
    Case("prefix", H=6, G=3, d=20, tk=11),
    Case("sequence", d=80, M=3, base=0),
    Case("token", d=20),
    Case("none", d=1, M=1),
    Case(scale=0.9),
]
MASKED = [
    *(Case(gate, padding=side) for gate in GATES for side in ("left", "right")),
    *(Case(gate, padding="all", tq=6, M=1) for gate in GATES),
    Case(padding="all"),
    Case(padding="all", k_add=True),
    Case(padding="all", base="mixed", window=3, present=True),
    *(Case(gate, window=3, padding="left") for gate in GATES),
    Case("prefix", window=2, tq=4),
    Case("sequence", window=1),
    *(Case(gate, causal=False, padding="right") for gate in GATES),
    Case("prefix", causal=False, tq=4),
    Case("prefix", causal=False, window=3, padding="all", tq=7),
    Case("token", causal=False, window=2),
    *(Case(gate, softcap=2.0, padding="left") for gate in ("prefix", "sequence", "token")),
    Case("token", k_add=True, padding="all", tq=5, base=0),
    Case("token", k_add=True, softcap=2.0, present=True),
]
BENT = [Case(gate, softcap=2.0, k_add=True, padding="all", M=3) for gate in ("prefix", "sequence", "head", "none")]
PACKED = [
    *(Case(gate, lengths=(4, 0, 7, 1)) for gate in GATES),
    *(Case(gate, lengths=(3, 5), present=True, base="mixed", M=3) for gate in GATES),
    Case("prefix", lengths=(6, 2), window=2, layout="tokens first"),
    Case("token", lengths=(5, 0, 3), causal=False, k_add=True, M=1),
    Case("sequence", lengths=(5,), H=3, G=1, M=0),
]
LAYOUTS = [Case(gate, layout="tokens first") for gate in GATES] + [
    Case("prefix", layout="columns", tq=5, padding="left"),
    Case("token", layout="columns", M=1),
]
CASES = SHAPES + MASKED + BENT + PACKED + LAYOUTS


def some(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


def laid_out(x, layout):
    if layout == "tokens first":  # (B, T, H, d) in memory, as a projection makes it
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.mT.contiguous().mT if layout == "columns" else x


def bounds(lengths, device="cpu"):
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def padding_mask(case):
    """(B, Tk): row 0 hides two tokens at a side, and with 'all' the last row every one."""
    valid = torch.ones(case.B, case.tk, dtype=torch.bool)
    valid[0, slice(-2, None) if case.padding == "right" else slice(0, 2)] = False
    valid[-1] = valid[-1] & (case.padding != "all")
    return valid


def make(case, dtype=torch.float64, seed=0, device="cpu"):
    """(inputs that require a gradient, the other arguments)."""
    generator = torch.Generator().manual_seed(seed)
    B, tk = (case.B, case.tk) if case.lengths is None else (1, sum(case.lengths))
    tq = tk if case.tq is None else case.tq
    maps = (case.M, case.samples, case.H, case.d)
    shapes = [(B, case.H, tq, case.d), *[(B, case.G, tk, case.d)] * 2, *[maps] * 3, (case.M, case.H), maps]
    names = NAMES + (("k_add",) if case.k_add else ())
    inputs = {}
    for name, shape in zip(names, shapes, strict=False):
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * (1 if len(shape) < 4 or name in "qkv" else 0.6)
        x = laid_out(x, case.layout) if name in "qkv" else x
        inputs[name] = x.to(device, dtype).requires_grad_()
    return inputs, options_of(case, device)


def faint(case, dtype=torch.float32):
    """Values and v_add so small that the root's ε² counts, and ε in its place would be all that counts."""
    inputs, options = make(case, dtype)
    small = {n: (inputs[n].detach() * by).requires_grad_() for n, by in (("v", 1e-6), ("v_add", 1e-3))}
    return inputs | small, options


def options_of(case, device="cpu"):
    options = {n: getattr(case, n) for n in ("gate", "causal", "window", "softcap", "scale")}
    options["base"] = torch.arange(case.samples, device=device) % 2 if case.base == "mixed" else case.base
    if case.padding:
        options["key_padding"] = padding_mask(case).to(device)
    if case.present:
        odd = torch.arange(case.M)[:, None] + torch.arange(case.samples)
        options["present"] = (odd % 3 != 1).to(device)
    if case.lengths is not None:
        options["cu_seqlens"] = bounds(case.lengths, device)
    return options


def upstream_of(inputs, seed=9):
    q = inputs["q"]
    return torch.randn(q.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(q.device, q.dtype)


def run(function, inputs, upstream, **options):
    """The output and the gradients of those inputs that ask for one, zeros where nothing reaches it."""
    output = function(**inputs, **options)
    asked = {n: x for n, x in inputs.items() if x.requires_grad}
    found = torch.autograd.grad(output, list(asked.values()), upstream, allow_unused=True) if asked else ()
    gradients = {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(asked.items(), found, strict=True)}
    return {"output": output.detach(), **gradients}


def defined(**call):
    """The definition; packed sequences one by one."""
    bounds = call.pop("cu_seqlens", None)
    if bounds is None:
        return infused_attention_reference(**call)
    pieces = []
    for i, (start, end) in enumerate(zip(bounds.tolist(), bounds.tolist()[1:], strict=False)):
        own = {n: call[n][:, :, start:end] for n in "qkv"}
        own |= {n: call[n][:, i : i + 1] for n in ("k_mul", "v_mul", "v_add", "k_add", "present") if n in call}
        base = call["base"][i : i + 1] if isinstance(call["base"], torch.Tensor) else call["base"]
        pieces.append(infused_attention_reference(**{**call, **own, "base": base}))
    return torch.cat(pieces, dim=2)


def truth(inputs, upstream, **options):
    exact = {n: x.detach().double().requires_grad_(x.requires_grad) for n, x in inputs.items()}
    return run(defined, exact, upstream.double(), **options)


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0


def plain_loss(inputs, upstream):
    """The largest relative error that plain attention makes in this precision, output and gradients, on these inputs."""
    options = {"enable_gqa": True, "is_causal": inputs["q"].shape[2] == inputs["k"].shape[2]}
    results = []
    for dtype in (upstream.dtype, torch.float64):
        own = {n: inputs[n].detach().to(dtype).requires_grad_() for n in "qkv"}
        output = F.scaled_dot_product_attention(*own.values(), **options)
        results.append((output, *torch.autograd.grad(output, list(own.values()), upstream.to(dtype))))
    return max(largest(x - y) / max(1.0, largest(y)) for x, y in zip(*results, strict=True))


def widening(inputs):
    """How much further apart the maps put numbers that attention rounds: by |α| before the softmax, |γ| after it."""
    return (1 + inputs["k_mul"].abs().sum(0).max().item()) * (1 + inputs["v_mul"].abs().sum(0).max().item())


def allowed_error(inputs, upstream):
    """Relative to a result's largest entry; the folding adds a rounding before, one after, and those of the gate."""
    if upstream.dtype == torch.float64 or not inputs["k_mul"].numel():
        return EXACT if upstream.dtype == torch.float64 else 4 * max(plain_loss(inputs, upstream), epsilon(upstream))
    return widening(inputs) * max(plain_loss(inputs, upstream), epsilon(upstream))


def epsilon(x):
    return torch.finfo(x.dtype).eps


def assert_right(got, inputs, upstream, slack=1, **options):
    expected, allowed = truth(inputs, upstream, **options), slack * allowed_error(inputs, upstream)
    assert set(got) == set(expected)
    for name, result in got.items():
        like = inputs.get(name, inputs["q"])
        assert result.dtype == like.dtype and result.shape == like.shape, name
        error = largest(result.double() - expected[name])
        assert error <= allowed * max(1.0, largest(expected[name])), (name, error, allowed)  # NaN is not


def assert_backend_right(case, backend, dtype=torch.float64, device="cpu", upstream=None, seed=0, **more):
    inputs, options = make(case, dtype, seed, device)
    upstream = upstream_of(inputs) if upstream is None else upstream
    got = run(infused_attention, inputs, upstream, backend=backend, **options, **more)
    assert_right(got, inputs, upstream, **options)
    return got


HIDDEN = ("maps", "q", "k", "v", "upstream")
WORST = (float("nan"), float("inf"), 3e38)


def with_hidden(inputs, upstream, options, what, value):
    """Inputs and upstream gradient with ``value`` where missing modalities or padding hide it: in maps, or one tensor."""
    missing, valid = ~options["present"][:, :, None, None], options["key_padding"]
    hidden = ~valid[:, None, -upstream.shape[2] :, None]
    changed = dict(inputs)
    for name in ("k_mul", "v_mul", "v_add", "k_add") if what == "maps" else (what,):
        if name in inputs:
            rows = missing if what == "maps" else ~valid[:, None, :, None] if name in "kv" else hidden
            changed[name] = inputs[name].detach().masked_fill(rows, value).requires_grad_(inputs[name].requires_grad)
    return changed, upstream.masked_fill(hidden, value) if what == "upstream" else upstream


def assert_hidden_is_nothing(case, backend, what, value, dtype=torch.float32, trains=True):
    """What is hidden counts as 0, in the output and in every gradient, that of hidden queries apart."""
    inputs, options = make(case, dtype)
    inputs, upstream = inputs if trains else frozen(inputs, *inputs), upstream_of(inputs)
    full, full_upstream = with_hidden(inputs, upstream, options, what, value)
    got = run(infused_attention, full, full_upstream, backend=backend, **options)
    clean, clean_upstream = with_hidden(inputs, upstream, options, what, 0)
    expected, allowed = truth(clean, clean_upstream, **options), allowed_error(clean, clean_upstream)
    hidden = ~options["key_padding"][:, None, -upstream.shape[2] :, None]
    for name, result in got.items():
        error = result.double() - expected[name]
        error = error.masked_fill(hidden, 0) if name == "q" else error
        assert largest(error) <= allowed * max(1.0, largest(expected[name])), (name, error)  # NaN is not


def frozen(inputs, *names):
    return {n: x.detach() if n in names else x for n, x in inputs.items()}


def without(case, **changes):
    return replace(case, **changes)


@pytest.fixture
def poisoned():
    """Memory that nobody wrote shows: torch fills it with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
