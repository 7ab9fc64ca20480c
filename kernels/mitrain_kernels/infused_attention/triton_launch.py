"""The Triton backend: prepares tensors and launches the kernels; the interface is that of ``sdpa``.

Where ``setting.cu_seqlens`` packs S sequences, q, k, v are (1, heads, R, d) and a "sample" is a sequence.
Shapes: B samples, H query heads, G key/value heads, T tokens (Tq queries, Tk keys), d head width, M modalities.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from mitrain_kernels.infused_attention.call import Setting
from mitrain_kernels.infused_attention.gate import GateSums, constant_gate, opened, prefix_sums
from mitrain_kernels.infused_attention.hidden import without_missing
from mitrain_kernels.infused_attention.triton_decode import merge_kernel, split_kernel
from mitrain_kernels.infused_attention.triton_forward import forward_kernel
from mitrain_kernels.infused_attention.triton_gate import gate_backward_kernel, gate_kernel, sums_kernel, values_kernel
from mitrain_kernels.infused_attention.triton_keys import key_kernel
from mitrain_kernels.infused_attention.triton_queries import query_kernel
from mitrain_kernels.infused_attention.triton_tiles import (
    DECODE,
    MOST_SPLITS,
    PROGRAMS,
    SCAN,
    Tile,
    padded,
    target_of,
    tile_for,
)

COSINE = ("sequence", "prefix", "token")


def on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def rows(x: Tensor) -> Tensor:
    """x with adjacent columns."""
    return x if x.stride(-1) == 1 else x.contiguous()


def like_output(q: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty (B, H, T, d) in the layout (B, T, H, d), which the projection behind attention reads without a copy."""
    B, H, T, d = q.shape
    return torch.empty(B, T, H, d, dtype=dtype or q.dtype, device=q.device).transpose(1, 2)


class Problem:
    """One call's tensors and numbers, as every kernel wants them."""

    def __init__(self, inputs: Sequence[Tensor | None], setting: Setting):
        q, k, v, k_mul, v_mul, v_add, logit, k_add = inputs
        self.q, self.k, self.v = rows(q), rows(k), rows(v)
        self.maps = [x.contiguous() for x in without_missing(setting.present, k_mul, v_mul, v_add)]
        k_add, *_ = without_missing(setting.present, k_add)
        self.k_add = k_add.contiguous() if k_add is not None and setting.kind == "token" else None
        self.logit = logit.float().contiguous()
        self.setting = setting
        (self.H, self.queries), self.keys = q.shape[1:3], k.shape[2]
        self.M, self.B, self.group, self.width = len(logit), v_add.shape[1], self.H // k.shape[1], q.shape[3]
        self.packed = setting.cu_seqlens is not None
        self.token = setting.kind == "token"
        self.longest = self.queries
        if self.packed:
            self.longest = int((setting.cu_seqlens[1:] - setting.cu_seqlens[:-1]).max())
        self.longest_keys = self.longest if self.packed else self.keys
        self.valid = None if setting.valid is None else setting.valid.contiguous().view(torch.uint8)
        base = setting.base
        self.base = base.float() if isinstance(base, Tensor) else q.new_full((self.B,), base, dtype=torch.float32)
        v_add = self.maps[2]
        self.norm = torch.linalg.vecdot(v_add.float(), v_add.float()).contiguous() if setting.kind in COSINE else None
        self.present = None if setting.present is None else setting.present.contiguous().view(torch.uint8)

    def tile(self, kernel: str) -> Tile:
        return tile_for(target_of(self.q.device), kernel, padded(self.width), self.q.dtype, self.token)

    def spans(self, *tensors: Tensor) -> list[int]:
        """Strides of samples, heads and tokens; packed samples differ by their first token alone."""
        return [s for x in tensors for s in (0 if self.packed else x.stride(0), x.stride(1), x.stride(2))]

    def scalars(self, x: Tensor) -> list[int]:
        """The same for (…, B, H, T) scalars, T = 1 standing for all tokens: strides from the third-last dimension on."""
        whole = x.shape[-1] == 1
        sample = 0 if self.packed and x.shape[-3] == 1 else x.stride(-3)
        return [*x.stride()[:-3], sample, x.stride(-2), 0 if whole else x.stride(-1)]

    @property
    def valid_stride(self) -> int:
        return 0 if self.valid is None else self.valid.stride(0)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.B, self.H, self.group, self.queries, self.keys

    @property
    def numbers(self) -> tuple[int, float, float]:
        s = self.setting
        return s.window or 0, s.softcap or 0.0, s.scale

    def options(self, tile: Tile, *, own: str, step: str) -> dict[str, Any]:
        s = self.setting
        return {
            "M": self.M, "D": self.width, "BD": padded(self.width), own: tile.own, step: tile.step,
            "CAUSAL": s.causal, "WINDOW": s.window is not None, "SOFTCAP": s.softcap is not None, "TOKEN": self.token,
            "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True,
        }  # fmt: skip


