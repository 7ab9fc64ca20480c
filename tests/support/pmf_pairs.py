"""PMF on pairs of tiny encoders of unequal width and depth, with what enters its first fusion layers."""

from dataclasses import dataclass, replace

import torch
from modalities import pictures
from tiny import scramble, text, tiny
from tiny_encoders import pixels, sound, tiny_encoder
from torch import Tensor
from transformers import PreTrainedModel

from mitrain.methods.pmf.pmf import PMF, PMFConfig
from mitrain.models.batch import ModalityInputs, TextBatch
from mitrain.models.frozen import trunk_states

PAIRS = {
    "bert+vit": ("bert", "vit"),
    "bert+dinov2": ("bert", "dinov2"),
    "llama+dinov2": ("llama", "dinov2"),
    "bert+whisper": ("bert", "whisper"),
}
IMAGE_WIDTH, IMAGE_DEPTH = 24, 3
NARROW = {"hidden_size": IMAGE_WIDTH, "num_hidden_layers": IMAGE_DEPTH, "intermediate_size": 40}
NARROW_SOUND = {"d_model": IMAGE_WIDTH, "encoder_layers": IMAGE_DEPTH, "encoder_ffn_dim": 40}
UNEVEN = {"query_prompts": 3, "query_context": 2, "fusion_context": 1, "map_width": 7}


@dataclass
class Pair:
    """An attached adapter, its backbones, and a batch whose rows 0 and 1 are padded on the right."""

    adapter: PMF
    backbones: dict[str, PreTrainedModel]
    inputs: dict[str, dict[str, Tensor]]
    words: TextBatch
    picture: ModalityInputs

    def encode(self, **changes):
        return self.adapter.encode(replace(self.words, **changes), self.picture)


def models(name: str, dtype: torch.dtype = torch.float64, **text_changes) -> dict[str, PreTrainedModel]:
    told, shown = PAIRS[name]
    words = tiny(told, dtype, **text_changes) if told == "llama" else tiny_encoder(told, dtype, **text_changes)
    return {"text": words, "encoder": tiny_encoder(shown, dtype, **(NARROW_SOUND if shown == "whisper" else NARROW))}


def pair(
    name: str = "bert+vit", backbones: dict[str, PreTrainedModel] | None = None, checkpoint: bool = False, **settings
) -> Pair:
    """A PMF with random parameters, far from their small start values, on a pair of frozen models in float64."""
    backbones = backbones or models(name)
    torch.manual_seed(8)
    adapter = PMF(PMFConfig(**settings))
    adapter.attach(backbones, checkpoint=checkpoint)
    scramble(adapter)
    dtype = backbones["encoder"].dtype
    inputs = {"text": text(padding="right"), "encoder": (sound if "whisper" in name else pixels)(dtype=dtype)}
    first = {place: adapter.attachment.first_layers[place] for place in backbones}
    states = {place: trunk_states(backbones[place], first[place], **inputs[place]) for place in backbones}
    ids, mask = inputs["text"].values()
    words = TextBatch(ids, mask, states["text"], first["text"])
    picture = pictures(torch.zeros(len(ids), 1), states["encoder"], first["encoder"])
    return Pair(adapter, backbones, inputs, words, picture)
