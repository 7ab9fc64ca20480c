"""A module's trained tensors, on their way into a checkpoint and back."""

from collections.abc import Mapping

from torch import Tensor, nn

from mitrain.core.errors import CheckpointError
from mitrain.core.safe_io import first_of, is_finite, misfits


def only_trainable(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of ``module`` by name; CheckpointError if any parameter is frozen.

    The last line of defence against a base model's weights in an adapter's checkpoint.
    """
    tensors = module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            raise CheckpointError(f"{name!r} is frozen and has no place in a checkpoint: save trained modules only")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def not_finite(groups: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """Where ``groups`` of named tensors first hold an infinity or a NaN, as "adapter.gate (1 of 64 elements)", or None."""
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not is_finite(tensor):
                count = int((~tensor.float().isfinite()).sum())
                return f"{group}.{name} ({count} of {tensor.numel()} elements)"
    return None


def restore(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load saved ``tensors`` into ``module``; CheckpointError lists what is not finite, and names and shapes that differ."""
    check_fit(module, tensors, what)
    module.load_state_dict(dict(tensors))


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """CheckpointError where ``tensors`` cannot be loaded into ``module``, which may lie on the meta device."""
    if wrong := misfits(module.state_dict(), tensors):
        raise CheckpointError(f"the saved {what} does not fit: {first_of(wrong)}: use the configuration it was saved with")
