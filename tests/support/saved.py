"""What autograd keeps for a backward pass, measured."""

from collections.abc import Callable, Iterable

import torch


def saved_bytes(run: Callable[[], torch.Tensor], own: Iterable[torch.Tensor]) -> int:
    """Bytes of distinct storages that autograd keeps during ``run()``, those of ``own`` left out."""
    storages: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep = run()
    assert keep.requires_grad
    own_storages = {tensor.untyped_storage().data_ptr() for tensor in own}
    return sum(t.untyped_storage().nbytes() for at, t in storages.items() if at not in own_storages)
