"""Infused SwiGLU (MiT, arXiv 2403.05060, Eq. 6-7): a gated feed-forward activation times a modality's factors."""

from mitrain_kernels.infused_swiglu.op import BACKENDS, infused_swiglu, infused_swiglu_reference

__all__ = ["BACKENDS", "infused_swiglu", "infused_swiglu_reference"]
