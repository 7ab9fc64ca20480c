"""Published adapters: a folder in PEFT's layout with everything that predictions need except the frozen weights.

    DIR/
        adapter_config.json          method and settings, the base's name and shape, checksums; of a run also its
                                     configuration, the encoders with their preprocessing, answers, metrics
        adapter_model.safetensors    adapter.*, and of a run head.* and features.*
        README.md                    the model card

docs/checkpoints.md has the format. Written whole or not at all; read as what a stranger may have made.
"""

from mitrain.pretrained.card import model_card
from mitrain.pretrained.contents import Contents, EncoderPart, Parameters, PreprocessPart, RunPart
from mitrain.pretrained.folder import (
    CONFIG,
    FORMAT,
    Published,
    check_target,
    count,
    is_published,
    method_fields,
    publish,
    read,
)
from mitrain.pretrained.shapes import BaseShape, EncoderShape, base_shape, require_same

__all__ = [
    "CONFIG",
    "FORMAT",
    "BaseShape",
    "Contents",
    "EncoderPart",
    "EncoderShape",
    "Parameters",
    "PreprocessPart",
    "Published",
    "RunPart",
    "base_shape",
    "check_target",
    "count",
    "is_published",
    "method_fields",
    "model_card",
    "publish",
    "read",
    "require_same",
]
