"""The Triton backend: prepares tensors and launches the kernels; the interface is that of ``sdpa``.

Tiles come from an explicit table per architecture, kernel and padded head width; nothing is tuned at run time. Which
entries compile without spills in their loops is audited by ``python kernels/bench machine-code``.

Where ``cu_seqlens`` packs S sequences, q, k, v are (1, heads, R, d) and a "sample" is a sequence.
Shapes: B samples, H query heads, G key/value heads, T tokens (Tq queries, Tk keys), d head width, M modalities.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mitrain_kernels.infused_attention.gate import (
    COSINE_GATES,
    constant_gate,
    head_gradient,
    opened,
    prefix_sums,
    without_missing,
)
from mitrain_kernels.infused_attention.reference import Call
from mitrain_kernels.infused_attention.sdpa import rows
from mitrain_kernels.infused_attention.triton_backward import key_kernel, query_kernel
from mitrain_kernels.infused_attention.triton_forward import forward_kernel, merge_kernel, split_kernel
from mitrain_kernels.infused_attention.triton_gate import gate_backward_kernel, gate_kernel, sums_kernel, values_kernel

INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


class Tile(NamedTuple):
    """A program's own rows, the rows of a step of its loop, its warps, the stages of the loop's loads, of AMD the rows
    of a matrix instruction (0: Triton's choice, 32, which lets warps repeat each other on small tiles), and whether dV and
    dK are made one after the other: five dots in place of four, where the sums of both do not fit in the registers."""

    own: int
    step: int
    warps: int
    stages: int
    nonkdim: int = 0
    apart: bool = False

    @property
    def options(self) -> dict[str, int]:
        return {"matrix_instr_nonkdim": self.nonkdim} if self.nonkdim else {}


# {kernel: {padded head width: tile}} for 16-bit types; narrower heads take the tile of 64. Chosen by what the compiler makes
# of them (python kernels/bench machine-code --search), not by a clock: no GPU has run them. Warps lie along the rows if a
# program owns at least as many as a head is wide, else along the step; a tile too small for them makes them repeat.
SM_80 = {
    "forward": {64: Tile(128, 64, 4, 3), 128: Tile(128, 32, 4, 2), 256: Tile(32, 64, 4, 2)},
    "query": {64: Tile(128, 32, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(32, 64, 4, 2)},
    "key": {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(32, 32, 4, 2)},
}
SM_86 = {
    "forward": SM_80["forward"] | {128: Tile(64, 64, 4, 2), 256: Tile(32, 32, 4, 2)},
    "query": SM_80["query"] | {256: Tile(32, 32, 4, 2)},
    "key": SM_80["key"] | {256: Tile(16, 32, 4, 2)},
}
SM_90 = {
    "forward": {64: Tile(128, 128, 8, 2), 128: Tile(128, 128, 8, 2), 256: Tile(128, 32, 8, 2)},
    "query": {64: Tile(128, 128, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2)},
    "key": {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(128, 32, 8, 2, apart=True)},
}
SM_100 = {
    "forward": {64: Tile(128, 64, 4, 3), 128: Tile(128, 128, 8, 2), 256: Tile(128, 32, 8, 2)},
    "query": {64: Tile(128, 128, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2)},
    "key": {64: Tile(128, 64, 4, 2), 128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2, apart=True)},
}
GFX942 = {
    "forward": {64: Tile(64, 64, 4, 1, 16), 128: Tile(64, 32, 4, 1, 16), 256: Tile(64, 32, 4, 1, 16)},
    "query": {64: Tile(64, 32, 4, 1, 16), 128: Tile(64, 32, 4, 1, 16), 256: Tile(64, 16, 4, 1, 16)},
    "key": {64: Tile(64, 32, 4, 1, 16), 128: Tile(64, 32, 4, 1, 16), 256: Tile(64, 16, 4, 1, 16)},
}
TILES = {"sm_80": SM_80, "sm_86": SM_86, "sm_90": SM_90, "sm_100": SM_100, "gfx942": GFX942}
# Under the gate 'token', and of float32 tensors (without tensor cores): one tile up to a head width of 128. On sm_100 the
# keys' side stays below the 64 rows that UTC*MMA takes: Triton 3.7 fails to compile more.
ALL = ("forward", "query", "key")
TOKEN = {
    **dict.fromkeys(("sm_80", "sm_86"), dict.fromkeys(ALL, Tile(32, 32, 4, 2))),
    **dict.fromkeys(("sm_90", "sm_100"), dict.fromkeys(ALL, Tile(64, 32, 4, 2)) | {"key": Tile(32, 32, 4, 2)}),
    "gfx942": dict.fromkeys(ALL, Tile(64, 32, 4, 1, 16)),
}
WIDE = dict.fromkeys(TILES, Tile(16, 16, 8, 2)) | {"sm_90": Tile(16, 16, 4, 2), "gfx942": Tile(16, 16, 4, 1)}
DECODE = Tile(16, 64, 4, 2)
"""Of the decode kernel: its own rows are the heads of a group, at least 16."""
PROGRAMS, MOST_SPLITS = 264, 64
"""Decoding splits the keys until there are so many programs (two per SM of an H100), at most so often."""
SCAN = 256
"""Tokens that a scan takes at a time."""


def padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def tile_for(target: str, kernel: str, width: int, dtype: torch.dtype, token: bool) -> Tile:
    """``width`` is the padded head width."""
    if target == "interpreter":
        return Tile(16, 16, 4, 1)
    if dtype == torch.float32:
        return WIDE[target]
    return TOKEN[target][kernel] if token else TILES[target][kernel][max(width, 64)]


def target_of(device: torch.device) -> str:
    """The entry of ``TILES`` for a device; of GPUs that are not listed sm_86 stands for those with less shared memory."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    if capability in ((8, 0), (8, 7)):
        return "sm_80"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(capability[0], "sm_86")


def on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def like_output(q: Tensor) -> Tensor:
    """An empty (B, H, T, d) in the layout (B, T, H, d), which the projection behind attention reads without a copy."""
    B, H, T, d = q.shape
    return q.new_empty(B, T, H, d).transpose(1, 2)


class Problem:
    """One call's tensors and numbers, as every kernel wants them."""

    def __init__(self, call: Call):
        q, k, present, base = call.q, call.k, call.present, call.base
        self.call, self.q, self.k, self.v = call, rows(q), rows(k), rows(call.v)
        maps = without_missing(present, call.k_mul, call.v_mul, call.v_add, call.k_add)
        *self.maps, self.k_add = (x if x is None else x.contiguous() for x in maps)
        self.logit = call.head_logit.float().contiguous()
        (self.H, self.queries), self.keys = q.shape[1:3], k.shape[2]
        self.M, self.B, self.group, self.width = len(self.logit), call.v_add.shape[1], self.H // k.shape[1], q.shape[3]
        self.packed, self.token, self.whole = call.cu_seqlens is not None, call.gate == "token", call.gate == "sequence"
        self.summed = self.keys if call.state_in is None else self.queries  # the last values, whose sums are new
        lengths = call.cu_seqlens.diff() if self.packed else None
        self.longest = int(lengths.max()) if self.packed else self.queries
        self.longest_keys = self.longest if self.packed else self.keys
        self.valid, self.present = (
            x if x is None else x.contiguous().view(torch.uint8) for x in (call.key_padding, present)
        )
        self.base = base.float() if isinstance(base, Tensor) else q.new_full((self.B,), base, dtype=torch.float32)
        v_add = self.maps[2].float()
        self.valid_stride = 0 if self.valid is None else self.valid.stride(0)
        self.sizes = self.B, self.H, self.group, self.queries, self.keys
        self.numbers = call.window or 0, call.softcap or 0.0, call.scale
        self.norm = torch.linalg.vecdot(v_add, v_add).contiguous() if call.gate in COSINE_GATES else None

    def tile(self, kernel: str) -> Tile:
        return tile_for(target_of(self.q.device), kernel, padded(self.width), self.q.dtype, self.token)

    def spans(self, *tensors: Tensor) -> list[int]:
        """Strides of samples, heads and tokens; packed samples differ by their first token alone."""
        return [s for x in tensors for s in (0 if self.packed else x.stride(0), x.stride(1), x.stride(2))]

    def scalars(self, x: Tensor) -> list[int]:
        """The same for (…, B, H, T) scalars, T = 1 standing for all tokens: strides from the third-last dimension on."""
        sample = 0 if self.packed and x.shape[-3] == 1 else x.stride(-3)
        return [*x.stride()[:-3], sample, x.stride(-2), 0 if x.shape[-1] == 1 else x.stride(-1)]

    def options(self, tile: Tile, *, own: str, step: str) -> dict[str, Any]:
        s = self.call
        return {
            "M": self.M, "D": self.width, "BD": padded(self.width), own: tile.own, step: tile.step,
            "CAUSAL": s.causal, "WINDOW": s.window is not None, "SOFTCAP": s.softcap is not None, "TOKEN": self.token,
            "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True, **tile.options,
        }  # fmt: skip


prepared = Problem


class Gates(NamedTuple):
    """value, cosine, root (M, B, H, T'), and the sums dot (M, B, H, T'), square (B, G, T'), count (B, T')."""

    value: Tensor
    cosine: Tensor
    root: Tensor
    dot: Tensor
    square: Tensor
    count: Tensor


def gates_of(p: Problem) -> Gates:
    """One read of the values, one scan."""
    kind, v, before, bounds, tokens, whole = p.call.gate, p.v, p.call.state_in, p.call.cu_seqlens, p.summed, p.whole
    if kind not in COSINE_GATES:
        value = constant_gate(p.logit, p.B, p.call.present, cosine=kind == "head")
        return Gates(value, *(p.base.new_empty(0) for _ in range(5)))
    batch = 1 if p.packed else p.B
    G, new = v.shape[1], {"device": v.device, "dtype": torch.float32}
    dot, square = torch.empty(p.M, batch, p.H, tokens, **new), torch.empty(batch, G, tokens, **new)
    length, gated = (1, p.B) if whole else (tokens, batch)
    value, cosine, root, sum_dot = (torch.empty(p.M, gated, p.H, length, **new) for _ in range(4))
    sum_square, count = torch.empty(gated, G, length, **new), torch.empty(gated, length, **new)
    if not p.M:
        if kind == "prefix" and not p.packed:
            valid = None if p.call.key_padding is None else p.call.key_padding[:, -tokens:]
            _, sum_square, count = prefix_sums(v[:, :, -tokens:], p.maps[2], valid, before)
        return Gates(*(x[..., -p.queries :] for x in (value, cosine, root)), sum_dot, sum_square, count)
    blocks = triton.cdiv(p.longest_keys if before is None else tokens, 64)
    common = (p.B, p.H, p.group, tokens, p.keys - tokens)
    earlier = (None, None, None) if before is None else [x.contiguous() for x in before]
    width = {"M": p.M, "D": p.width, "BD": padded(p.width), "BN": 64}
    with on(v.device):
        sums_kernel[(blocks, G, p.B)](
            v, p.maps[2], p.valid, bounds, dot, square, *p.spans(v), p.valid_stride,
            *p.scalars(dot)[:3], *p.scalars(square)[:2], *common, **width,
        )  # fmt: skip
        gate_kernel[(p.H, p.B)](
            dot, square, p.valid, bounds, *earlier, p.norm, p.logit, p.present,
            value, cosine, root, sum_dot, sum_square, count,
            p.valid_stride, *p.scalars(dot)[:3], *p.scalars(square)[:2],
            *p.scalars(value)[:3], *p.scalars(sum_dot)[:3], *p.scalars(sum_square)[:2],
            0 if p.packed and not whole else count.stride(0), *common, p.call.eps,
            M=p.M, BT=SCAN, WHOLE=whole, TOKEN=p.token,
        )  # fmt: skip
    first = 0 if p.token or whole else tokens - p.queries
    value, cosine, root = (x[..., first:].contiguous() for x in (value, cosine, root))
    return Gates(value, cosine, root, sum_dot, sum_square, count)


def forward(p: Problem, gates: Gates, trains: bool) -> tuple[Tensor, ...]:
    """As ``sdpa.forward``; the log-sum-exp is base 2, and +inf for a query that sees no key."""
    call, q, output = p.call, p.q, like_output(p.q)
    attended = like_output(q) if trains else q.new_empty(0)
    lse = p.base.new_empty(q.shape[:3] if trains else (0,))
    if output.numel() and q.shape[2] == 1 and not (trains or p.packed or p.token):
        decode(p, gates.value, output)
    elif output.numel():
        tile = p.tile("forward")
        with on(q.device):
            forward_kernel[(triton.cdiv(p.longest, tile.own), p.H, p.B)](
                q, p.k, p.v, output, attended if trains else None, lse if trains else None, gates.value, *p.maps, p.k_add,
                p.base, p.valid, call.cu_seqlens, *p.spans(q, p.k, p.v, output),
                *(p.spans(lse)[:2] if trains else (0, 0)), *p.scalars(gates.value), p.valid_stride,
                *p.sizes, *p.numbers, **p.options(tile, own="BM", step="BN"),
            )  # fmt: skip
    return output, attended, lse, *gates[1:]


def decode(p: Problem, gate: Tensor, output: Tensor) -> None:
    """One query per head: the keys in as many shares as fill the device, then merged into ``output``."""
    G, step, s = p.k.shape[1], DECODE.step, p.call
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
    upstream: Tensor, call: Call, attended: Tensor, logsumexp: Tensor, kept: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """As ``sdpa.backward``; what ``needs`` does not ask for is None where it costs something."""
    p = Problem(call)
    cosine, root, square, count = kept
    if call.gate not in COSINE_GATES:
        value = constant_gate(p.logit, p.B, call.present, cosine=call.gate == "head")
    else:
        value = opened(cosine + p.logit[:, None, :, None], call.present, None if p.whole else call.cu_seqlens)
    upstream = rows(upstream)
    if not upstream.is_contiguous() and 0 in upstream.stride():
        upstream = upstream.contiguous()
    with on(p.q.device):
        found = token_gradients if p.token else folded_gradients
        return found(p, upstream, attended, logsumexp, Gates(value, cosine, root, cosine, square, count), needs)


class Handed(NamedTuple):
    """From the queries' side to the keys': D (B, H, Tq), and q', dA (B, H, Tq, d), None where no key needs a gradient."""

    delta: Tensor
    inner: Tensor | None
    inward: Tensor | None


def query_side(
    p: Problem, upstream: Tensor, attended: Tensor, lse: Tensor, value: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor, Tensor, Handed]:
    """dq, dg (M, B, H, Tq), the maps' gradients [3, M, B, H, d] for a given gate, and what the keys' side wants.

    needs: of q, k, v and the maps; under the gate 'token' the maps' gradients come from the keys' side too.
    """
    q, tile = p.q, p.tile("query")
    blocks = triton.cdiv(p.longest, tile.own)
    dq = like_output(q) if needs[0] else None
    wanted = p.token or needs[1] or needs[2]
    handed = Handed(torch.empty_like(lse), *(like_output(q) if wanted else None for _ in range(2)))
    rank = 0 if p.token else p.M
    dgate = lse.new_zeros(rank, *lse.shape) if p.packed else lse.new_empty(rank, *lse.shape)
    parts = lse.new_empty(blocks, 3, rank, p.B, p.H, p.width)
    query_kernel[(blocks, p.H, p.B)](
        q, p.k, p.v, attended, upstream, lse, *handed, dq, dgate, parts, value, *p.maps, p.k_add, p.base, p.valid,
        p.call.cu_seqlens, *p.spans(q, p.k, p.v, attended, upstream), *p.spans(lse)[:2], *p.scalars(value),
        dgate.stride(0), *p.spans(lse)[:2], p.valid_stride, *p.sizes, *p.numbers,
        **p.options(tile, own="BM", step="BN"),
    )  # fmt: skip
    return dq, dgate, parts.sum(0), handed


def key_side(p: Problem, lse: Tensor, handed: Handed, gates: Gates, through: tuple | None) -> tuple:
    """dk, dv per key/value head, or (token) per query head with shares of the maps' and logits' gradients."""
    tile = p.tile("key")
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
        handed.inner, p.k, p.v, handed.inward, lse, handed.delta, dk, dv, dot, square, parts, dlogit,
        gates.value, gates.cosine, gates.root, p.norm, *p.maps, p.k_add, p.base, p.valid, p.call.cu_seqlens,
        *p.spans(handed.inner, p.k, p.v, dk), *p.spans(lse)[:2], *p.scalars(gates.value), *at, p.valid_stride,
        *p.sizes, *p.numbers, APART=tile.apart, **p.options(tile, own="BN", step="BM"),
    )  # fmt: skip
    return dk, dv, parts.sum(0), dlogit.sum((0, 2))


