"""Tensors of checkpoints that transformers wrote through bitsandbytes → the payload of our layers.

    int8   ``weight`` int8 (out, in), ``SCB`` fp32 (out,) = max|row|, ``weight_format`` 0 (rows)
    nf4    ``weight`` uint8 (⌈n/2⌉, 1), ``weight.absmax``, ``weight.quant_map``, ``weight.quant_state.bitsandbytes__nf4``
           (JSON as bytes); with double quantisation absmax is uint8 and ``weight.nested_absmax``,
           ``weight.nested_quant_map`` and the state's ``nested_*`` give it back

Pure arithmetic: bitsandbytes itself is not needed.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mitrain.core import parsing
from mitrain.core.errors import ModelError
from mitrain.models.quant import formats
from mitrain.models.quant.linear import FrozenInt8Linear, FrozenNF4Linear, frozen

STATE = "weight.quant_state.bitsandbytes__"
INT8_PARTS = ("weight", "SCB", "weight_format")
NESTED = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
NF4_PARTS = ("weight", *(f"weight.{part}" for part in NESTED), f"{STATE}nf4", f"{STATE}fp4")


def stored_as(names: set[str], prefix: str) -> str | None:
    """``int8`` or ``nf4`` if the checkpoint holds the linear layer ``prefix`` in bitsandbytes' format, else None."""
    if f"{prefix}.SCB" in names:
        return "int8"
    return "nf4" if f"{prefix}.weight.absmax" in names else None


def fill_int8(layer: FrozenInt8Linear, tensors: Mapping[str, Tensor], where: str) -> None:
    """Take a row-wise int8 matrix: our step is its max|row| / 127, the rounding is kept."""
    payload, largest = tensors["weight"], tensors["SCB"]
    if payload.dtype != torch.int8 or payload.shape != (layer.out_features, layer.in_features):
        raise misfit(where, f"its int8 weight is {payload.dtype} {tuple(payload.shape)}")
    if largest.numel() != layer.out_features or int(tensors.get("weight_format", torch.tensor(0))) != 0:
        raise misfit(where, "its rows have another order or other scales")
    layer.qweight, layer.scale = frozen(payload), frozen((largest.float() / 127).reshape(-1))


def fill_nf4(layer: FrozenNF4Linear, tensors: Mapping[str, Tensor], where: str) -> None:
    """Take a packed nf4 matrix; doubly quantised scales become fp32."""
    if f"{STATE}nf4" not in tensors:
        raise misfit(where, "it is 4-bit, but not nf4")
    state = read_state(tensors[f"{STATE}nf4"], where)
    count, block = layer.out_features * layer.in_features, int(state["blocksize"])
    packed, absmax = tensors["weight"].reshape(-1).view(torch.uint8), tensors["weight.absmax"]
    if math.prod(state["shape"]) != count or len(packed) != -(-count // 2):
        raise misfit(where, f"its nf4 matrix is {state['shape']}")
    table = tensors.get("weight.quant_map")
    if table is not None and not torch.allclose(table.float().cpu(), torch.tensor(formats.NF4), atol=1e-6):
        raise misfit(where, "its code table is not nf4's")
    absmax = unnested(absmax, tensors, state) if absmax.dtype == torch.uint8 else absmax.float()
    if len(absmax) != -(-count // block):
        raise misfit(where, f"it has {len(absmax)} scales")
    layer.block, layer.qweight, layer.absmax = block, frozen(packed.clone()), frozen(absmax)


def unnested(absmax: Tensor, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Tensor:
    """Doubly quantised scales (QLoRA, section 3): table[code] · outer scale + offset."""
    values = tensors["weight.nested_quant_map"].float()[absmax.long()]
    outer = tensors["weight.nested_absmax"].float().repeat_interleave(int(state["nested_blocksize"]))
    return values * outer[: len(values)] + float(state["nested_offset"])


def read_state(packed: Tensor, where: str) -> dict[str, Any]:
    try:
        state = parsing.parse_json(bytes(packed.cpu().to(torch.uint8).tolist()))
        return {**state, "shape": tuple(int(n) for n in state["shape"]), "blocksize": int(state["blocksize"])}
    except (ValueError, KeyError, TypeError):
        raise misfit(where, "its quantisation state cannot be read") from None


def misfit(where: str, why: str) -> ModelError:
    return ModelError(
        f"{where} does not fit ({why}): use a checkpoint of this model in bitsandbytes' int8 or nf4, or in floats"
    )
