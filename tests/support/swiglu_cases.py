"""What every backend of ``infused_swiglu`` is held to: inputs, the float64 truth and tolerances derived from it."""

import torch
from mitrain_kernels.infused_swiglu import infused_swiglu, infused_swiglu_reference
from torch import Tensor

NAMES = ("gate", "up", "f")
PADDED = [(3, 7, 5), (2, 1, 33), (1, 19, 16), (4, 6, 1), (2, 9, 70)]
PACKED = [([4, 0, 9, 1], 21), ([0, 0, 3], 8), ([1], 17), ([11, 2, 0], 40)]


def make(shape, dtype=torch.float64, lengths=None, seed=0, device="cpu"):
    """Inputs (B, T, F), or packed (R, F) for ``lengths`` and F = shape; f stays in float32 where gate is shorter."""
    generator = torch.Generator().manual_seed(seed)
    (*_, width), samples = ((shape,), len(lengths)) if lengths is not None else (shape, shape[0])
    tokens = (sum(lengths), width) if lengths is not None else shape
    wide = torch.promote_types(dtype, torch.float32)
    sizes = ((tokens, dtype), (tokens, dtype), ((samples, width), wide))
    values = [(2 * torch.randn(s, generator=generator, dtype=torch.float64)).to(device, t) for s, t in sizes]
    inputs = {name: x.requires_grad_() for name, x in zip(NAMES, values, strict=True)}
    return inputs, None if lengths is None else bounds(lengths).to(device)


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def upstream_of(inputs, seed=9):
    gate = inputs["gate"]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(gate.shape, generator=generator, dtype=torch.float64).to(gate.device, gate.dtype)


def run(function, inputs, upstream, **options):
    """The output and the gradients of those inputs that ask for one, by name."""
    output = function(**inputs, **options)
    asked = [name for name, x in inputs.items() if x.requires_grad]
    gradients = torch.autograd.grad(output, [inputs[name] for name in asked], upstream)
    return {"output": output.detach(), **dict(zip(asked, gradients, strict=True))}


def truth(inputs, upstream, cu_seqlens=None):
    """The definition in float64, and how many ulps of what magnitude each result may err (see ``assert_right``)."""
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    results = run(infused_swiglu_reference, exact, upstream.double(), cu_seqlens=cu_seqlens)
    x, u, d = (z.detach().double().abs().flatten(0, -2) for z in (inputs["gate"], inputs["up"], upstream))
    f, shape = exact["f"].detach().abs(), inputs["gate"].shape
    lengths = torch.full((len(f),), shape[-2], device=f.device) if cu_seqlens is None else cu_seqlens.diff()
    owner = torch.arange(len(f), device=f.device).repeat_interleave(lengths)
    sigma = torch.sigmoid(inputs["gate"].detach().double().flatten(0, -2))
    slope, ulps = sigma * (1 + x * (1 - sigma)), 8 + x
    added = torch.zeros_like(f).index_add_(0, owner, (ulps + len(x)) * d * u * x * sigma)
    budgets = (ulps * x * sigma * u * f[owner], ulps * d * u * f[owner] * slope, ulps * d * x * sigma * f[owner])
    return results, dict(zip(("output", "gate", "up", "f"), (*(z.view(shape) for z in budgets), added), strict=True))


def assert_right(got, inputs, upstream, cu_seqlens=None, truncated=False):
    r"""Every result within its rounding errors of the truth.

    An element is a product of at most 8 factors, each right to an ulp of the wide type, and e^-x, whose relative error
    is |x| ulps; df adds up to R of them. A gradient is rounded once to its own type, the output three times: by half
    an ulp, or by a whole one where the conversion truncates (the interpreter's bfloat16).
    """
    results, budgets = truth(inputs, upstream, cu_seqlens)
    wide = torch.finfo(torch.promote_types(inputs["gate"].dtype, torch.float32))
    for name, result in got.items():
        like = inputs.get(name, inputs["gate"])
        assert result.dtype == like.dtype and result.shape == like.shape, name
        own = torch.finfo(result.dtype)
        rounding = (3 if name == "output" else 1) * (1 if truncated else 0.5) * 1.01 * own.eps
        allowed = wide.eps * budgets[name] + rounding * results[name].abs() + own.smallest_normal
        error = (result.double() - results[name]).abs()
        assert (error <= allowed).all(), (name, error.max().item(), (error / allowed).max().item())


def assert_backend_right(inputs, cu_seqlens=None, backend="torch", upstream=None, truncated=False):
    upstream = upstream_of(inputs) if upstream is None else upstream
    got = run(infused_swiglu, inputs, upstream, cu_seqlens=cu_seqlens, backend=backend)
    assert_right(got, inputs, upstream, cu_seqlens, truncated)
    return got


def frozen(inputs, *names):
    return {n: x.detach() if n in names else x for n, x in inputs.items()}


def strided(inputs):
    """The same values in rows that are not adjacent: halves of a wider projection, as a fused gate_up makes them."""

    def spread(x: Tensor) -> Tensor:
        wide = torch.cat([x, torch.full_like(x, float("nan"))], dim=-1).detach()
        return wide[..., : x.shape[-1]].requires_grad_(x.requires_grad)

    return {n: spread(x) if n != "f" else x for n, x in inputs.items()}


def across(inputs):
    """The same values in columns that are not adjacent."""
    return {n: x.detach().mT.contiguous().mT.requires_grad_(x.requires_grad) for n, x in inputs.items()}


def poison(monkeypatch):
    """Memory that nobody wrote shows: torch.empty gives NaN."""
    empty = torch.empty

    def poisoned(*size, **options):
        result = empty(*size, **options)
        return result.fill_(float("nan")) if result.is_floating_point() else result

    monkeypatch.setattr(torch, "empty", poisoned)
