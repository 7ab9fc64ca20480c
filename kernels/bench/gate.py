"""The correctness gate: the output and every gradient of a provider against float64, before anything is timed.

The truth is the definition in float64, slice by slice (one sample, one key/value head). Where the definition is too
large (it writes out T² · d numbers) the truth is the folded form in float64, which the gate first compares with the
definition on the last queries of one slice at the very shape.

A provider may err, relative to the largest true entry, ``SLACK`` times as much as the plain formula computed in the
provider's own precision (plus one unit of rounding). Right forms stay within 3 times that, wrong ones exceed it by
orders of magnitude.
"""

import itertools
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from mitrain_kernels.infused_attention import infused_attention_folded, infused_attention_reference
from torch import Tensor

from bench.cases import Case, key_padding, make_inputs
from bench.providers import Provider, eager_swiglu, plain_swiglu

SLACK = 8
DEFINITION_LIMIT = 40_000_000
LAST_QUERIES = 8
EXACT = 1e-9
Tensors = dict[str, Tensor]


def check(provider: Provider, case: Case, device: str) -> list[str]:
    """What is wrong with the provider on this case, a line each; empty when all is right."""
    inputs, upstream = make_inputs(case, device)
    inputs = {name: inputs[name] for name in provider.inputs}
    found = evaluate(provider.run, inputs, upstream)
    wide = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    truth = by_slices(case, provider.gate, wide, upstream.double())
    yardstick = by_slices(case, provider.gate, inputs, upstream)
    faults = [compare(name, found.get(name), true, yardstick[name]) for name, true in truth.items()]
    if case.op == "infused_attention" and provider.gate != "off" and not is_small(case):
        faults += definition_faults(case, provider.gate, wide, upstream.double())
    return [fault for fault in faults if fault]


def compare(name: str, found: Tensor | None, true: Tensor, yardstick: Tensor) -> str | None:
    if found is None:
        return f"{name} could not be compared"
    if found.shape != true.shape or found.dtype != yardstick.dtype:
        return f"{name} is {tuple(found.shape)} {found.dtype}, not {tuple(true.shape)} {yardstick.dtype}"
    unit = torch.finfo(found.dtype).eps
    error, allowed = distance(found, true), SLACK * (distance(yardstick, true) + unit)
    return None if error <= allowed else f"{name} is off by {error:.1e} of its largest entry, allowed {allowed:.1e}"


def distance(x: Tensor, true: Tensor) -> float:
    """Largest deviation, relative to the largest true entry; NaN if there is one in x."""
    return float((x.double() - true).abs().max() / true.abs().max().clamp_min(1e-300))


def evaluate(run: Callable[..., Tensor], inputs: Tensors, upstream: Tensor) -> Tensors:
    """{"output": …, input name: its gradient …}; an input that the output does not depend on gets zeros."""
    output = run(**inputs)
    results = {"output": output.detach()}
    trained = {name: x for name, x in inputs.items() if x.requires_grad}
    if trained and output.shape == upstream.shape:
        grads = torch.autograd.grad(output, list(trained.values()), upstream, materialize_grads=True)
        results |= dict(zip(trained, grads, strict=True))
    return results


def by_slices(case: Case, gate: str, inputs: Tensors, upstream: Tensor) -> Tensors:
    """``evaluate`` of the true formula in the inputs' precision, over one sample and key/value head at a time."""
    if case.op == "infused_swiglu":
        return evaluate(plain_swiglu if gate == "off" else eager_swiglu, inputs, upstream)
    results = {"output": torch.zeros_like(upstream)}
    results |= {name: torch.zeros_like(x) for name, x in inputs.items() if x.requires_grad}
    run = formula(case, gate)
    for b, g in itertools.product(range(case.shape["B"]), range(case.shape["G"])):
        for name, x in evaluate_slice(run, case, inputs, upstream, b, g).items():
            cut(case, name, results[name], b, g).add_(x)
    return results


def evaluate_slice(
    run: Callable[..., Tensor], case: Case, inputs: Tensors, upstream: Tensor, b: int, g: int, last: int | None = None
) -> Tensors:
    """``evaluate`` on sample b and key/value head g, for all queries or the ``last`` ones."""
    part = {name: cut(case, name, x, b, g).detach().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    upstream = cut(case, "output", upstream, b, g)
    if last is not None:
        upstream = upstream[:, :, -last:]
        part["q"] = part["q"][:, :, -last:].detach().requires_grad_(part["q"].requires_grad)
    padding = key_padding(case, upstream.device.type)
    options = {} if padding is None else {"key_padding": padding[b : b + 1]}
    return evaluate(partial(run, **options), part, upstream)


def cut(case: Case, name: str, x: Tensor, b: int, g: int) -> Tensor:
    """The part of an input, a gradient or the output that belongs to sample b and key/value head g; a view."""
    group = case.shape["H"] // case.shape["G"]
    heads = slice(g * group, (g + 1) * group)
    if name in ("q", "output"):
        return x[b : b + 1, heads]
    if name in ("k", "v"):
        return x[b : b + 1, g : g + 1]
    return x[:, heads] if name == "head_logit" else x[:, b : b + 1, heads]


def formula(case: Case, gate: str) -> Callable[..., Tensor]:
    """The true operator: the definition where it is small enough, the folded form elsewhere."""
    if gate == "off":
        return baseline
    form = infused_attention_reference if is_small(case) else infused_attention_folded
    return partial(form, gate=gate, causal=True)


def is_small(case: Case) -> bool:
    B, H, _, T, d = case.shape.values()
    return case.modalities * B * H * (case.queries or T) * T * d <= DEFINITION_LIMIT


def baseline(q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None = None) -> Tensor:
    """Causal attention without infusion; the queries are the last of the tokens."""
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    seen = seen if key_padding is None else seen & key_padding[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1])


def definition_faults(case: Case, gate: str, wide: Tensors, upstream: Tensor) -> list[str]:
    """Where the folded form, in float64, leaves the definition on the last queries of one slice."""
    last = min(LAST_QUERIES, upstream.shape[2])
    slices = [
        evaluate_slice(partial(form, gate=gate, causal=True), case, wide, upstream, 0, 0, last)
        for form in (infused_attention_folded, infused_attention_reference)
    ]
    errors = {name: distance(slices[0][name], true) for name, true in slices[1].items()}
    return [f"the truth's {name} is off by {e:.1e} from the definition" for name, e in errors.items() if not e <= EXACT]
