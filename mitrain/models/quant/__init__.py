"""Frozen weights in 8 and 4 bits: the only folder that imports bitsandbytes, and it runs without."""

from mitrain.models.quant.formats import bytes_in
from mitrain.models.quant.kernels import check_four_bit, nf4_fault, nothing_fetched
from mitrain.models.quant.linear import FrozenInt8Embedding, FrozenInt8Linear, FrozenLinear, FrozenNF4Linear
from mitrain.models.quant.replace import PRECISIONS, Precision, linear_refs, quantise, storage
