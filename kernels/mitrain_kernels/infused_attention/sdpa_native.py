"""The ``sdpa`` backend with compiled arithmetic around attention: the same steps as in ``sdpa.py``, in ``native.c``.

Attention itself is torch's, forward; backward it is in ``native_backward.h``, over the BLAS that torch computes with:
what ``tiles.py`` does for all heads at once is done there head by head, so that a tile never leaves a core's cache. Serves
float32 under the gates 'prefix' and 'sequence', which is the usual training; ``takes`` and ``takes_backward`` say whether
a call is of that kind.

Shapes: B batch, H query heads, G key/value heads, T tokens (Tq queries, Tk keys), d head width, M modalities.
"""

import ctypes
import itertools
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mitrain_kernels import native
from mitrain_kernels.infused_attention.affine import Maps
from mitrain_kernels.infused_attention.call import Setting
from mitrain_kernels.infused_attention.workspace import workspace

SOURCE = Path(__file__).with_name("native.c")
MOST_SUMS, MOST_COLUMNS = 64, 512  # as in native.c
WORTH_SHARING = 1 << 14
"""Elements from which a second thread is worth being woken."""
ROWS, LEAST_ROWS, WEIGHTS = 128, 32, 1 << 16
"""Of a tile of the backward pass: rows at most and at least, and elements of its weights, which stay in a core's cache."""
NOTHING = (0,) * 5


class Function(NamedTuple):
    """A function of native.c and its struct: sizes, then integers, arrays and numbers in order, of 64 bits each."""

    name: str
    words: struct.Struct

    def __call__(self, sizes: Sequence[int], integers: Sequence[int], arrays: Sequence, *numbers: float) -> None:
        call = getattr(library(), self.name)
        call(self.words.pack(*sizes, *integers, *itertools.chain.from_iterable(arrays), *numbers))


def function(name: str, integers: int, arrays: int, numbers: int) -> Function:
    return Function(name, struct.Struct(f"={SIZES + integers + 5 * arrays}q{numbers}d"))


SIZES = 8
INFUSE_QUERY = function("infuse_query", 6, 12, 2)
INFUSE_OUTPUT = function("infuse_output", 1, 5, 1)
BACKWARD = function("backward", 10, 25, 2)


def library() -> ctypes.CDLL | None:
    return native.load(SOURCE)


