"""PMF, prompt-based multimodal fusion (CVPR 2023, arXiv 2304.06306): the last layers of two frozen encoders take turns,
each asking the other what it saw through a few trained query tokens. docs/methods/pmf.md has the equations.

Shapes: B samples, T text tokens, N tokens of the other encoder, D_t and D_v the two widths, M_q, M_c and M_p
numbers of prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mitrain.core.config import Section
from mitrain.core.errors import ConfigError, ModelError
from mitrain.methods.base import Adapter, Attachment, Traits
from mitrain.models import frozen
from mitrain.models.batch import ModalityInputs, Outputs, TextBatch
from mitrain.models.layers import Layers

LINKS = {"text_to_image": ("text", "encoder"), "image_to_text": ("encoder", "text")}
"""Link -> (source, target): the target's tokens get prompts that sum up the source's. The links are named as saved tensors
are, whatever the encoder reads."""


class PMFConfig(Section, kind="adapter", name="pmf"):
    """Settings of PMF; the defaults are the release's. ``fusion_layers`` is L_f; ``query_prompts``, ``query_context`` and
    ``fusion_context`` are M_q, M_c, M_p.

    Without query prompts nothing is asked: there is no map and no query context either, only the fusion context of each
    encoder by itself. An encoder that is told nothing (``direction``) stays as it is, without prompts of its own.
    """

    fusion_layers: int = Field(2, ge=1)
    query_prompts: int = Field(4, ge=0, le=1024)
    query_context: int = Field(4, ge=0, le=1024)
    fusion_context: int = Field(4, ge=0, le=1024)
    map: Literal["nonlinear", "linear"] = "nonlinear"
    map_width: int | None = Field(None, ge=1, le=65536)
    direction: Literal["both", "text-to-encoder", "encoder-to-text"] = "both"

    @model_validator(mode="after")
    def _check_width(self) -> "PMFConfig":
        if self.map == "linear" and self.map_width is not None:
            raise ValueError("map_width is the inner width of the nonlinear map: leave it out with map=linear")
        if not self.query_prompts and not self.fusion_context:
            raise ValueError("nothing is trained: give query_prompts, fusion_context or both")
        return self

    @property
    def links(self) -> list[str]:
        return [name for name, sides in LINKS.items() if self.direction in ("both", "-to-".join(sides))]

    def inner_width(self, widths: Mapping[str, int]) -> int:
        """m of the nonlinear map."""
        return self.map_width or max(widths.values()) // 2


SPREAD = 0.02
"""Standard deviation of new prompts; the maps start as torch makes linear layers. Both as in the authors' release."""


