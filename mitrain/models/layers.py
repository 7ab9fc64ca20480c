"""Single layers of frozen Hugging Face transformers, run on any number of tokens: for methods that run layer by layer.

The layers' own modules run, with the mask that the model would make for as many tokens, so what forward hooks do
(gathering sharded weights, recording) happens as in the model's own forward pass.

Shapes: B batch, T tokens (whatever is in the sequence: text, patches, frames, prompts), D hidden width, M prompts.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)

from mitrain.core.errors import ModelError
from mitrain.models.batch import ModalityInputs, mean_over
from mitrain.models.layouts import CACHES, CLASS_TOKENS, ENCODERS, LAYOUTS, LLAMA, NORMS, ROTARY, layer_lists

SERVED = f"the layers of {{}} cannot be run one by one: use one of {', '.join(ENCODERS)} or a decoder of the Llama kind"
GIVEN = ("attention_mask", "position_ids", "position_embeddings")
LEFT_OUT = (*CACHES, "layer_past", "use_cache", "encoder_hidden_states", "encoder_attention_mask")
MASKS = {
    (True, "full_attention"): create_causal_mask,
    (True, "sliding_attention"): create_sliding_window_causal_mask,
    (False, "full_attention"): create_bidirectional_mask,
    (False, "sliding_attention"): create_bidirectional_sliding_window_mask,
}


@dataclass(frozen=True)
class Prompted:
    """Tokens with prompts beside them: ``states`` (B, M + T, D), where ``visible`` (B, M + T) or None says which are
    seen. ``positions`` (B, M + T): those of `beside`, None where they are 0, 1, …; ``counts``: tokens that lead, prompts
    after them, the other tokens."""

    states: Tensor
    visible: Tensor | None
    positions: Tensor | None
    counts: tuple[int, int, int]

    def parted(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer (or model) made of ``states``: the tokens (B, T, D) and the prompts (B, M, D) in their order."""
        leading, before, others, after = hidden.tensor_split(list(accumulate(self.counts)), dim=1)
        pairs = (leading, others), (before, after)
        tokens, prompts = (b if not a.shape[1] else a if not b.shape[1] else torch.cat([a, b], 1) for a, b in pairs)
        return tokens, prompts


def beside(
    tokens: Tensor,
    visible: Tensor | None,
    before: Sequence[Tensor] = (),
    after: Sequence[Tensor] = (),
    lead: int = 0,
    unseen: Tensor | None = None,
) -> Prompted:
    """[tokens[:lead] ; before ; tokens[lead:] ; after], the prompts visible, in the tokens' type.

    tokens: (B, T, D), of which ``visible`` (B, T) are seen, right-padded, or all. before, after: prompts (M, D) or
    (B, M, D). Those after the tokens get the positions that follow the sample's last visible token, so that the amount
    of padding, which other samples of the batch decide, does not matter. unseen: (B, M) or (B, 1) bool, the prompts of
    ``before`` and ``after`` that no token of the sample sees.
    """
    batch, count = tokens.shape[:2]
    ahead, behind = ([p.to(tokens.dtype).expand(batch, -1, -1) for p in group] for group in (before, after))
    first, last = (sum(prompt.shape[1] for prompt in group) for group in (ahead, behind))
    positions = None
    if visible is None and unseen is not None:
        visible = torch.ones(batch, count, dtype=torch.bool, device=tokens.device)
    if visible is not None and last:
        positions = torch.arange(first + count + last, device=tokens.device).expand(batch, -1)
        positions = positions - (count - visible.sum(1, keepdim=True)) * (positions >= first + count)
    if visible is not None:
        seen = visible.new_ones(1, 1) if unseen is None else (~unseen).to(visible.dtype)
        ahead_seen, behind_seen = seen.expand(batch, first + last).split([first, last], 1)
        visible = torch.cat([visible[:, :lead], ahead_seen, visible[:, lead:], behind_seen], 1)
    if unseen is not None:  # what is not there takes no place either
        positions = (visible.long().cumsum(1) - 1).clamp_min(0)
    states = torch.cat([tokens[:, :lead], *ahead, tokens[:, lead:], *behind], dim=1)
    return Prompted(states, visible, positions, (lead, first, count - lead))