def takes(q: Tensor, v: Tensor, modalities: int, setting: Setting, continued: bool) -> bool:
    """Whether a call on q (B, H, Tq, d) and v (B, G, Tk, d) is of the kind that native.c knows, and the library is there."""
    (_, H, _, d), G = q.shape, v.shape[1]
    return (
        q.dtype == torch.float32
        and q.device.type == "cpu"
        and setting.kind in ("prefix", "sequence")
        and not continued
        and 0 < modalities * (H // G) <= MOST_SUMS
        and d <= MOST_COLUMNS
        and library() is not None
    )


def array(x: Tensor | None) -> tuple[int, ...]:
    """A tensor of up to four dimensions: its address and strides; the columns of rows are adjacent."""
    if x is None:
        return NOTHING
    strides = x.stride()
    return (x.data_ptr(), *strides, *NOTHING[1 + len(strides) :])


def gates(x: Tensor) -> tuple[int, ...]:
    """As ``array``; one gate for all queries has the stride 0."""
    strides = x.stride()
    return (x.data_ptr(), *strides[:3], strides[3] if x.shape[3] > 1 else 0)


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def sizes_of(q: Sequence[int], v: Sequence[int], modalities: int) -> tuple[int, ...]:
    """Of the shapes of q and v."""
    B, H, Tq, d = q
    threads = torch.get_num_threads() if B * H * Tq * d >= WORTH_SHARING else 1
    return modalities, B, H, v[1], Tq, v[2], d, threads


def dense(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


def rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def base_of(setting: Setting) -> tuple[Tensor | None, float]:
    """The base of each sample (B,), or the one of all."""
    if isinstance(setting.base, Tensor):
        return setting.base.to(torch.float32).contiguous(), 1.0
    return None, float(setting.base)


def forward(q: Tensor, k: Tensor, v: Tensor, maps: Maps, setting: Setting, trains: bool) -> tuple[Tensor, ...]:
    """As ``sdpa.forward``."""
    maps, (M, B, H, _), (Tq, Tk) = Maps(*map(rows, maps)), maps.v_add.shape, (q.shape[2], v.shape[2])
    prefix, (base, number) = setting.kind == "prefix", base_of(setting)
    each, summed = (Tq, Tk) if prefix else (1, 1)
    gate = workspace.take("gate", q.dtype, (M, B, H, each if setting.sees is None else Tq))
    cosine, root = (q.new_empty(M, B, H, each) for _ in range(2))
    sums = q.new_empty(M, B, H, summed), q.new_empty(B, v.shape[1], summed), q.new_empty(B, summed)
    inner = workspace.take("inner", q.dtype, q.shape) if prefix or Tq == 1 else torch.empty_like(q)
    valid, sees, present = map(dense, (setting.valid, setting.sees, setting.present))
    INFUSE_QUERY(
        sizes_of(q.shape, v.shape, M), (prefix, gate.shape[-1], *map(address, (valid, sees, present, base))),
        [array(q), array(v), *map(array, (maps.k_mul, maps.v_add, maps.head_logit)), gates(gate),
         *map(array, (cosine, root, *sums, inner))], number, setting.eps,
    )  # fmt: skip
    ordered = setting.causal and setting.mask is None and Tq > 1
    attended = F.scaled_dot_product_attention(
        inner, k, v, is_causal=ordered, attn_mask=setting.mask, scale=setting.scale, enable_gqa=k.shape[1] != H
    )
    attended = rows(attended)
    output = torch.empty_like(attended)
    INFUSE_OUTPUT(
        sizes_of(q.shape, v.shape, M), (address(base),),
        [*map(array, (attended, maps.v_mul, maps.v_add)), gates(gate), array(output)], number,
    )  # fmt: skip
    return output, attended if trains else q.new_empty(0), q.new_empty(0), cosine, root, *sums


def takes_backward(v: Tensor) -> bool:
    """Whether ``backward`` serves a call that ``takes`` accepts: there is a BLAS, and work for half of the threads."""
    return has_gemm() and 2 * v.shape[0] * v.shape[1] >= torch.get_num_threads()


@cache
def has_gemm() -> bool:
    return native.torch_gemm() is not None


def tile_width(heads: int, queries: int, keys: int) -> int:
    """Queries of a tile: a power of two, so that rows are at most ROWS and weights at most WEIGHTS."""
    most = max(1, min(ROWS, max(LEAST_ROWS, WEIGHTS // keys)) // heads)
    return min(queries, 1 << (most.bit_length() - 1))


def matrix(x: Tensor) -> Tensor:
    """x with rows as a BLAS takes them: adjacent columns, apart by their length at least, even a single one."""
    whole = x.stride(-1) == 1 and x.stride(-2) >= x.shape[-1]
    return x if whole else x.clone(memory_format=torch.contiguous_format)


def backward(
    upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, maps: Maps, setting: Setting, attended: Tensor,
    kept: Sequence[Tensor], needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """As ``sdpa.backward``; kept: the gate's cosine and root, and its sums' square and count."""
    cosine, root, square, count = kept
    maps, (M, B, H, d), (Tq, Tk) = Maps(*map(rows, maps)), maps.v_add.shape, (q.shape[2], v.shape[2])
    asked, (upstream, q, attended), (k, v) = q, map(rows, (upstream, q, attended)), map(matrix, (k, v))
    dq = torch.empty_like(q) if needs[0] else None
    dk, dv = (k.new_empty(k.shape) if needed else None for needed in needs[1:3])
    dmaps, dlogit = [q.new_empty(M, B, H, d) for _ in range(3)], q.new_empty(M, H)
    gate, dgate = (workspace.take(slot, q.dtype, (M, B, H, Tq)) for slot in ("gate", "dgate"))
    sizes, width, new = sizes_of(q.shape, v.shape, M), tile_width(H // v.shape[1], Tq, Tk), cosine.shape[-1]
    room = H // v.shape[1] * width * 2 * (d + Tk)
    scratch = workspace.take("scratch", q.dtype, (sizes[-1], room))
    valid, sees, present = map(dense, (setting.valid, setting.sees, setting.present))
    mask, (base, number) = setting.mask, base_of(setting)
    mask = mask if mask is None or mask.dtype in (torch.bool, torch.float32) else mask.float()
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    BACKWARD(
        sizes, (setting.kind == "prefix", setting.causal, setting.window or 0, width, kind, room,
                *map(address, (valid, sees, present, base))),
        [array(scratch), NOTHING if mask is None else array(mask.expand(B, -1, -1, -1)),
         *map(array, (upstream, q, k, v, attended, *maps, cosine, root, square[..., -new:], count[..., -new:],
                      gate, dgate, dq, dk, dv, *dmaps, workspace.take("dlogits", q.dtype, (M, B, H)), dlogit))],
        number, setting.scale,
    )  # fmt: skip
    dq = dq if dq is None or q is asked else torch.empty_like(asked).copy_(dq)
    return [dq, dk, dv, *dmaps, dlogit, None]