@dataclass
class Gates:
    """value, cosine, root (M, B, H, T'), and the sums dot (M, B, H, T'), square (B, G, T'), count (B, T')."""

    value: Tensor
    cosine: Tensor
    root: Tensor
    dot: Tensor
    square: Tensor
    count: Tensor


def gates_of(p: Problem, before: GateSums | None) -> Gates:
    """One read of the values, one scan."""
    kind, v = p.setting.kind, p.v
    empty = [p.base.new_empty(0) for _ in range(5)]
    if kind not in COSINE:
        value = constant_gate(p.logit, p.B, p.setting.present, cosine=kind == "head")
        return Gates(value, *empty)
    tokens = p.queries if before is not None else p.keys
    batch = 1 if p.packed else p.B
    G, new = v.shape[1], {"device": v.device, "dtype": torch.float32}
    dot, square = torch.empty(p.M, batch, p.H, tokens, **new), torch.empty(batch, G, tokens, **new)
    whole = kind == "sequence"
    length, gated = (1, p.B) if whole else (tokens, batch)
    value, cosine, root, sum_dot = (torch.empty(p.M, gated, p.H, length, **new) for _ in range(4))
    sum_square, count = torch.empty(gated, G, length, **new), torch.empty(gated, length, **new)
    if not p.M:
        if kind == "prefix" and not p.packed:
            valid = None if p.setting.valid is None else p.setting.valid[:, -tokens:]
            _, sum_square, count = prefix_sums(v[:, :, -tokens:], p.maps[2], valid, before)
        return Gates(*(x[..., -p.queries :] for x in (value, cosine, root)), sum_dot, sum_square, count)
    blocks = triton.cdiv(p.longest_keys if before is None else tokens, 64)
    common = (p.B, p.H, p.group, tokens, p.keys - tokens)
    earlier = (None, None, None) if before is None else [x.contiguous() for x in before]
    width = {"M": p.M, "D": p.width, "BD": padded(p.width), "BN": 64}
    with on(v.device):
        sums_kernel[(blocks, G, p.B)](
            v, p.maps[2], p.valid, p.setting.cu_seqlens, dot, square, *p.spans(v), p.valid_stride,
            *p.scalars(dot)[:3], *p.scalars(square)[:2], *common, **width,
        )  # fmt: skip
        gate_kernel[(p.H, p.B)](
            dot, square, p.valid, p.setting.cu_seqlens, *earlier, p.norm, p.logit, p.present,
            value, cosine, root, sum_dot, sum_square, count,
            p.valid_stride, *p.scalars(dot)[:3], *p.scalars(square)[:2],
            *p.scalars(value)[:3], *p.scalars(sum_dot)[:3], *p.scalars(sum_square)[:2],
            0 if p.packed and not whole else count.stride(0), *common, p.setting.eps,
            M=p.M, BT=SCAN, WHOLE=whole, TOKEN=p.token,
        )  # fmt: skip
    gates = Gates(value, cosine, root, sum_dot, sum_square, count)
    if p.token or whole:
        return gates
    first = tokens - p.queries
    gates.value, gates.cosine, gates.root = (x[..., first:].contiguous() for x in (value, cosine, root))
    return gates


