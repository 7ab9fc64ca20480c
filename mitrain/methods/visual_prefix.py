"""Visual tokens before the text: what MiT avoids, in the form of LLaVA (arXiv 2304.08485).

A projector of two layers maps the image encoder's patch tokens, or the places of a feature map, to the language model's
width; the text follows them. With a rank, LoRA tunes the language model too.

Shapes: B samples, T text tokens, N patches, P visual tokens, c width of the image encoder, D width of the text model.
"""

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from mitrain.core.config import Section
from mitrain.core.errors import ConfigError, ModelError
from mitrain.methods.base import Attachment, Traits
from mitrain.methods.conditioned import ConditionedAdapter
from mitrain.methods.peft import LoRA, LoRAConfig, check_positions
from mitrain.models.batch import ModalityInputs
from mitrain.models.layers import FeatureMap, Layers, beside, readable


class VisualPrefixConfig(Section, kind="adapter", name="visual-prefix"):
    """Settings of the visual prefix."""

    tokens: int | None = Field(16, ge=1, le=1 << 16)
    lora_rank: int = Field(0, ge=0, le=65536)

    @field_validator("tokens")
    @classmethod
    def _check_square(cls, tokens: int | None) -> int | None:
        if tokens is not None and math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(f"{tokens} is no square number: give 1, 4, 9, 16, … or null")
        return tokens


class VisualPrefix(ConditionedAdapter):
    """[projector(patches) ; text embeddings] through the whole language model; the text's final states are read.

    projector(x) = W_2 GELU(W_1 x + b_1) + b_2 with inner width D, on the image encoder's final, normalised patch tokens.
    """

    traits = Traits(
        "visual-prefix", ("text", "encoder"), text_depends_on_input=True, conditions_text=True, reads_tokens=True
    )

    def __init__(self, config: VisualPrefixConfig):
        super().__init__()
        self.config = config
        self.projector: nn.Sequential | None = None
        self.lora = LoRA(LoRAConfig(rank=config.lora_rank, alpha=2 * config.lora_rank)) if config.lora_rank else None
        self._picture: Layers | FeatureMap | None = None
        self._places = True

    def _install(self, backbones: Mapping[str, PreTrainedModel]) -> Attachment:
        if backbones["encoder"].main_input_name != "pixel_values":
            raise ConfigError(
                "visual-prefix averages patches over squares of a picture, which"
                f" {type(backbones['encoder']).__name__} does not read: put an image encoder first in model.encoders"
            )
        self._picture, text = readable(backbones["encoder"]), backbones["text"].base_model
        widths = self._picture.width, text.config.get_text_config().hidden_size
        if self.projector is None:
            factory = {"device": text.device, "dtype": torch.promote_types(text.dtype, torch.float32)}
            layers = nn.Linear(widths[0], widths[1], **factory), nn.GELU(), nn.Linear(widths[1], widths[1], **factory)
            self.projector = nn.Sequential(*layers)
        elif (self.projector[0].in_features, self.projector[2].out_features) != widths:
            raise ModelError("this visual prefix was made for models of other widths: make a new one")
        self._places = "position_ids" in inspect.signature(text.forward).parameters
        self._undo.callback(text.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
        self._undo.callback(text.register_forward_hook(self._leave, with_kwargs=True).remove)
        if self.lora is not None:
            self.lora._backbones = {"text": backbones["text"]}
            self.lora._install(self.lora._backbones)
            self._undo.callback(self.lora.detach)
        return Attachment({"text": 0, "encoder": self._picture.depth})

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        with super().disabled(), contextlib.nullcontext() if self.lora is None else self.lora.disabled():
            yield

    def _perceive(self, inputs: ModalityInputs) -> tuple[Tensor, Tensor | None]:
        """The visual tokens (B, P, D), and (B, 1) which samples lack the picture, so that nothing sees theirs."""
        with torch.no_grad():
            tokens, _ = self._picture.encode_tokens(inputs)
        visual = self.projector(self._averaged(tokens).to(self.projector[0].weight.dtype))
        return visual, None if inputs.lacking is None else inputs.lacking[:, None]

    def _enter(self, text: nn.Module, args: tuple, given: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """A pass of text (B, T) becomes one of visual tokens and text; one that goes on from a KV cache, in which the visual
        tokens stand already, is told of them by its mask and positions."""
        if self._seen is None:
            return None
        visual, unseen = self._seen
        given = given | dict(zip(("input_ids", "attention_mask"), args, strict=False))
        ids, cache = given["input_ids"], given.get("past_key_values")
        held, asked = 0 if cache is None else cache.get_seq_length(), ids.shape[1]
        mask = given.get("attention_mask")
        mask = ids.new_ones(len(ids), max(held - visual.shape[1], 0) + asked) if mask is None else mask
        if held:
            shown = mask.new_ones(1, 1) if unseen is None else (~unseen).to(mask)
            visible = torch.cat([shown.expand(visual.shape[:2]), mask], 1)
        else:
            check_positions(text, visual.shape[1], asked)
            embeddings = text.get_input_embeddings()(ids)
            prompted = beside(embeddings, mask, before=[visual.to(embeddings)], unseen=unseen)  # the embeddings' device, too
            visible, asked = prompted.visible, prompted.states.shape[1]
            given |= {"input_ids": None, "inputs_embeds": prompted.states}
        # Positions count what is seen where padding may be on the left, in generation, or some see no visual token.
        if self._places and (cache is not None or unseen is not None or given.get("position_ids") is not None):
            given["position_ids"] = (visible.long().cumsum(1) - 1).clamp_min(0)[:, -asked:]
        return (), given | {"attention_mask": visible}

    def _leave(self, text: nn.Module, args: tuple, given: dict[str, Any], output: Any) -> None:
        """Take the visual tokens' states off where this pass has put them in."""
        if self._seen is not None and given["input_ids"] is None:
            output.last_hidden_state = output.last_hidden_state[:, self._seen[0].shape[1] :]

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
