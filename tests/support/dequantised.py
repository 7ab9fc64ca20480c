"""What quantised layers stand for, in floats: the truth that they are held against."""

import copy

import torch
from torch import nn

from mitrain.models.quant import FrozenInt8Embedding, FrozenLinear


def plain_linear(layer: FrozenLinear, dtype: torch.dtype = torch.float32) -> nn.Linear:
    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    made.weight = nn.Parameter(layer.dense(dtype), requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return made


def dequantised(model: nn.Module) -> nn.Module:
    """A copy with plain linear layers and embedding in fp32. Untied, and without hooks' owners."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        owner, _, attribute = name.rpartition(".")
        if isinstance(module, FrozenInt8Embedding):
            plain: nn.Module = nn.Embedding.from_pretrained(module.dense(module.dtype))
        elif isinstance(module, FrozenLinear):
            plain = plain_linear(module)
        else:
            continue
        setattr(model.get_submodule(owner), attribute, plain)
    return model