def forward(
    inputs: Sequence[Tensor | None], setting: Setting, before: GateSums | None, trains: bool
) -> tuple[Tensor, ...]:
    """As ``sdpa.forward``; the log-sum-exp is base 2, and +inf for a query that sees no key."""
    p = Problem(inputs, setting)
    gates = gates_of(p, before)
    q = p.q
    output = like_output(q)
    if q.shape[2] == 1 and not (trains or p.packed or p.token) and output.numel():
        decode(p, gates.value, output)
        return (
            output,
            q.new_empty(0),
            p.base.new_empty(0),
            gates.cosine,
            gates.root,
            gates.dot,
            gates.square,
            gates.count,
        )
    attended = like_output(q) if trains else q.new_empty(0)
    lse = q.new_empty((*q.shape[:3],) if trains else (0,), dtype=torch.float32)
    tile = p.tile("forward")
    if output.numel():
        with on(q.device):
            forward_kernel[(triton.cdiv(p.longest, tile.own), p.H, p.B)](
                q, p.k, p.v, output, attended if trains else None, lse if trains else None, gates.value, *p.maps, p.k_add,
                p.base, p.valid, setting.cu_seqlens, *p.spans(q, p.k, p.v, output),
                *(p.spans(lse)[:2] if trains else (0, 0)), *p.scalars(gates.value), p.valid_stride,
                *p.sizes, *p.numbers, **p.options(tile, own="BM", step="BN"),
            )  # fmt: skip
    return output, attended, lse, gates.cosine, gates.root, gates.dot, gates.square, gates.count