@dataclass(frozen=True)
class Layers:
    """The layers of a frozen model. It holds the model but is no module, so whoever keeps one registers nothing.

    ``depth``: number of layers. ``width``: D. ``causal``: a token sees only those before it. ``window``: the fewest
    tokens that a layer's attention reaches back, None where every layer sees all.
    """

    model: PreTrainedModel
    owner: nn.Module
    name: str
    causal: bool
    rotary: nn.Module | None
    norms: tuple[nn.Module, ...]
    class_norm: nn.Module | None
    class_tokens: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Layers":
        """The layers of ``model``: an encoder of ENCODERS or a decoder of the Llama kind; else ModelError."""
        name = type(model).__name__
        if not isinstance(model, PreTrainedModel):
            raise ModelError(f"cannot run the layers of {name}: give a Hugging Face model (PreTrainedModel)")
        base = model.base_model
        if base.config.sub_configs:
            raise ModelError(f"{name} joins several models: give one of them, such as its text_model or vision_model")
        stacks = [stack for stack in layer_lists(base) if stack[1] != "conv_layers"]
        if not stacks:
            raise ModelError(f"{name} has no stack of equal transformer layers: give a transformer, such as BERT or ViT")
        if len(stacks) > 1 or any(path.split(".")[-1] == "decoder" for path, _ in base.named_modules()):
            if not base.config.is_encoder_decoder:
                raise ModelError(SERVED.format(name))
            raise ModelError(f"{name} is an encoder-decoder, whose layers need one another: give its encoder")
        owner, attribute = stacks[0]
        layers, path = getattr(owner, attribute), path_to(base, owner)
        rotary = next((getattr(module, ROTARY) for module in path if hasattr(module, ROTARY)), None)
        causal = is_causal(layers[0])
        check_family(base, name, causal, rotary)
        check_layers(layers, name)
        norms = [getattr(module, n) for module in reversed(path) for n in NORMS if hasattr(module, n)]
        layout = LAYOUTS.get(base.config.model_type, LLAMA)
        class_norm = norms.pop() if layout.class_norm else None
        if not getattr(base.config, "do_stable_layer_norm", True):
            norms = []  # wav2vec 2.0's stands before the layers then
        has_class = any(n.split(".")[-1] in CLASS_TOKENS for n, _ in base.named_parameters())
        class_tokens = layout.class_tokens if has_class else 0
        return cls(base, owner, attribute, causal, rotary, tuple(norms), class_norm, class_tokens)

    @property
    def modules(self) -> nn.ModuleList:
        """Read anew each time: a trunk or a checkpointed layer may have taken a place meanwhile."""
        return getattr(self.owner, self.name)

    @property
    def depth(self) -> int:
        return len(self.modules)

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @property
    def window(self) -> int | None:
        sliding = any(self._pattern(index) == "sliding_attention" for index in range(self.depth))
        return self.model.config.sliding_window if sliding else None

    def run(self, index: int, hidden: Tensor, visible: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Layer ``index`` on ``hidden`` (B, T, D): (B, T, D).

        visible: (B, T) bool, False for padding, which no token sees; None: all are seen. positions: (B, T) int64 for
        rotary embeddings, 0, 1, … where None; a model without them ignores it.
        """
        layer, pattern = self.modules[index], self._pattern(index)
        # By position: the fourth is the KV cache, or in models of both directions another model's states; none is given.
        mask = MASKS[self.causal, pattern](self.model.config, hidden, visible, None)
        given: dict[str, Any] = {"attention_mask": mask}
        if self.rotary is not None:
            if positions is None:
                positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
            typed = "layer_type" in inspect.signature(self.rotary.forward).parameters
            given["position_embeddings"] = self.rotary(hidden, positions, *([pattern] if typed else []))
        out = layer(hidden, **given)
        return out[0] if isinstance(out, tuple) else out

    def run_beside(
        self,
        index: int,
        tokens: Tensor,
        visible: Tensor | None,
        before: Sequence[Tensor] = (),
        after: Sequence[Tensor] = (),
        lead: int = 0,
        unseen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Layer ``index`` on what `beside` makes: the tokens (B, T, D) and the prompts (B, M, D) that leave it."""
        prompted = beside(tokens, visible, before, after, lead, unseen)
        return prompted.parted(self.run(index, prompted.states, prompted.visible, prompted.positions))

    def finish(self, hidden: Tensor) -> Tensor:
        """What the model makes of its last layer's output (B, T, D): its final norm, or nothing where it has none."""
        for norm in self.norms:
            hidden = norm(hidden)
        return hidden

    def summary(self, hidden: Tensor, shown: Tensor | None = None) -> Tensor:
        """(B, D) from the last layer's output (B, T, D): the class token after the final norm, the mean of AST's two.

        Without a class token (Whisper, wav2vec 2.0, SigLIP) the mean over the tokens, of those that are ``shown`` (B, T) or
        all; prompts must be gone by then.
        """
        if self.class_norm is not None:
            return self.class_norm(hidden[:, 0])
        finished = self.finish(hidden)
        if self.class_tokens:
            return finished[:, 0] if self.class_tokens == 1 else finished[:, : self.class_tokens].mean(1)
        return finished.mean(1) if shown is None else mean_over(finished, shown)

    def encode_tokens(self, inputs: ModalityInputs) -> tuple[Tensor, Tensor]:
        """The encoder's final tokens (B, N, D) and its `summary` (B, D), from the layer that the states enter."""
        hidden = given_states(inputs).to(self.model.device, self.model.dtype)
        for index in range(inputs.depth, self.depth):
            hidden = self.run(index, hidden, inputs.visible)
        return self.finish(hidden), self.summary(hidden, inputs.shown)

    def _pattern(self, index: int) -> str:
        config = self.model.config
        types = getattr(config, "layer_types", None)
        if types:
            return types[index]
        return "sliding_attention" if getattr(config, "sliding_window", None) is not None else "full_attention"


@dataclass(frozen=True)
class FeatureMap:
    """The places of a convolutional encoder's last feature map (B, c, h, w), read as its final tokens (B, h·w, c).

    ``depth`` 0: there are no layers to run. ``width``: c. It holds the model but is no module.
    """

    model: PreTrainedModel
    depth = 0

    @property
    def width(self) -> int:
        return map_width(self.model.config)

    def encode_tokens(self, inputs: ModalityInputs) -> tuple[Tensor, Tensor]:
        """The tokens (B, N, c) and their mean (B, c)."""
        tokens = given_states(inputs).to(self.model.device, self.model.dtype)
        return tokens, tokens.mean(1)


def map_width(config: Any) -> int:
    """c of a convolutional encoder's last feature map; 0 of another model's."""
    stages = getattr(config, "hidden_sizes", None)
    return 0 if not stages or hasattr(config, "num_hidden_layers") else getattr(config, "hidden_size", stages[-1])


def readable(model: PreTrainedModel) -> Layers | FeatureMap:
    """What a method reads the final tokens of ``model`` with; ModelError where it has none."""
    return FeatureMap(model) if map_width(model.config) else Layers.of(model)


def given_states(inputs: ModalityInputs) -> Tensor:
    if inputs.states is None:
        raise ModelError("this method reads the encoder's tokens: give the states that enter its first layer")
    return inputs.states


def path_to(base: nn.Module, owner: nn.Module) -> list[nn.Module]:
    """The modules from ``base`` down to ``owner``, both included."""
    parts = next(name for name, module in base.named_modules() if module is owner).split(".")
    path = [base]
    for part in parts if parts != [""] else []:
        path.append(getattr(path[-1], part))
    return path


def is_causal(layer: nn.Module) -> bool:
    return next((bool(module.is_causal) for module in layer.modules() if hasattr(module, "is_causal")), False)


def check_family(base: PreTrainedModel, name: str, causal: bool, rotary: nn.Module | None) -> None:
    """ModelError unless every layer's mask and positions are ones that `Layers.run` makes."""
    types = set(getattr(base.config, "layer_types", None) or ["full_attention"])
    if strange := sorted(types - {"full_attention", "sliding_attention"}):
        raise ModelError(f"{name} has layers of the kind {strange[0]}: only full and sliding attention are supported")
    if causal and rotary is None:
        raise ModelError(f"{name} is causal without rotary embeddings: use a decoder of the Llama kind")
    if (not causal and base.config.model_type not in ENCODERS) or getattr(base.config, "add_adapter", False):
        raise ModelError(SERVED.format(name))


def check_layers(layers: nn.ModuleList, name: str) -> None:
    """ModelError for layers that take more than hidden states, mask and positions, or that read another model."""
    for layer in layers:
        parameters = list(inspect.signature(layer.forward).parameters.values())[1:]
        known = {*GIVEN, *LEFT_OUT}
        named = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
        if strange := [n for n in named if n not in known]:
            raise ModelError(f"the layers of {name} take {strange[0]}, which mitrain does not know: not supported")
        if getattr(layer, "add_cross_attention", False) or hasattr(layer, "encoder_attn"):
            raise ModelError(f"the layers of {name} read another model's states: give a model without cross-attention")
