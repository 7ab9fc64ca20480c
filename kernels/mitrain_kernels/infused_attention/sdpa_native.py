"""The ``sdpa`` backend with compiled arithmetic around attention: the same steps as in ``sdpa.py``, in ``native.c``.

Attention itself is torch's, forward, and the tiles of ``tiles.py``, backward. Serves float32 under the gates 'prefix' and
'sequence', which is the usual training; ``takes`` says whether a call is of that kind.

Shapes: B batch, H query heads, G key/value heads, T tokens (Tq queries, Tk keys), d head width, M modalities.
"""

import ctypes
import itertools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mitrain_kernels import native
from mitrain_kernels.infused_attention.affine import Maps, visible
from mitrain_kernels.infused_attention.call import Setting
from mitrain_kernels.infused_attention.gate import same_gate
from mitrain_kernels.infused_attention.tiles import KeySide, Part, parts, spans, tile_width
from mitrain_kernels.infused_attention.workspace import workspace

SOURCE = Path(__file__).with_name("native.c")
MOST_SUMS, MOST_COLUMNS = 64, 512  # as in native.c
WORTH_SHARING = 1 << 14
"""Elements from which a second thread is worth being woken."""
NOTHING = (0,) * 5
ITEM = torch.float32.itemsize


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
INFUSE_UPSTREAM = function("infuse_upstream", 3, 7, 1)
REDUCE_GRADIENTS = function("reduce_gradients", 1, 13, 1)
THROUGH_COSINE = function("through_cosine", 2, 11, 0)


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


def moved(x: tuple[int, ...], *index: int) -> tuple[int, ...]:
    """The array whose first entry is that of x at the indices."""
    offset = sum(i * stride for i, stride in zip(index, x[1:], strict=False))
    return (x[0] + ITEM * offset, *x[1:])


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


class Outside:
    """What attention's backward pass meets, and the gradients that it leaves: as the fields are named.

    gate (M, B, H, Tq or 1), 0 where a query sees no key. dmaps: those of k_mul, v_mul and v_add for given gates.
    """

    def __init__(
        self, upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Tensor, gate: Tensor, maps: Maps,
        setting: Setting, needs: Sequence[bool],
    ):  # fmt: skip
        self.q, self.k, self.v, self.gate, self.maps, self.setting = q, k, v, gate, maps, setting
        self.dq = rows(torch.empty_like(q)) if needs[0] else None
        self.dk, self.dv = (k.new_empty(k.shape) if needed else None for needed in needs[1:3])
        self.dmaps = [q.new_zeros(maps.v_add.shape) for _ in range(3)]
        self.dgate = workspace.take("dgate", q.dtype, (*maps.v_add.shape[:3], q.shape[2]))
        (self.base, self.number), self.sees = base_of(setting), dense(setting.sees)
        self.alive = upstream, attended  # addresses keep nothing alive
        self.rows = [array(x) for x in (upstream, q, attended, self.dq)]
        self.vectors = [array(x) for x in (*maps[:3], *self.dmaps)]
        self.gates = gates(gate), array(self.dgate)

    def part(self, part: Part, width: int) -> None:
        b, h = part.samples.start, part.heads.start
        side = KeySide(*(None if x is None else part.keys_of(x, x.dtype) for x in (self.k, self.v, self.dk, self.dv)))
        vectors = [moved(x, 0, b, h) for x in self.vectors]
        base = 0 if self.base is None else self.base.data_ptr() + 4 * b
        for queries, keys in spans(self.q.shape[2], self.k.shape[2], width, self.setting):
            self.tile(part, side, queries, keys, vectors, base)

    def tile(
        self, part: Part, side: KeySide, queries: slice, keys: slice, vectors: list[tuple[int, ...]], base: int
    ) -> None:
        b, h, t = part.samples.start, part.heads.start, queries.start
        shape = part.samples.stop - b, part.heads.stop - h, queries.stop - t, self.q.shape[3]
        upstream, q, attended, dq = (moved(x, b, h, t) for x in self.rows)
        gate, dgate = (moved(x, 0, b, h, t) for x in self.gates)
        k_mul, v_mul, v_add, *dmaps = vectors
        inward, inner = (workspace.take(slot, self.q.dtype, shape) for slot in ("upstream", "inner"))
        sees = 0 if self.sees is None else self.sees.data_ptr() + b * self.q.shape[2] + t
        sizes = sizes_of(shape, (shape[0], part.groups.stop - part.groups.start, 0), len(self.gate))
        INFUSE_UPSTREAM(
            sizes, (sees, self.q.shape[2], base),
            [upstream, q, k_mul, v_mul, gate, array(inward), array(inner)], self.number,
        )  # fmt: skip
        flat = (len(side.k), -1, shape[-1])
        side.backward(inner.view(flat), inward.view(flat), part.samples, queries, keys, self.setting)
        REDUCE_GRADIENTS(
            sizes, (base,), [array(inner), upstream, q, attended, k_mul, v_mul, v_add, gate, dq, *dmaps, dgate],
            self.number,
        )  # fmt: skip


def backward(
    upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, maps: Maps, setting: Setting, attended: Tensor,
    kept: Sequence[Tensor], needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """As ``sdpa.backward``; kept: the gate's cosine and root, and its sums' square and count."""
    cosine, root, square, count = kept
    maps, gate = Maps(*map(rows, maps)), same_gate(maps.head_logit, cosine, root, setting.present).value
    outside = Outside(*map(rows, (upstream, q, k, v, attended)), visible(gate, setting), maps, setting, needs)
    width = tile_width(q, k)
    for part in parts(q, k, width):
        outside.part(part, width)
    new, (M, B, H, _) = cosine.shape[-1], maps.v_add.shape
    dlogit, valid = q.new_empty(M, B, H), dense(setting.valid)
    THROUGH_COSINE(
        sizes_of(q.shape, v.shape, M), (setting.kind == "prefix", address(valid)),
        [array(outside.dgate), gates(outside.gate), *map(array, (cosine, root)), array(square[..., -new:]),
         array(count[..., -new:]), *map(array, (outside.v, maps.v_add, outside.dv, outside.dmaps[-1], dlogit))],
    )  # fmt: skip
    dq = outside.dq if outside.dq is None or q.stride(-1) == 1 else torch.empty_like(q).copy_(outside.dq)
    return [dq, outside.dk, outside.dv, *outside.dmaps, dlogit.sum(1), None]
