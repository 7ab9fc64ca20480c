"""Pairs of tiny frozen encoders with MoPE attached, and what a pass over them needs."""

from dataclasses import dataclass, replace

import torch
from modalities import pictures
from tiny import scramble, text, tiny
from tiny_encoders import pixels, tiny_encoder
from torch import Tensor
from transformers import PreTrainedModel, SwinConfig, SwinModel

from mitrain.methods.mope.config import MoPEConfig
from mitrain.methods.mope.mope import MoPE
from mitrain.models.batch import ModalityInputs, Outputs, TextBatch
from mitrain.models.frozen import trunk_states

SMALL = {"length": 2, "experts": 3, "other_length": 2}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (2, 2, 2), "num_heads": (2, 2, 4)}


def tiny_swin(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object) -> SwinModel:
    """16, 4 and 1 windows of 4 x 4 in its stages, the first two shifted in their second block; no weight is zero."""
    torch.manual_seed(seed)
    model = SwinModel(SwinConfig(**{**SWIN, "window_size": 4, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


def model_of(name: str, dtype: torch.dtype, **changes: object) -> PreTrainedModel:
    if name == "swin":
        return tiny_swin(dtype, **changes)
    if name == "llama":
        return tiny("llama", dtype, **changes)
    return tiny_encoder(name, dtype, **changes)


@dataclass
class Pair:
    """An attached adapter with its two frozen models and a batch of ``rows`` texts and pictures."""

    mope: MoPE
    models: dict[str, PreTrainedModel]
    words: TextBatch
    picture: ModalityInputs

    def encode(self, **changes: object) -> Outputs:
        return self.mope.encode(self.words, replace(self.picture, **changes))

    def joint(self, **changes: object) -> Tensor:
        return self.encode(**changes).joint

    def rows(self, index: Tensor | slice) -> "Pair":
        """The same adapter on some of the samples."""
        words = TextBatch(self.words.ids[index], self.words.mask[index], self.words.states[index], self.words.depth)
        return replace(self, words=words, picture=self.picture.rows(index))


def states_of(mope: MoPE, models: dict[str, PreTrainedModel], batch: dict[str, Tensor], image: Tensor) -> tuple:
    """What a pass is given: words and a picture with the states that enter the first changed layers."""
    depth = {name: mope.attachment.first_layers[name] for name in models}
    words = TextBatch(batch["input_ids"], batch["attention_mask"], trunk_states(models["text"], depth["text"], **batch))
    states = trunk_states(models["encoder"], depth["encoder"], pixel_values=image)
    picture = pictures(torch.zeros(len(image), 5), states, depth["encoder"])
    return replace(words, depth=depth["text"]), picture


def attached(
    text_name: str = "bert", image_name: str = "vit", rows: int = 4, checkpoint: bool = False, **settings: object
) -> Pair:
    """In float64 and eval mode, with all parameters moved from their start."""
    torch.manual_seed(0)
    models = {"text": model_of(text_name, torch.float64), "encoder": model_of(image_name, torch.float64)}
    mope = MoPE(MoPEConfig(**{**SMALL, **settings}))
    mope.attach(models, checkpoint=checkpoint)
    mope.eval()
    scramble(mope)
    side = 32 if image_name == "swin" else None
    image = pixels(rows, dtype=torch.float64)["pixel_values"]
    image = torch.nn.functional.interpolate(image, (side, side)) if side else image
    return Pair(mope, models, *states_of(mope, models, text(rows, padding="right"), image))
