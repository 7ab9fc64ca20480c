"""Conditional prompts (arXiv 2312.03734) and MoPE (arXiv 2403.10568): one frozen encoder predicts, and every layer of it
gets prompts that depend on the other encoder's vector, mixed from experts by a router.

docs/methods/mope.md restates the mathematics and says where the authors' release differs.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mitrain.core.errors import ModelError
from mitrain.methods.base import Adapter, Attachment, Traits
from mitrain.methods.mope.config import ENCODER, TEXT, MoPEConfig, Shape
from mitrain.methods.mope.encoder import Encoded, PlainEncoder, PromptedEncoder, Prompter, pooled
from mitrain.methods.mope.prompts import LayerPrompts, Mapper, init_range_of, uniform
from mitrain.methods.mope.router import Usage, importance_loss, usage
from mitrain.methods.mope.standard import Standard
from mitrain.methods.mope.swin import SwinEncoder, is_swin
from mitrain.models import frozen
from mitrain.models.batch import ModalityInputs, Outputs, TextBatch


class MoPE(Adapter):
    """Prompts in every layer of a main encoder, conditioned on the vector ψ of the other one (our names ↔ the paper's):

        x̂_i = [cls ; P_s,i ; P_d,i ; P_m,i ; tokens]      dropped again after the layer
        P_s,i = prompts[i].static                         static prompt
        P_d,i = Σ_j r_ij E_ij                             dynamic prompt, E_i = prompts[i].experts
        r_i = softmax(q_i K_i / τ + ε)                    prompts[i].router; K_i its ``keys``, the routing embeddings
        P_m,i = mapper(ψ)                                 mapped prompt; ``mapper.first`` shared, ``mapper.stages`` per stage
        L = L_task + λ mean_i ℓ_i                         ``extra_loss``

    ``entry`` enters a Swin's first block where prompts are carried; ``others`` are the other encoder's deep prompts.
    Parameters are made by the first ``attach``, beside the main model, in float32 or the models' type if wider.

    A pass over texts alone or files alone leaves the other modality's prompts out: static prompts (the main
    encoder) or deep prompts (the other) stay, and ``joint`` is None. ``inputs.infused=False`` cuts the link, whichever
    encoder is main: ``joint`` comes from the main encoder with static prompts alone.
    """

    traits = Traits("mope", backbones=(TEXT, ENCODER), runs_layers=True, checkpointing=True)

    def __init__(self, config: MoPEConfig):
        super().__init__()
        self.config = config
        self.traits = replace(self.traits, text_depends_on_input=config.main == TEXT)
        self.prompts = nn.ModuleList()
        self.mapper: Mapper | None = None
        self.standard: Standard | None = None
        self.others = nn.ParameterList()
        self.register_parameter("entry", None)
        self.dropout = nn.Dropout(config.dropout)
        self._shape: Shape | None = None
        self._calibrates = False
        self._encoders: dict[str, PromptedEncoder] = {}
        self._readouts: dict[str, str] = {}
        self._weights: Tensor | None = None
        self._pending: Tensor | None = None

    def _prompted(self, name: str) -> bool:
        return self.config.prompts_main if name == self.config.main else self.config.other_length > 0

    # Attaching

    def _install(self, backbones: Mapping[str, PreTrainedModel]) -> Attachment:
        encoders = {name: encoder_of(backbones[name], name, self.config) for name in self.traits.backbones}
        main, other = encoders[self.config.main], encoders[self.config.other]
        readouts = {self.config.main: feature_of(main, self.config), self.config.other: condition_of(other, self.config)}
        for name, how in readouts.items():
            if how == "first" and not encoders[name].has_first:
                raise ModelError(f"the {name} model has no CLS token to read: take 'mean' or 'auto'")
            if how == "last" and name != TEXT:
                raise ModelError("the last token means something of a causal text alone: take 'mean' or 'auto'")
        self._make_parameters(main, other)
        self._encoders, self._readouts = encoders, readouts
        self._undo.callback(self._forget)
        firsts = {name: 0 if self._prompted(name) else encoder.depth for name, encoder in encoders.items()}
        return Attachment(firsts, encoders[ENCODER].stage_widths[-1], main.stage_widths[-1])

    def _forget(self) -> None:
        self._encoders, self._readouts, self._weights, self._pending = {}, {}, None, None

    def _make_parameters(self, main: PromptedEncoder, other: PromptedEncoder) -> None:
        config = self.config
        condition = other.stage_widths[-1]
        others = other.widths if config.other_length else ()
        shape = Shape(main.widths, main.stage_widths, main.entry * config.prompts_main, condition, others)
        if self._shape is not None:
            if shape != self._shape:
                raise ModelError("this MoPE was made for models of other widths or depth: make a new one")
            return
        like = next(main.model.parameters())
        dtype = torch.promote_types(torch.promote_types(main.model.dtype, other.model.dtype), torch.float32)
        factory: dict[str, Any] = {"device": like.device, "dtype": dtype}
        init_range = config.spread or init_range_of(main.model.config, main.stage_widths[0])
        if config.prompts_main:
            self.prompts.extend(LayerPrompts(config, width, condition, init_range, **factory) for width in shape.widths)
        if config.shared_router and len(self.prompts) > 1:
            self.prompts[1].router = self.prompts[0].router
        if shape.entry:
            self.entry = uniform((config.prompt_tokens, shape.entry), init_range, **factory)
        if config.standardize and (config.dynamic or config.mapped):
            self.standard = Standard(condition, **factory)
        if config.mapped:
            self.mapper = Mapper(config, condition, shape.stage_widths, **factory)
        init_range = config.spread or init_range_of(other.model.config, other.stage_widths[0])
        self.others.extend(uniform((config.other_length, width), init_range, **factory) for width in others)
        self._shape = shape

    # The forward pass

    def encode(self, texts: TextBatch | None, inputs: ModalityInputs | None) -> Outputs:
        if not self._encoders:
            raise ModelError("this mope adapter is not attached: call attach()")
        if texts is not None and inputs is not None and len(texts.ids) != len(inputs):
            raise ModelError(f"{len(texts.ids)} texts and {len(inputs)} files: give one file per text")
        states = {TEXT: self._text_states(texts), ENCODER: self._encoder_states(inputs)}
        mask, lacking = texts and texts.mask, inputs and inputs.lacking
        visible, shown = ({TEXT: mask, ENCODER: inputs and inputs.visible}, {TEXT: mask, ENCODER: inputs and inputs.shown})
        main, other = self.config.main, self.config.other
        if main == ENCODER and lacking is not None:
            there = ~lacking[:, None].expand(states[ENCODER].shape[:2])
            for masks in (visible, shown):
                masks[ENCODER] = there if masks[ENCODER] is None else masks[ENCODER] & there
        encoded, vectors, condition = {}, {}, None
        if states[other] is not None:
            encoded[other] = self._run_other(states[other], visible[other])
            vectors[other] = condition = self._pool(other, encoded[other], shown[other])
        linked = condition is not None and inputs is not None and inputs.infused
        if states[main] is not None:
            unlinked = lacking if linked and other == ENCODER else None
            encoded[main] = self._run_main(states[main], visible[main], condition if linked else None, unlinked)
            vectors[main] = self._pool(main, encoded[main], shown[main])
        text = None if texts is None else self._encoders[TEXT].finish(encoded[TEXT].tokens)
        read = {} if inputs is None else inputs.with_vector(vectors[ENCODER])
        return Outputs(text, mask, read, vectors.get(main) if len(vectors) == 2 else None)

    def _text_states(self, texts: TextBatch | None) -> Tensor | None:
        if texts is None:
            return None
        if texts.states is not None:
            return self._checked(TEXT, texts.states, texts.depth)
        depth = self.attachment.first_layers[TEXT]
        return frozen.trunk_states(self._backbones[TEXT], depth, input_ids=texts.ids, attention_mask=texts.mask)

    def _encoder_states(self, inputs: ModalityInputs | None) -> Tensor | None:
        if inputs is None:
            return None
        if inputs.states is None:
            raise ModelError("mope runs the encoder itself: give the states that enter its first prompted layer")
        return self._checked(ENCODER, inputs.states, inputs.depth)

    def _checked(self, name: str, states: Tensor, depth: int) -> Tensor:
        """``states`` if they are what enters the lowest layer that this adapter changes."""
        wanted, widths = self.attachment.first_layers[name], self._encoders[name].stage_widths
        width = widths[0] if wanted == 0 else widths[-1]
        if depth != wanted or states.shape[-1] != width:
            raise ModelError(
                f"the {name} states are of depth {depth} and {states.shape[-1]} wide, but mope starts at depth {wanted} "
                f"with {width}: compute them for adapter.attachment.first_layers[{name!r}]"
            )
        return states

    def _pool(self, name: str, encoded: Encoded, mask: Tensor | None) -> Tensor:
        return pooled(self._encoders[name], encoded, mask, self._readouts[name])

    def _run_other(self, states: Tensor, mask: Tensor | None) -> Encoded:
        """The other encoder with its own deep prompts."""
        name = self.config.other

        def prompts(index: int, tokens: Tensor, visible: Tensor | None) -> Tensor:
            return self.dropout(self.others[index].expand(len(tokens), -1, -1))

        return self._run(name, states, mask, prompts, None)

    def _run_main(self, states: Tensor, mask: Tensor | None, condition: Tensor | None, unlinked: Tensor | None) -> Encoded:
        """The main encoder; with ψ ``condition`` (B, c) the routers' weights are kept, without it static prompts only.

        ``unlinked`` (B,): samples that have no ψ; of their prompts the static ones alone are seen.
        """
        encoder, clean, mapped = self._encoders[self.config.main], [], None
        if condition is not None and self.prompts:
            condition = self._standardised(condition.to(next(self.parameters()).dtype), unlinked)
        if condition is not None and self.prompts:
            mapped = None if self.mapper is None else self.mapper(condition)

        def prompts(index: int, tokens: Tensor, visible: Tensor | None) -> Tensor:
            share = None if mapped is None else mapped[encoder.stages[index]]
            if self._calibrates and (standard := self.prompts[index].standard) is not None:
                mean = self.prompts[index].mean_token(tokens, visible)
                standard.see(mean if visible is None else mean[visible.any(1)])
            mixed, weights = self.prompts[index](tokens, visible, condition, share)
            if weights is not None:
                clean.append(weights)
            return mixed

        entry = None if self.entry is None else self.entry.expand(len(states), -1, -1)
        unseen = None
        if unlinked is not None and not self._calibrates:
            static = torch.arange(self.config.prompt_tokens, device=unlinked.device) < self.config.static_tokens
            unseen = unlinked[:, None] & ~static
        encoded = self._run(self.config.main, states, mask, prompts, entry, unseen)
        if clean:
            weights = torch.stack(clean)
            self._remember(weights if unlinked is None else weights[:, ~unlinked])
        return encoded

    def _standardised(self, condition: Tensor, unlinked: Tensor | None) -> Tensor | None:
        """ψ as routers and mapper read it; while statistics are taken it is noted, and nothing reads it."""
        if self.standard is None:
            return condition
        if self._calibrates:
            self.standard.see(condition if unlinked is None else condition[~unlinked])
            return None
        return self.standard(condition)

    def _calibrate(self, run: Callable[[], None]) -> None:
        """Statistics of ψ, and of each layer's mean token with static prompts alone, over the passes of ``run``."""
        standards = [module for module in self.modules() if isinstance(module, Standard)]
        if not standards:
            return
        self._calibrates = True
        for standard in standards:
            standard.watch()
        try:
            run()
        finally:
            self._calibrates = False
        for standard in standards:
            standard.fit()

    def _run(
        self,
        name: str,
        states: Tensor,
        mask: Tensor | None,
        prompts: Prompter,
        entry: Tensor | None,
        unseen: Tensor | None = None,
    ) -> Encoded:
        if not self._prompted(name):
            return Encoded(states, states[:, :0])
        return self._encoders[name].run(states, mask, prompts, entry, self._checkpoint, unseen)

    # Routing

    def _remember(self, weights: Tensor) -> None:
        self._weights = weights.detach()
        self._pending = weights if torch.is_grad_enabled() else None

    @property
    def routing(self) -> Tensor | None:
        """(n, B, k): the experts' weights in each routed layer of the last pass that routed, without noise."""
        return self._weights

    def importance(self) -> Usage | None:
        """How the last pass that routed used the experts of each layer."""
        return None if self._weights is None else usage(self._weights)

    def usage(self) -> Mapping[str, float]:
        """`importance` as means over the layers, and ``variation_floor`` k / B: the squared variation to be expected of B
        samples that go to one expert each, all k alike."""
        statistics = self.importance()
        if statistics is None:
            return {}
        _, samples, experts = self._weights.shape
        means = {name: float(value.mean()) for name, value in vars(statistics).items()}
        return means | {"variation_floor": experts / samples}

    def extra_loss(self) -> tuple[Tensor, Tensor] | None:
        """λ · mean over layers of the importance loss of the last pass that routed, times its B samples, and B.

        Each pass's loss is handed out once, and after a pass with gradients alone. Every rank and micro-batch has its
        own importance, of the samples that it saw; training weights them by the loss's count.
        """
        weights, self._pending = self._pending, None
        if weights is None or not weights.shape[1] or not self.config.importance or self.config.experts == 1:
            return None
        count = torch.tensor(weights.shape[1], device=weights.device)
        return self.config.importance * importance_loss(weights, self.config.gamma) * count, count


def encoder_of(model: PreTrainedModel, name: str, config: MoPEConfig) -> PromptedEncoder:
    """How to run ``model``; ModelError if it cannot be run layer by layer."""
    if is_swin(model):
        return SwinEncoder(model, carried=name == config.main and config.stage_start == "carried")
    return PlainEncoder(model, is_text=name == TEXT)


def feature_of(main: PromptedEncoder, config: MoPEConfig) -> str:
    """The main encoder's read-out."""
    if config.feature != "auto":
        return config.feature
    return "all" if config.main == ENCODER else "last" if main.causal else "mean"


def condition_of(other: PromptedEncoder, config: MoPEConfig) -> str:
    """The other encoder's read-out, ψ."""
    if config.condition != "auto":
        return config.condition
    return "last" if other.causal else "first" if other.has_first else "mean"
