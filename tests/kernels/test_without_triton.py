"""Triton is imported at the first launch of one of its kernels: where it is not installed, all the rest works."""

import subprocess
import sys

import pytest
import torch
from mitrain_kernels.infused_attention import Call, op

WITHOUT = "import sys; sys.modules['triton'] = None\n"
RUN = """
import torch
from mitrain_kernels.infused_attention import infused_attention
from mitrain_kernels.infused_swiglu import infused_swiglu

def trained(backend, operator, *inputs):
    inputs = [x.requires_grad_() for x in inputs]
    output = operator(*inputs, backend=backend)
    return [output.detach(), *torch.autograd.grad(output.sum(), inputs)]

def alike(operator, backends, *shapes):
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes]
    found = [trained(b, operator, *inputs) for b in backends]
    assert all(torch.allclose(x, y, atol=1e-12) for other in found[1:] for x, y in zip(found[0], other, strict=True))
    try:
        operator(*(x.float() for x in inputs), backend="triton")
    except ValueError as error:
        print(error)

maps = [(2, 1, 4, 8)] * 3
alike(infused_attention, ("reference", "sdpa", "auto"), (1, 4, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8), *maps, (2, 4))
alike(infused_swiglu, ("reference", "torch", "auto"), (1, 5, 6), (1, 5, 6), (1, 6))
print("triton.language" in sys.modules)
"""


def printed(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()


def test_without_triton_both_operators_run_and_say_what_is_missing():
    assert printed(WITHOUT + RUN) == [
        "backend 'triton' cannot do this: triton is not installed; use backend='auto'",
        "backend 'triton' needs triton, which is not installed: use backend='torch'",
        "False",
    ]


@pytest.mark.parametrize("operator", ["infused_attention", "infused_swiglu"])
def test_importing_an_operator_does_not_import_triton(operator):
    script = f"import sys, mitrain_kernels.{operator}, torch; print('triton.language' in sys.modules)"
    assert printed(script) == ["False"]


def test_a_gpu_without_triton_runs_on_torchs_attention(monkeypatch):
    monkeypatch.setattr(op, "TRITON", False)
    call = Call(*(torch.zeros(1, 1, 1, 8, device="meta") for _ in range(6)), torch.zeros(1, 1, device="meta"))
    assert op.triton_limit(call) == "triton is not installed"
