"""Visual tokens before the text: what MiT avoids, in the form of LLaVA (arXiv 2304.08485).

A projector of two layers maps the image encoder's patch tokens to the language model's width; the text follows them. With
a rank, LoRA tunes the language model too.

Shapes: B samples, T text tokens, N patches, P visual tokens, c width of the image encoder, D width of the text model.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from mitrain.core.config import Section
from mitrain.core.errors import ConfigError, ModelError
from mitrain.methods.base import Adapter, Attachment, Traits
from mitrain.methods.peft import LoRA, LoRAConfig, check_positions
from mitrain.models import frozen
from mitrain.models.batch import ModalityInputs, Outputs, TextBatch
from mitrain.models.layers import Layers, beside


class VisualPrefixConfig(Section, kind="adapter", name="visual-prefix"):
    """``tokens``: how many visual tokens the patches are averaged to, a square number; none: each patch is one.

    ``lora_rank``: of LoRA on the language model's queries and values; 0: the projector alone is trained.
    """

    tokens: int | None = Field(16, ge=1, le=1 << 16)
    lora_rank: int = Field(0, ge=0, le=65536)

    @field_validator("tokens")
    @classmethod
    def _check_square(cls, tokens: int | None) -> int | None:
        if tokens is not None and math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(f"{tokens} is no square number: give 1, 4, 9, 16, … or null")
        return tokens


class VisualPrefix(Adapter):
    """[projector(patches) ; text embeddings] through the whole language model; the text's final states are read.

    projector(x) = W_2 GELU(W_1 x + b_1) + b_2 with inner width D, on the image encoder's final, normalised patch tokens.
    """

    traits = Traits("visual-prefix", backbones=("text", "encoder"), text_depends_on_input=True)

    def __init__(self, config: VisualPrefixConfig):
        super().__init__()
        self.config = config
        self.projector: nn.Sequential | None = None
        self.lora = LoRA(LoRAConfig(rank=config.lora_rank, alpha=2 * config.lora_rank)) if config.lora_rank else None
        self._text: Layers | None = None

    def _install(self, backbones: Mapping[str, PreTrainedModel]) -> Attachment:
        if backbones["encoder"].main_input_name != "pixel_values":
            raise ConfigError(
                "visual-prefix averages patches over squares of a picture, which"
                f" {type(backbones['encoder']).__name__} does not read: put an image encoder first in model.encoders"
            )
        self._encoder, self._text = Layers.of(backbones["encoder"]), Layers.of(backbones["text"])
        widths, text = (self._encoder.width, self._text.width), self._text.model
        if self.projector is None:
            factory = {"device": text.device, "dtype": torch.promote_types(text.dtype, torch.float32)}
            layers = nn.Linear(widths[0], widths[1], **factory), nn.GELU(), nn.Linear(widths[1], widths[1], **factory)
            self.projector = nn.Sequential(*layers)
        elif (self.projector[0].in_features, self.projector[2].out_features) != widths:
            raise ModelError("this visual prefix was made for models of other widths: make a new one")
        if self.lora is not None:
            self.lora._backbones = {"text": backbones["text"]}
            self.lora._install(self.lora._backbones)
            self._undo.callback(self.lora.detach)
        return Attachment({"text": 0, "encoder": self._encoder.depth})

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        with contextlib.nullcontext() if self.lora is None else self.lora.disabled():
            yield

    def encode(self, texts: TextBatch | None, inputs: ModalityInputs | None) -> Outputs:
        vectors = {} if inputs is None else inputs.features
        if texts is None:
            return Outputs(vectors=vectors)
        if inputs is None or not inputs.infused:
            return Outputs(frozen.last_hidden(self._text.model, texts), texts.mask, vectors)
        embeddings = self._text.model.get_input_embeddings()(texts.ids)
        visual = self.visual_tokens(inputs).to(embeddings)  # the embeddings' device, too
        check_positions(self._text.model, visual.shape[1], texts.ids.shape[1])
        prompted = beside(
            embeddings,
            texts.mask,
            before=[visual],
            unseen=inputs.lacking if inputs.lacking is None else inputs.lacking[:, None],
        )
        given = {"inputs_embeds": prompted.states, "attention_mask": prompted.visible, "use_cache": False}
        if prompted.positions is not None:
            given["position_ids"] = prompted.positions
        text, _ = prompted.parted(self._text.model(**given).last_hidden_state)
        return Outputs(text, texts.mask, vectors)

    def visual_tokens(self, inputs: ModalityInputs) -> Tensor:
        """(B, P, D)."""
        with torch.no_grad():
            tokens, _ = self._encoder.encode_tokens(inputs)
        return self.projector(self._averaged(tokens).to(self.projector[0].weight.dtype))

    def _averaged(self, tokens: Tensor) -> Tensor:
        """(B, P, c): the patches of (B, prefix + N, c), averaged over squares of the grid."""
        side = int((tokens.shape[1]) ** 0.5)
        patches = tokens[:, -side * side :]
        if self.config.tokens is None:
            return patches
        wanted = math.isqrt(self.config.tokens)
        if wanted > side:
            raise ConfigError(
                f"adapter.tokens={self.config.tokens}: the picture has {side**2} patches: give at most as many, or null"
            )
        grid = patches.transpose(1, 2).unflatten(2, (side, side))
        return F.adaptive_avg_pool2d(grid, wanted).flatten(2).transpose(1, 2)
