"""The definition of infused attention, in plain torch: slow, materialises everything, clean in float64.

Every other form is tested against this one, output and gradients.

Shapes: B batch, H query heads, G key/value heads (query head h reads key/value head h // (H / G)), T tokens
(Tq queries, Tk keys), d head width, M modalities.
"""

import torch
from torch import Tensor

from mitrain_kernels.infused_attention.hidden import without_missing

GATES = ("sequence", "prefix", "token", "head", "none")
EPSILON = 1e-6


def infused_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_mul: Tensor,
    v_mul: Tensor,
    v_add: Tensor,
    head_logit: Tensor,
    *,
    k_add: Tensor | None = None,
    present: Tensor | None = None,
    gate: str = "prefix",
    base: int | Tensor = 1,
    key_padding: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    eps: float = EPSILON,
) -> Tensor:
    r"""Attention of text queries over keys and values infused by M modalities; returns (B, H, Tq, d).

        K'_tj = base K_j + Σ_m g_mtj (K_j ⊙ k_mul_m + k_add_m)        softmax_j(scale q_t·K'_tj) over visible j
        V'_tj = base V_j + Σ_m g_mtj (V_j ⊙ v_mul_m + v_add_m)        o_t = Σ_j p_tj V'_tj

    where:
        q (B, H, Tq, d), k and v (B, G, Tk, d), after rotary embedding; queries are the last Tq of the Tk positions.
        k_mul, k_add, v_mul, v_add (M, B, H, d): one vector per modality, sample and query head. No k_add means 0.
        head_logit L (M, H). present (M, B) bool: False is a missing modality, whose gate is 0, whatever
            its maps hold.
        gate g: σ(L + cos) with cos = Σ_j V_j·v_add / √(Σ_j ‖V_j‖² · n · ‖v_add‖² + eps²), the n sums running over
            'sequence' all valid keys | 'prefix' the valid keys up to the query | 'token' the key j alone;
            'head' σ(L) without the cosine | 'none' 1.
        base: 1 keeps the frozen key and value (the authors' release), 0 drops them (the paper's equations);
            a (B,) tensor chooses per sample.
        key_padding (B, Tk) bool, True for a token. window: key j is visible to query i if i - j < window.
        A query that sees no key returns 0.

    Source: MiT, arXiv 2403.05060, Eq. 1-5 (k_mul = I_d^k, k_add = I_a^k, v_mul = I_d^v, v_add = I_a^v), with the
    gate's cosine against v_add per head as in the authors' release, padding excluded.
    """
    (B, H, Tq, d), Tk = q.shape, k.shape[2]
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    valid = torch.ones(B, Tk, dtype=torch.bool, device=q.device) if key_padding is None else key_padding.bool()
    k, v = (x.masked_fill(~valid[:, None, :, None], 0) for x in (k, v))
    k_mul, v_mul, v_add, k_add = without_missing(present, k_mul, v_mul, v_add, k_add)
    i = torch.arange(Tk - Tq, Tk, device=q.device)[:, None]
    j = torch.arange(Tk, device=q.device)
    seen = valid[:, None, None, :] & ((j <= i) if causal else (j == j))  # (B, 1, Tq, Tk)
    if window is not None:
        seen = seen & ((i - j).abs() < window)

    dot, square, count = (v * v_add[..., None, :]).sum(-1), v.square().sum(-1), valid[:, None].to(v.dtype)
    if gate == "sequence":
        dot, square, count = (x.sum(-1)[..., None, None] for x in (dot, square, count))
    elif gate == "prefix":
        dot, square, count = (x.cumsum(-1)[..., Tk - Tq :, None] for x in (dot, square, count))
    else:
        dot, square, count = dot[..., None, :], square[..., None, :], torch.ones_like(count)[..., None, :]
    cos = dot / (square * count * v_add.square().sum(-1)[..., None, None] + eps**2).sqrt()  # (M, B, H, Tq|1, Tk|1)
    logit = head_logit[:, None, :, None, None].expand(-1, B, -1, 1, 1)
    logit = logit if present is None else logit.masked_fill(~present[:, :, None, None, None], float("-inf"))
    g = torch.sigmoid(logit + cos if gate in GATES[:3] else logit)[..., None]
    g = torch.ones_like(g) if gate == "none" else g
    g = g if present is None else g.masked_fill(~present[:, :, None, None, None, None], 0)

    base = base.view(B, 1, 1, 1, 1) if isinstance(base, Tensor) else base
    k_mul, v_mul, v_add = (x[:, :, :, None, None] for x in (k_mul, v_mul, v_add))
    k_add = torch.zeros_like(k_mul) if k_add is None else k_add[:, :, :, None, None]
    k_infused = base * k[:, :, None] + (g * (k[:, :, None] * k_mul + k_add)).sum(0)  # (B, H, Tq|1, Tk, d)
    v_infused = base * v[:, :, None] + (g * (v[:, :, None] * v_mul + v_add)).sum(0)
    scores = (q[:, :, :, None] * k_infused).sum(-1) * (d**-0.5 if scale is None else scale)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    weights = torch.where(seen, weights, 0)  # a row without visible keys is NaN here, and 0 by definition
    return (weights[..., None] * v_infused).sum(-2)
