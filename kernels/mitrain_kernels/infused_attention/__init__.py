"""Infused attention (MiT, arXiv 2403.05060): the definition and the form that leaves keys and values alone."""

from mitrain_kernels.infused_attention.folded import (
    GateSums,
    coefficients,
    folded_coefficients,
    gate_values,
    infused_attention_folded,
    infused_keys_values,
    keep_dead,
    prefix_sums,
)
from mitrain_kernels.infused_attention.reference import GATES, infused_attention_reference

__all__ = [
    "GATES",
    "GateSums",
    "coefficients",
    "folded_coefficients",
    "gate_values",
    "infused_attention_folded",
    "infused_attention_reference",
    "infused_keys_values",
    "keep_dead",
    "prefix_sums",
]
