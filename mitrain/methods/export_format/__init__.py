"""Published adapters: a folder with everything that predictions need except the frozen weights.

    DIR/
        mitrain.json           method and settings, the base's name and shape, checksums; of a run also its
                               configuration, the encoders with their preprocessing, answers, metrics
        mitrain.safetensors    adapter.*, and of a run head.* and features.*
        README.md              the model card

Of a method that PEFT can load by itself also its own files, as PEFT's save_pretrained writes them; where an encoder is
changed, those of each model in a folder of its own, llm/ and encoder/:

        adapter_config.json, adapter_model.safetensors

docs/guide/checkpoints.md has the format. Written whole or not at all; read as what a stranger may have made.
"""

from mitrain.methods.export_format.card import model_card
from mitrain.methods.export_format.contents import Contents, EncoderPart, Parameters, PreprocessPart, RunPart
from mitrain.methods.export_format.folder import (
    CONFIG,
    FORMAT,
    Published,
    check_target,
    count,
    is_published,
    method_fields,
    peft_files,
    publish,
    read,
    read_contents,
)
from mitrain.methods.export_format.hub import local
from mitrain.methods.export_format.paths import data_seen, settings_from, without_home
from mitrain.models.shapes import BaseShape, EncoderShape, base_shape, require_same