def decode(p: Problem, gate: Tensor, output: Tensor) -> None:
    """One query per head: the keys in as many shares as fill the device, then merged into ``output``."""
    G, step, s = p.k.shape[1], DECODE.step, p.setting
    splits = min(triton.cdiv(p.keys, step), max(1, PROGRAMS // (p.B * G)), MOST_SPLITS)
    share = triton.cdiv(triton.cdiv(p.keys, splits), step) * step
    splits = triton.cdiv(p.keys, share)
    parts = torch.empty(splits, p.B, p.H, p.width, dtype=torch.float32, device=p.q.device)
    tops, totals = (torch.empty(splits, p.B, p.H, dtype=torch.float32, device=p.q.device) for _ in range(2))
    width = {"M": p.M, "D": p.width, "BD": padded(p.width)}
    with on(p.q.device):
        split_kernel[(splits, G, p.B)](
            p.q, p.k, p.v, parts, tops, totals, gate, p.maps[0], p.base, p.valid,
            p.q.stride(0), p.q.stride(1), *p.spans(p.k, p.v), *p.scalars(gate)[:3], p.valid_stride,
            p.B, p.H, p.group, p.keys, *p.numbers, share, **width,
            BM=max(16, triton.next_power_of_2(p.group)), BN=step,
            WINDOW=s.window is not None, SOFTCAP=s.softcap is not None,
            num_warps=DECODE.warps, num_stages=DECODE.stages, enable_fp_fusion=True,
        )  # fmt: skip
        merge_kernel[(p.H, p.B)](
            parts, tops, totals, output, gate, *p.maps[1:], p.base, output.stride(0), output.stride(1),
            *p.scalars(gate)[:3], p.B, p.H, splits, **width, BS=triton.next_power_of_2(splits),
        )  # fmt: skip


def backward(
    upstream: Tensor,
    inputs: Sequence[Tensor | None],
    setting: Setting,
    attended: Tensor,
    logsumexp: Tensor,
    kept: Sequence[Tensor],
    continued: bool,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """As ``sdpa.backward``; what ``needs`` does not ask for is None where it costs something."""
    p = Problem(inputs, setting)
    cosine, root, square, count = kept
    if setting.kind in COSINE:
        logit, each = cosine + p.logit[:, None, :, None], p.packed and setting.kind != "sequence"
        value = opened_packed(logit, setting) if each else opened(logit, setting.present)
    else:
        value = constant_gate(p.logit, p.B, setting.present, cosine=setting.kind == "head")
    upstream = rows(upstream)
    if not upstream.is_contiguous() and 0 in upstream.stride():
        upstream = upstream.contiguous()
    with on(p.q.device):
        found = token_gradients if p.token else folded_gradients
        return found(
            p, upstream, attended, logsumexp, Gates(value, cosine, root, cosine, square, count), continued, needs
        )


def opened_packed(logit: Tensor, setting: Setting) -> Tensor:
    """The gates (M, 1, H, R) of packed sequences, 0 where ``present`` (M, S) is False."""
    if setting.present is None:
        return torch.sigmoid(logit)
    lengths = setting.cu_seqlens[1:] - setting.cu_seqlens[:-1]
    there = setting.present.repeat_interleave(lengths.long(), dim=1)
    return torch.sigmoid(logit.masked_fill(~there[:, None, None], float("-inf")))


def query_side(p: Problem, upstream: Tensor, attended: Tensor, lse: Tensor, value: Tensor, wants_q: bool) -> tuple:
    """dq, dg (M, B, H, Tq), the maps' gradients [3, M, B, H, d] for a given gate, and D."""
    q, tile, s = p.q, p.tile("query"), p.setting
    blocks = triton.cdiv(p.longest, tile.own)
    delta = torch.empty_like(lse)
    dq = like_output(q, q.dtype) if wants_q else None
    rank = 0 if p.token else p.M
    dgate = lse.new_zeros(rank, *lse.shape) if p.packed else lse.new_empty(rank, *lse.shape)
    parts = lse.new_empty(blocks, 3, rank, p.B, p.H, p.width)
    query_kernel[(blocks, p.H, p.B)](
        q, p.k, p.v, attended, upstream, lse, delta, dq, dgate, parts, value, *p.maps, p.k_add, p.base, p.valid,
        s.cu_seqlens, *p.spans(q, p.k, p.v, attended, upstream), *p.spans(lse)[:2], *p.scalars(value),
        dgate.stride(0), *p.spans(lse)[:2], p.valid_stride, *p.sizes, *p.numbers,
        **p.options(tile, own="BM", step="BN"),
    )  # fmt: skip
    return dq, dgate, parts.sum(0), delta


def key_side(p: Problem, upstream: Tensor, lse: Tensor, delta: Tensor, gates: Gates, through: tuple | None) -> tuple:
    """dk, dv per key/value head, or (token) per query head with shares of the maps' and logits' gradients."""
    tile, s = p.tile("key"), p.setting
    blocks = triton.cdiv(p.longest_keys, tile.own)
    lanes = p.H if p.token else p.k.shape[1]
    batch = p.k.shape[0]
    dk, dv = (p.k.new_empty(batch, p.keys, lanes, p.width).transpose(1, 2) for _ in range(2))
    rank = p.M if p.token else 0
    parts = lse.new_zeros(blocks, 4, rank, p.B, p.H, p.width)
    dlogit = lse.new_zeros(blocks, rank, p.B, p.H)
    dot, square = through or (None, None)
    at = p.scalars(dot)[:3] if dot is not None else (0, 0, 0)
    key_kernel[(blocks, lanes, p.B)](
        p.q, p.k, p.v, upstream, lse, delta, dk, dv, dot, square, parts, dlogit,
        gates.value, gates.cosine, gates.root, p.norm, *p.maps, p.k_add, p.base, p.valid, s.cu_seqlens,
        *p.spans(p.q, p.k, p.v, upstream, dk), *p.spans(lse)[:2], *p.scalars(gates.value), *at, p.valid_stride,
        *p.sizes, *p.numbers, **p.options(tile, own="BN", step="BM"),
    )  # fmt: skip
    return dk, dv, parts.sum(0), dlogit.sum((0, 2))


def gate_side(p: Problem, dgate: Tensor, gates: Gates, continued: bool) -> tuple:
    """dot (M, B, H, T) and square (B, H, T) of every value, of v_add (M, B, H, d), of head_logit (M, H)."""
    s, whole = p.setting, p.setting.kind == "sequence"
    tokens = p.queries if continued else p.keys
    batch, offset = (1 if p.packed else p.B), p.keys - tokens
    new = {"device": dgate.device, "dtype": torch.float32}
    lead = dgate.new_zeros if tokens < p.keys else dgate.new_empty
    dot, square = lead(p.M, batch, p.H, p.keys), lead(batch, p.H, p.keys)
    own_dot, own_square = dot[..., offset:], square[..., offset:]
    of_norm, dlogit = torch.empty(p.M, p.B, p.H, **new), torch.empty(p.M, p.B, p.H, **new)
    sums = [gates.square, gates.count]
    if not whole and not p.packed:
        sums = [x[..., -p.queries :].contiguous() for x in sums]
    gate_backward_kernel[(p.H, p.B)](
        dgate, gates.cosine, gates.root, *sums, s.cu_seqlens, p.norm, p.logit, p.present,
        own_dot, own_square, of_norm, dlogit,
        *p.scalars(dgate)[:3], *p.scalars(gates.cosine)[:3],
        *p.scalars(sums[0])[:2], 0 if p.packed and not whole else sums[1].stride(0),
        *p.scalars(dot)[:3], *p.scalars(square)[:2],
        p.B, p.H, p.group, tokens, p.queries, M=p.M, BT=SCAN, WHOLE=whole,
    )  # fmt: skip
    blocks = triton.cdiv(p.longest_keys, 64)
    parts = torch.empty(blocks, p.M, p.B, p.H, p.width, **new)
    values_kernel[(blocks, p.v.shape[1], p.B)](
        p.v, dot, parts, p.valid, s.cu_seqlens, *p.spans(p.v), p.valid_stride, *p.scalars(dot)[:3],
        p.B, p.H, p.group, p.keys, 0, M=p.M, D=p.width, BD=padded(p.width), BN=64,
    )  # fmt: skip
    return dot, square, parts.sum(0) - of_norm[..., None] * p.maps[2].float(), dlogit.sum(1)


def folded_gradients(
    p: Problem, upstream: Tensor, attended: Tensor, lse: Tensor, gates: Gates, continued: bool, needs: Sequence[bool]
) -> list[Tensor | None]:
    dq, dgate, maps, delta = query_side(p, upstream, attended, lse, gates.value, needs[0])
    dk_mul, dv_mul, dv_add = maps
    through, kind = None, p.setting.kind
    dlogit = torch.zeros_like(p.logit)
    wanted = any(needs[i] for i in (1, 2, 5, 6))
    if kind in COSINE and wanted and p.M:
        *through, of_add, dlogit = gate_side(p, dgate, gates, continued)
        dv_add = dv_add + of_add
    elif kind == "head" and p.M:
        dlogit = head_gradient(p, dgate, gates.value)
    dk = dv = None
    if needs[1] or needs[2]:
        dk, dv, _, _ = key_side(p, upstream, lse, delta, gates, through)
    return [dq, dk, dv, dk_mul, dv_mul, dv_add, dlogit, None]


def head_gradient(p: Problem, dgate: Tensor, value: Tensor) -> Tensor:
    """dL (M, H) of g = σ(L), which is 0 where the modality is missing."""
    if not p.packed:
        slopes = dgate.sum(-1)
    else:
        bounds = p.setting.cu_seqlens.long()
        sums = torch.nn.functional.pad(dgate[:, 0].double().cumsum(-1), (1, 0))
        slopes = (sums[..., bounds[1:]] - sums[..., bounds[:-1]]).float().transpose(1, 2)
    return (slopes * (value * (1 - value))[..., 0]).sum(1)


def token_gradients(
    p: Problem, upstream: Tensor, attended: Tensor, lse: Tensor, gates: Gates, continued: bool, needs: Sequence[bool]
) -> list[Tensor | None]:
    dq, _, _, delta = query_side(p, upstream, attended, lse, gates.value, needs[0])
    dk, dv, maps, dlogit = key_side(p, upstream, lse, delta, gates, None)
    G = p.k.shape[1]
    dk, dv = (x.unflatten(1, (G, p.group)).sum(2) if p.group > 1 else x for x in (dk, dv))
    return [dq, dk, dv, maps[0], maps[1], maps[2], dlogit, maps[3] if p.k_add is not None else None]
