"""Infused attention (MiT, arXiv 2403.05060): one function, and the definition that every form of it is tested against."""

from mitrain_kernels.infused_attention.folded import (
    coefficients,
    folded_coefficients,
    infused_attention_folded,
    infused_keys_values,
    keep_dead,
)
from mitrain_kernels.infused_attention.gate import GateSums, gate_values, prefix_sums
from mitrain_kernels.infused_attention.op import infused_attention
from mitrain_kernels.infused_attention.reference import GATES, Call, infused_attention_reference

__all__ = [
    "GATES",
    "Call",
    "GateSums",
    "coefficients",
    "folded_coefficients",
    "gate_values",
    "infused_attention",
    "infused_attention_folded",
    "infused_attention_reference",
    "infused_keys_values",
    "keep_dead",
    "prefix_sums",
]
