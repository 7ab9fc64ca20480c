"""Running an encoder layer by layer with fresh prompts in each: the protocol, and a plain transformer.

Shapes: B samples, T tokens, D width, n prompt tokens of a layer (0 where it gets none).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mitrain.core.errors import ModelError
from mitrain.models.batch import mean_over
from mitrain.models.layers import Layers

Prompter = Callable[[int, Tensor, Tensor | None], Tensor]
"""(index among the prompted layers, tokens (B, T, D) that enter it, mask (B, T) or None) -> prompts (B, n, D)."""


@dataclass(frozen=True)
class Encoded:
    """What leaves the last layer, before the final norm: its tokens (B, T, D) and the outputs of its prompts (B, n, D), of
    which those of ``unseen`` (B, n) have no weight."""

    tokens: Tensor
    prompts: Tensor
    unseen: Tensor | None = None


class PromptedEncoder(Protocol):
    """A frozen encoder, run with prompts.

    ``depth``: of its stack, as the trunk counts. ``widths``: of each prompted layer, ``stages``: the stage of each, with
    ``stage_widths``. ``entry``: the width of the prompt that the first layer gets where it is not a prompted one, or 0.
    """

    model: PreTrainedModel
    depth: int
    widths: tuple[int, ...]
    stages: tuple[int, ...]
    stage_widths: tuple[int, ...]
    entry: int
    causal: bool

    def run(
        self,
        states: Tensor,
        mask: Tensor | None,
        prompter: Prompter,
        entry: Tensor | None,
        checkpointing: bool,
        unseen: Tensor | None = None,
    ) -> Encoded:
        """All layers on ``states`` (B, T, D), which enter the first; ``entry`` (B, n, D): its prompts, see above.
        ``unseen`` (B, n): which prompts of a layer no token of the sample sees."""

    def finish(self, states: Tensor) -> Tensor:
        """The final norm."""

    def first(self, states: Tensor) -> Tensor:
        """(B, D) the first token after the final norm, from what leaves the last layer; ModelError if it is no CLS."""

    @property
    def has_first(self) -> bool:
        """Whether the first token stands for the whole."""


class PlainEncoder:
    """Layers of one width in a row, such as BERT, ViT, DINOv2 or a Llama-like language model: one stage.

    x̂ = [cls ; prompts ; tokens] where a CLS token leads. A causal model takes its prompts in front, where every token
    sees them; tokens then stand n positions later. Rotary attention knows distances alone, so tokens see one another as
    without prompts, and prompts have positions that the model knows from training: none negative, none taken twice.
    Encoders with rotary attention do the same. Elsewhere positions were added before the first layer and order is free.
    """

    entry: ClassVar[int] = 0

    def __init__(self, model: PreTrainedModel, is_text: bool):
        self.model, self.layers = model, Layers.of(model)
        self.depth, self.causal = self.layers.depth, self.layers.causal
        self.widths, self.stages = (self.layers.width,) * self.depth, (0,) * self.depth
        self.stage_widths = (self.layers.width,)
        self.is_text = is_text
        self.lead = 1 if self.has_first and self.layers.rotary is None else 0

    @property
    def has_first(self) -> bool:
        return not self.causal and (self.is_text or self.layers.class_tokens > 0)

    def run(
        self,
        states: Tensor,
        mask: Tensor | None,
        prompter: Prompter,
        entry: Tensor | None,
        checkpointing: bool,
        unseen: Tensor | None = None,
    ) -> Encoded:
        prompts, visible = states[:, :0], None if mask is None else mask.bool()
        for index in range(self.depth):
            before = [prompter(index, states, visible)]
            run = self.layers.run_beside
            states, prompts = call(checkpointing, run, index, states, visible, before, (), self.lead, unseen)
        return Encoded(states, prompts, unseen)

    def finish(self, states: Tensor) -> Tensor:
        return self.layers.finish(states)

    def first(self, states: Tensor) -> Tensor:
        if not self.has_first:
            raise ModelError(f"{type(self.model).__name__} has no CLS token: leave the read-out 'first' to others")
        return self.finish(states)[:, 0] if self.is_text else self.layers.summary(states)


def call(checkpointing: bool, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``; with ``checkpointing`` only ``args`` are kept for backward."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)


def pooled(encoder: PromptedEncoder, encoded: Encoded, mask: Tensor | None, how: str) -> Tensor:
    """(B, D) of what leaves ``encoder``'s last layer after the final norm.

    how: the ``mean`` over tokens, over tokens and prompts (``all``), the ``first`` or the ``last`` token.
    """
    if how == "first":
        return encoder.first(encoded.tokens)
    states = encoded.tokens
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    if how == "all":
        states = torch.cat([encoded.prompts, states], dim=1)
        seen = mask.new_ones(encoded.prompts.shape[:2])
        mask = torch.cat([seen if encoded.unseen is None else seen & ~encoded.unseen, mask.to(seen.dtype)], dim=1)
    states = encoder.finish(states)
    if how == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    return mean_over(states, mask)
