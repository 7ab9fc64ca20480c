"""Any registered method on a tiny language model and a tiny image encoder in float64, and a batch for it."""

from typing import Any

import torch
from methods_world import section
from modalities import pictures
from tiny import VOCABULARY, text, tiny
from torch import Tensor
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model, PreTrainedModel

from mitrain import methods
from mitrain.core import config
from mitrain.methods.base import Adapter
from mitrain.models.batch import ModalityInputs, TextBatch
from mitrain.models.frozen import trunk_states

FEATURE = 5
"""Width of the encoders' global feature."""


def bert(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return BertModel(BertConfig(**shape, vocab_size=VOCABULARY, max_position_embeddings=64)).double().eval()


def dino() -> PreTrainedModel:
    torch.manual_seed(1)
    shape = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}
    return Dinov2Model(Dinov2Config(**shape, mlp_ratio=2)).double().eval()


def made(name: str, values: dict[str, Any] | None = None) -> Adapter:
    """The method ``name``, with ``values`` or the settings for tiny models, not attached."""
    settings = section(name) if values is None else {"name": name, **values}
    return methods.build(config.choose("adapter", settings), {"image": FEATURE})


def needed(adapter: Adapter, model: PreTrainedModel, image: PreTrainedModel) -> dict[str, PreTrainedModel]:
    return {"text": model, "encoder": image} if "encoder" in adapter.traits.backbones else {"text": model}


def attached(
    name: str,
    values: dict[str, Any] | None = None,
    model: PreTrainedModel | None = None,
    adapter: Adapter | None = None,
) -> tuple[Adapter, PreTrainedModel, PreTrainedModel]:
    """A method in eval mode on a Llama (or ``model``) and a DINOv2."""
    model, image = tiny("llama", torch.float64) if model is None else model, dino()
    adapter = adapter or made(name, values)
    adapter.attach(needed(adapter, model, image))
    return adapter.eval(), model, image


def pixels() -> Tensor:
    return torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(5)).double()


def inputs(
    adapter: Adapter, model: PreTrainedModel, image: PreTrainedModel, padding: str = "right", rows: slice = slice(None)
) -> tuple[TextBatch, ModalityInputs]:
    """Texts of 5, 7 and 9 tokens and pictures, each as the states that enter the method's first changed layers."""
    words = {name: tensor[rows] for name, tensor in text(padding=padding).items()}
    depth = adapter.attachment.first_layers["text"]
    with adapter.disabled():
        below = trunk_states(model, depth, **words) if depth or adapter.traits.runs_layers else None
        states, entering = None, 0
        if "encoder" in adapter.traits.backbones:
            entering = adapter.attachment.first_layers["encoder"]
            states = trunk_states(image, entering, pixel_values=pixels()[rows])
    feature = torch.randn(3, FEATURE, generator=torch.Generator().manual_seed(6)).double()[rows]
    return TextBatch(words["input_ids"], words["attention_mask"], below, depth), pictures(feature, states, entering)


def whole(model: PreTrainedModel, words: TextBatch) -> Tensor:
    """A frozen model's final states, run from the bottom."""
    return model.base_model(input_ids=words.ids, attention_mask=words.mask).last_hidden_state


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)  # float64: far above rounding, far below any effect
