"""What the converters share: writing a ``save_pretrained`` folder and proving that it loads whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from mitrain.core.errors import PrepareError
from mitrain.core.files import write_json
from mitrain.models import loading


def save(state: Mapping[str, Tensor], config: Mapping[str, Any], target: Path) -> None:
    """Write ``model.safetensors`` and ``config.json``: the same bytes for the same weights."""
    tensors = {name: tensor.contiguous() for name, tensor in sorted(state.items())}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    write_json(target / "config.json", dict(config))


def load_whole(factory: Any, folder: Path) -> PreTrainedModel:
    """The model in ``folder``; PrepareError where a weight is missing, left over or of another shape."""
    model, info = loading.load(
        factory, folder, "converted model", dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    wrong = {kind: sorted(map(str, names))[:3] for kind, names in info.items() if names}
    if wrong:
        raise PrepareError(f"the converted weights do not fit {type(model).__name__} ({wrong}): give the right archive")
    return model.eval()


def require(fact: bool, model: str, what: str) -> None:
    """Refuse to publish a converted model that fails a check."""
    if not fact:
        raise PrepareError(f"the converted {model} fails its check ({what}): download the archive again or report this")
