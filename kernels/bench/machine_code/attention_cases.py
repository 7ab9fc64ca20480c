"""The kernels as the offline compiler takes them: every entry of the tables of tiles, with the types of a training step."""

from dataclasses import replace
from typing import Any

import torch
from mitrain_kernels.infused_attention.triton_backward import key_kernel, query_kernel
from mitrain_kernels.infused_attention.triton_forward import forward_kernel, merge_kernel, split_kernel
from mitrain_kernels.infused_attention.triton_gate import gate_backward_kernel, gate_kernel, sums_kernel, values_kernel
from mitrain_kernels.infused_attention.triton_launch import DECODE, MOST_SPLITS, SCAN, Tile, padded, tile_for

from bench.machine_code.compilation import Case

TENSORS = "Q K V OUT ATTENDED DOUT INNER INWARD DQ DK DV"
BYTES = "VALID PRESENT"
FLOATS = "window softcap scale eps"
KERNELS = {"forward": forward_kernel, "query": query_kernel, "key": key_kernel}
ENTRIES = [*((width, "bf16", False) for width in (64, 128, 256)), (128, "bf16", True), (128, "fp32", False)]
"""Head width, type, and whether under the gate 'token': the widest heads that each entry of the tables serves."""


def kind_of(name: str, dtype: str) -> str:
    """Triton's type of an argument: pointers are in capitals, numbers are not."""
    if name.isupper():
        return "*u8" if name in BYTES.split() else f"*{dtype}" if name in TENSORS.split() else "*fp32"
    return "fp32" if name in ("softcap", "scale", "eps") else "i32"


def case(name: str, kernel: Any, constants: dict, dtype: str, warps: int, stages: int, width: int, dots: bool) -> Case:
    """One kernel for padded batches (no bounds), strides multiples of 16 as contiguous tensors have them."""
    absent = dict.fromkeys(("BOUNDS", "VALID", "PRESENT", "KA", "BEFORE_DOT", "BEFORE_SQUARE", "BEFORE_COUNT"))
    constants = {n: x for n, x in (absent | constants).items() if n in kernel.arg_names}
    signature = {n: kind_of(n, dtype) for n in kernel.arg_names if n not in constants}
    aligned = tuple(n for n in signature if n[:2] in ("q_", "k_", "v_", "o_", "d_", "dk") and n.islower())
    return Case("infused_attention_" + name, kernel, signature, constants, warps, stages, width, dtype, aligned, dots)


def attention_case(target: str, name: str, width: int, dtype: str, token: bool, tile: Tile | None = None) -> Case:
    """tile: in place of the table's."""
    kernel, columns = KERNELS[name], padded(width)
    tile = tile or tile_for(target, name, columns, torch.float32 if dtype == "fp32" else torch.bfloat16, token)
    own, step = ("BN", "BM") if name == "key" else ("BM", "BN")
    constants = {
        "M": 1, "D": width, "BD": columns, own: tile.own, step: tile.step,
        "CAUSAL": True, "WINDOW": False, "SOFTCAP": False, "TOKEN": token,
    }  # fmt: skip
    if name == "key":
        constants["APART"] = tile.apart
    title = name + ("_token" if token else "")
    found = case(title, kernel, constants, dtype, tile.warps, tile.stages, width, dots=dtype != "fp32")
    return replace(found, options=tile.options, useful=4 / 5 if tile.apart else 1.0)


def gate_cases() -> list[Case]:
    width = {"M": 1, "D": 128, "BD": 128, "BN": 64}
    scan = {"M": 1, "BT": SCAN, "WHOLE": False}
    kernels = (
        ("sums", sums_kernel, width),
        ("gate", gate_kernel, scan | {"TOKEN": False}),
        ("gate_backward", gate_backward_kernel, scan),
        ("values", values_kernel, width),
    )
    return [case(name, kernel, constants, "bf16", 4, 3, 128, dots=False) for name, kernel, constants in kernels]


def decode_cases() -> list[Case]:
    """Heads in groups of four, one modality, 64 splits. On gfx942 waves repeat the 16 rows that these are padded to."""
    constants = {"M": 1, "D": 128, "BD": 128, "BM": 16, "BN": DECODE.step, "WINDOW": False, "SOFTCAP": False}
    split = case("decode", split_kernel, constants, "bf16", DECODE.warps, DECODE.stages, 128, dots=True)
    merge = case(
        "decode_merge", merge_kernel, {"M": 1, "D": 128, "BD": 128, "BS": MOST_SPLITS}, "bf16", 4, 3, 128, dots=False
    )
    return [replace(split, bound_by_memory=True), merge]


def audit_cases(target: str) -> list[Case]:
    """Every kernel at every entry of its table."""
    attention = [attention_case(target, name, *entry) for entry in ENTRIES for name in KERNELS]
    return attention + decode_cases() + gate_cases()
