"""The definition of infused SwiGLU, in plain torch: autograd keeps every intermediate, clean in float64.

Every other form is tested against this one, output and gradients.

Shapes: B samples, T tokens, F feed-forward width; packed: R tokens of S samples one after another.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def infused_swiglu_reference(gate: Tensor, up: Tensor, f: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    r"""H' = SiLU(gate) ⊙ up ⊙ f[sample], in the shape and type of ``gate``.

    where:
        gate = x W_gate and up = x W_up, (B, T, F) of one type; f (B, F), affine in the modality's feature.
        cu_seqlens (S + 1,) int32: tokens cu_seqlens[s] to cu_seqlens[s + 1] are sample s; then gate and up (R, F),
            f (S, F). A sample may have no token.

    Every product is taken in float32 or wider. SiLU(gate) and SiLU(gate) ⊙ up are rounded to gate's type, as in a
    frozen model of that type: f = 1 gives the frozen activation to the last bit.
    """
    wide = torch.promote_types(gate.dtype, torch.float32)
    hidden = F.silu(gate) * up
    factors = f[:, None] if cu_seqlens is None else f.repeat_interleave(cu_seqlens.diff(), dim=0)
    return (hidden.to(wide) * factors.to(wide)).to(gate.dtype)
