"""Operators of multimodal infusion, usable without mitrain: each op has its own folder.

    infused_attention   attention whose keys and values are multiplied by, and added to, a modality's vectors
    infused_swiglu      SiLU(gate) ⊙ up ⊙ a factor per sample, the feed-forward's part of the infusion

An op's folder holds its definition (the slow truth) and its faster forms, all tested against it; triton is imported at
the first launch of one of its kernels.
"""

__version__ = "0.1.0"