def gate_side(p: Problem, dgate: Tensor, gates: Gates) -> tuple:
    """dot (M, B, H, T) and square (B, H, T) of every value, of v_add (M, B, H, d), of head_logit (M, H)."""
    bounds, tokens, whole = p.call.cu_seqlens, p.summed, p.whole
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
        dgate, gates.cosine, gates.root, *sums, bounds, p.norm, p.logit, p.present,
        own_dot, own_square, of_norm, dlogit,
        *p.scalars(dgate)[:3], *p.scalars(gates.cosine)[:3],
        *p.scalars(sums[0])[:2], 0 if p.packed and not whole else sums[1].stride(0),
        *p.scalars(dot)[:3], *p.scalars(square)[:2],
        p.B, p.H, p.group, tokens, p.queries, M=p.M, BT=SCAN, WHOLE=whole,
    )  # fmt: skip
    blocks = triton.cdiv(p.longest_keys, 64)
    parts = torch.empty(blocks, p.M, p.B, p.H, p.width, **new)
    values_kernel[(blocks, p.v.shape[1], p.B)](
        p.v, dot, parts, p.valid, bounds, *p.spans(p.v), p.valid_stride, *p.scalars(dot)[:3],
        p.B, p.H, p.group, p.keys, 0, M=p.M, D=p.width, BD=padded(p.width), BN=64,
    )  # fmt: skip
    return dot, square, parts.sum(0) - of_norm[..., None] * p.maps[2].float(), dlogit.sum(1)


