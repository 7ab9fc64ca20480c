"""Frozen weights in 8 and 4 bits: the only room that imports bitsandbytes, and it runs without."""

from mitrain.quant.embedding import FrozenInt8Embedding
from mitrain.quant.kernels import check_four_bit, nf4_fault, nothing_fetched
from mitrain.quant.linear import FrozenInt8Linear, FrozenLinear, FrozenNF4Linear
from mitrain.quant.replace import PRECISIONS, Precision, dequantised, linear_places, quantise, split_of, storage

__all__ = [
    "PRECISIONS",
    "FrozenInt8Embedding",
    "FrozenInt8Linear",
    "FrozenLinear",
    "FrozenNF4Linear",
    "Precision",
    "check_four_bit",
    "dequantised",
    "linear_places",
    "nf4_fault",
    "nothing_fetched",
    "quantise",
    "split_of",
    "storage",
]