@dataclass(frozen=True)
class Side:
    """One frozen encoder: its layers, and the first of them that takes part in the fusion."""

    layers: Layers
    first: int

    def run(
        self,
        index: int,
        states: Tensor,
        visible: Tensor | None,
        before: list[Tensor],
        after: list[Tensor],
        unseen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`Layers.run_beside`, where every token sees every prompt; ModelError where the window is too short for that."""
        window, tokens = self.layers.window, states.shape[1] + sum(p.shape[-2] for p in (*before, *after))
        if window is not None and tokens > window:
            raise ModelError(
                f"{tokens} tokens with their prompts exceed the window of {window} over which"
                f" {type(self.layers.model).__name__} attends: shorten the texts or use a model without a window"
            )
        return self.layers.run_beside(index, states, visible, before, after, unseen=unseen)


class Link(nn.Module):
    """What one fusion layer trains in one direction: the prompts that ask the source, the map, the target's prompts.

    ``query`` q (M_q, D_source) and ``context`` c (M_c, D_source) stand beside the source's tokens in the query pass,
    ``fusion`` p (M_p, D_target) beside the target's in the fusion pass; ``map`` is g.
    """

    def __init__(self, config: PMFConfig, widths: Mapping[str, int], name: str, **factory: Any):
        super().__init__()
        source, target = (widths[side] for side in LINKS[name])
        counts = {"query": config.query_prompts, "context": config.query_context if config.query_prompts else 0}
        for kind, count in counts.items():
            self.register_parameter(kind, prompts(count, source, **factory))
        self.register_parameter("fusion", prompts(config.fusion_context, target, **factory))
        if self.query is None:
            self.map = None
        elif config.map == "linear":
            self.map = nn.Linear(source, target, **factory)
        else:
            inner = config.inner_width(widths)
            layers = nn.Linear(source, inner, **factory), nn.ReLU(), nn.Linear(inner, target, **factory)
            self.map = nn.Sequential(*layers)

    def ask(self, side: Side, index: int, states: Tensor, visible: Tensor | None) -> Tensor | None:
        """y (B, M_q, D_target): what the source's layer ``index`` writes into the query prompts, mapped to the target."""
        if self.query is None or self.map is None:
            return None
        context = [] if self.context is None else [self.context]
        # Under a causal mask the last rows alone see the whole text, and see a context only where it stands before them.
        before, after = (context, [self.query]) if side.layers.causal else ([], [*context, self.query])
        prompts = side.run(index, states, visible, before, after)[1]
        return self.map(prompts[:, -len(self.query) :].to(self.query.dtype))

    def tell(
        self, side: Side, index: int, states: Tensor, visible: Tensor | None, answer: Tensor | None, unseen: Tensor | None
    ) -> Tensor:
        """The target's tokens (B, T, D) after its layer ``index``, which saw ``answer``; the prompts' rows are dropped.

        unseen: (B, 1), the samples that lack a file, whose tokens see no prompt.
        """
        prompts = [prompt for prompt in (self.fusion, answer) if prompt is not None]
        # At the end of a causal model's tokens they would be invisible to all of them.
        before, after = (prompts, []) if side.layers.causal else ([], prompts)
        return side.run(index, states, visible, before, after, unseen)[0]


def prompts(count: int, width: int, **factory: Any) -> nn.Parameter | None:
    return nn.Parameter(torch.randn(count, width, **factory) * SPREAD) if count else None


class PMF(Adapter):
    """PMF over the last L_f layers of the backbones ``text`` and ``encoder``.

    For each fusion layer l and direction s→t (docs/methods/pmf.md; our names ↔ the paper's):

        y = g([x_s ; c ; q] through layer l of s, last M_q rows)      (2, 3)   ``query`` q: query prompt
        x_t' = [x_t ; p ; y] through layer l of t, first rows         (4)      ``context`` c: query context prompt

    with both directions read from the same x_s and x_t; ``fusion`` p: fusion context prompt, ``map`` g: mapping.
    The papers' two averaged linear heads are one linear head on the concatenation of the text's read-out and the
    other encoder's vector, up to a factor: readout [cls, image], or [last, image] with a causal text model, of images.
    Names in the state dict: ``fusion.<0 … L_f - 1>.<text_to_image|image_to_text>.<query|context|fusion|map.…>``.
    """

    traits = Traits("pmf", ("text", "encoder"), runs_layers=True, text_depends_on_input=True, checkpointing=True)

    def __init__(self, config: PMFConfig):
        super().__init__()
        self.config = config
        self.fusion = nn.ModuleList()
        self._sides: dict[str, Side] = {}

    # Attaching

    def _install(self, backbones: Mapping[str, PreTrainedModel]) -> Attachment:
        layers, used = {name: Layers.of(backbones[name]) for name in self.traits.backbones}, self.config.fusion_layers
        for name, each in layers.items():
            if used > each.depth:
                raise ConfigError(
                    f"adapter.fusion_layers={used}, but the {name} model has {each.depth} layers: give at most as many"
                )
        self._make_parameters(layers)
        self._sides = {name: Side(each, each.depth - used) for name, each in layers.items()}
        self._undo.callback(setattr, self, "_sides", {})
        firsts = {name: side.first for name, side in self._sides.items()}
        return Attachment(firsts, encoder_width=layers["encoder"].width)

    def _make_parameters(self, layers: Mapping[str, Layers]) -> None:
        widths = {name: each.width for name, each in layers.items()}
        if len(self.fusion):
            if shapes(self._links(widths, device="meta")) != shapes(self.fusion):
                raise ModelError("this PMF was made for models of other widths: make a new one")
            return
        text = layers["text"]
        dtype = torch.promote_types(torch.promote_types(text.model.dtype, layers["encoder"].model.dtype), torch.float32)
        self.fusion = self._links(widths, device=next(text.modules[-1].parameters()).device, dtype=dtype)

    def _links(self, widths: Mapping[str, int], **factory: Any) -> nn.ModuleList:
        layers = range(self.config.fusion_layers)
        make = partial(Link, self.config, widths, **factory)
        return nn.ModuleList(nn.ModuleDict({name: make(name) for name in self.config.links}) for _ in layers)

    # The forward pass

    def encode(self, texts: TextBatch | None, inputs: ModalityInputs | None) -> Outputs:
        """Both encoders from their first fusion layers up; one alone, or a file that is not to be seen, unfused.

        ``text``: the text's final states (B, T, D_t); the vector (B, D_v) is the class token after the other encoder's
        final norm (see `Layers.summary`).
        """
        states: dict[str, Tensor] = {}
        visible: dict[str, Tensor | None] = {"text": None if texts is None else texts.mask.bool()}
        if texts is not None:
            states["text"] = self._text_states(texts)
        if inputs is not None:
            if inputs.states is None:
                raise ModelError("pmf reads the encoder's tokens, but only its global feature is given")
            states["encoder"] = self._checked("encoder", inputs.states, inputs.depth)
            visible["encoder"] = inputs.visible
        fused = texts is not None and inputs is not None and inputs.infused
        unseen = inputs.lacking[:, None] if fused and inputs.lacking is not None else None
        for step in range(self.config.fusion_layers):
            states = self._climb(step, states, visible, fused, unseen)
        return Outputs(
            None if texts is None else self._sides["text"].layers.finish(states["text"]),
            None if texts is None else texts.mask,
            {}
            if inputs is None
            else inputs.with_vector(self._sides["encoder"].layers.summary(states["encoder"], inputs.shown)),
        )

    def _text_states(self, texts: TextBatch) -> Tensor:
        side = self._sides["text"]
        if texts.states is not None:
            return self._checked("text", texts.states, texts.depth)
        return frozen.trunk_states(side.layers.model, side.first, input_ids=texts.ids, attention_mask=texts.mask)

    def _checked(self, name: str, states: Tensor, depth: int) -> Tensor:
        """``states`` in the model's type, if they are what enters the first fusion layer."""
        side = self._sides[name]
        if depth != side.first:
            raise ModelError(
                f"the {name} states are of depth {depth}, but pmf starts at {side.first}: compute them for that"
            )
        return states.to(side.layers.model.dtype)

    def _climb(
        self, step: int, states: dict[str, Tensor], visible: Mapping[str, Tensor | None], fused: bool, unseen: Tensor | None
    ) -> dict[str, Tensor]:
        """The states after one more layer of each encoder."""
        if fused and self._checkpoint and torch.is_grad_enabled():
            run = partial(self._layer, step, visible=visible, fused=fused, unseen=unseen)
            return checkpoint(run, states, use_reentrant=False, preserve_rng_state=False)
        return self._layer(step, states, visible, fused, unseen)

    def _layer(
        self, step: int, states: dict[str, Tensor], visible: Mapping[str, Tensor | None], fused: bool, unseen: Tensor | None
    ) -> dict[str, Tensor]:
        sides = {name: self._sides[name] for name in states}
        at = {name: (side, side.first + step, states[name], visible[name]) for name, side in sides.items()}
        links = {LINKS[name]: link for name, link in self.fusion[step].items()} if fused else {}
        answers = {target: (link, link.ask(*at[source])) for (source, target), link in links.items()}
        after = {}
        for name, (side, index, hidden, seen) in at.items():
            if name in answers:
                link, answer = answers[name]
                after[name] = link.tell(side, index, hidden, seen, answer, unseen)
            else:
                after[name] = side.layers.run(index, hidden, seen)
        return after


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}
