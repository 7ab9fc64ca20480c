"""Multimodal Infusion Tuning (arXiv 2403.05060) on one frozen LLaMA layer, in plain torch: to be read.

    python examples/mit_minimal.py        trains the maps of a random layer until the picture decides its output

`mitrain.attach` computes the same in whole models, folded into plain attention (docs/methods/mit.md); a test holds the
two equal in float64, outputs and gradients.

Shapes: B samples, T tokens, D hidden size, H query heads, G key/value heads, d head width, e feature width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-6  # keeps the cosine of a zero vector finite


class Maps(nn.Module):
    """What is trained: affine maps of a picture's one vector I (B, e), and a logit L for each head."""

    def __init__(self, feature: int, heads: int, width: int, ffn: int):
        super().__init__()
        self.heads = heads
        self.k_mul, self.k_add, self.v_mul, self.v_add = (nn.Linear(feature, heads * width) for _ in range(4))  # Eq. 1
        self.ffn = nn.Linear(feature, ffn)  # Eq. 7
        self.head_logit = nn.Parameter(torch.ones(heads))
        for linear in (self.k_mul, self.k_add, self.v_mul, self.v_add, self.ffn):  # starts as the frozen layer
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.ones_(self.ffn.bias)

    def per_head(self, name: str, image: Tensor) -> Tensor:
        """(B, H, 1, 1, d): for every query and key."""
        return getattr(self, name)(image).unflatten(-1, (self.heads, 1, 1, -1))


def gate(v: Tensor, v_add: Tensor, logit: Tensor, valid: Tensor, kind: str) -> Tensor:
    """σ(L + cos(V, v_add)), (B, H, T or 1, T or 1, 1) for queries × keys; v (B, H, T, d), valid (B, T). Eq. 4.

    kind: V is all of the text (``sequence``), the text up to the query (``prefix``), or the key itself (``token``).
    """
    v = v * valid[:, None, :, None]
    dot, square = (v * v_add[:, :, 0]).sum(-1), v.square().sum(-1)
    count = valid[:, None].to(v.dtype).expand_as(square)
    if kind == "token":
        dot, square, count = (x[:, :, None, :] for x in (dot, square, torch.ones_like(count)))
    elif kind == "prefix":
        dot, square, count = (x.cumsum(-1)[..., None] for x in (dot, square, count))
    else:
        dot, square, count = (x.sum(-1)[..., None, None] for x in (dot, square, count))
    cosine = dot / (square * count * v_add.square().sum(-1) + EPSILON**2).sqrt()
    return torch.sigmoid(logit[:, None, None] + cosine)[..., None]


def infused_attention(
    q: Tensor, k: Tensor, v: Tensor, maps: Maps, image: Tensor, valid: Tensor, kind: str = "prefix", base: int = 1
) -> Tensor:
    """Causal attention (B, H, T, d) whose keys and values are multiplied by, and added to, what the picture says.

    q (B, H, T, d), k and v (B, G, T, d), after rotary embedding. base: 1 keeps the frozen key and value beside (the
    authors' release), 0 does not (the paper's Eq. 2-3, 5).
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    k_mul, k_add, v_mul, v_add = (maps.per_head(name, image) for name in ("k_mul", "k_add", "v_mul", "v_add"))
    g = gate(v, v_add, maps.head_logit, valid, kind)
    k, v = k[:, :, None], v[:, :, None]  # (B, H, 1, T, d): a key of its own for every query, as g may depend on it
    k = base * k + g * (k * k_mul + k_add)
    v = base * v + g * (v * v_mul + v_add)
    scores = (q[:, :, :, None] * k).sum(-1) / q.shape[-1] ** 0.5
    visible = torch.ones_like(scores, dtype=torch.bool).tril() & valid[:, None, None, :]
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1) * visible
    return (weights[..., None] * v).sum(-2)


def norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def rotate(x: Tensor, theta: float = 10_000.0) -> Tensor:
    """Rotary embedding of (B, heads, T, d) at positions 0 … T-1."""
    half = x.shape[-1] // 2
    position, pair = torch.arange(x.shape[2]).to(x)[:, None], torch.arange(half).to(x)
    angles = position / theta ** (pair / half)
    cos, sin = (f(angles).repeat(1, 2) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def infused_layer(x: Tensor, w: dict[str, Tensor], maps: Maps, image: Tensor, valid: Tensor, **form: object) -> Tensor:
    """One layer on x (B, T, D); ``w``: its frozen weights by transformers' names; valid (B, T): False for padding."""
    d, normed = w["self_attn.q_proj.weight"].shape[0] // maps.heads, norm(x, w["input_layernorm.weight"])
    q, k, v = (F.linear(normed, w[f"self_attn.{n}_proj.weight"]).unflatten(-1, (-1, d)).transpose(1, 2) for n in "qkv")
    o = infused_attention(rotate(q), rotate(k), v, maps, image, valid, **form)
    x = x + F.linear(o.transpose(1, 2).flatten(2), w["self_attn.o_proj.weight"])
    normed = norm(x, w["post_attention_layernorm.weight"])
    gate_, up, down = (w[f"mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
    hidden = F.silu(F.linear(normed, gate_)) * F.linear(normed, up) * maps.ffn(image)[:, None]  # Eq. 6-7
    return x + F.linear(hidden, down)


def main(steps: int = 60) -> list[float]:
    """Four pictures, one text: the maps learn to turn the frozen layer's last state into a target for each picture."""
    torch.manual_seed(0)
    D, H, G, d, e, width = 32, 4, 2, 8, 16, 64
    shapes = {"self_attn.q_proj": (H * d, D), "self_attn.k_proj": (G * d, D), "self_attn.v_proj": (G * d, D)}
    shapes |= {"self_attn.o_proj": (D, H * d), "input_layernorm": (D,), "post_attention_layernorm": (D,)}
    shapes |= {"mlp.gate_proj": (width, D), "mlp.up_proj": (width, D), "mlp.down_proj": (D, width)}
    frozen = {f"{n}.weight": torch.randn(s) / s[-1] ** 0.5 if len(s) > 1 else torch.ones(s) for n, s in shapes.items()}
    maps, text, images, targets = Maps(e, H, d, width), torch.randn(1, 6, D), torch.randn(4, e), torch.randn(4, D)
    optimizer, losses = torch.optim.Adam(maps.parameters(), lr=1e-2), []
    for _ in range(steps):
        out = infused_layer(text.expand(4, -1, -1), frozen, maps, images, torch.ones(4, 6, dtype=torch.bool))
        loss = F.mse_loss(out[:, -1], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {steps} steps; the layer's own weights did not change")
    return losses


if __name__ == "__main__":
    main()