def folded_gradients(
    p: Problem, upstream: Tensor, attended: Tensor, lse: Tensor, gates: Gates, needs: Sequence[bool]
) -> list[Tensor | None]:
    dq, dgate, maps, handed = query_side(p, upstream, attended, lse, gates.value, needs)
    dk_mul, dv_mul, dv_add = maps
    through, kind = None, p.call.gate
    dlogit = torch.zeros_like(p.logit)
    wanted = any(needs[i] for i in (1, 2, 5, 6))
    if kind in COSINE_GATES and wanted and p.M:
        *through, of_add, dlogit = gate_side(p, dgate, gates)
        dv_add = dv_add + of_add
    elif kind == "head" and p.M:
        dlogit = head_gradient(dgate, gates.value, p.call.cu_seqlens)
    dk = dv = None
    if needs[1] or needs[2]:
        dk, dv, _, _ = key_side(p, lse, handed, gates, through)
    return [dq, dk, dv, dk_mul, dv_mul, dv_add, dlogit, None]


def token_gradients(
    p: Problem, upstream: Tensor, attended: Tensor, lse: Tensor, gates: Gates, needs: Sequence[bool]
) -> list[Tensor | None]:
    dq, _, _, handed = query_side(p, upstream, attended, lse, gates.value, needs)
    dk, dv, maps, dlogit = key_side(p, lse, handed, gates, None)
    G = p.k.shape[1]
    dk, dv = (x.unflatten(1, (G, p.group)).sum(2) if p.group > 1 else x for x in (dk, dv))
    return [dq, dk, dv, maps[0], maps[1], maps[2], dlogit, maps[3] if p.k_add is not None else None]
