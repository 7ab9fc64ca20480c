"""Aurora, mode approximation for parameter-efficient tuning of two encoders and their fusion (arXiv 2305.08381).

Low-rank updates of frozen projections, with factors that are shared by text model, the other encoder and cross-attention.
Where the paper and the authors' release differ, both are settings; see config.py and docs/methods/aurora.md.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mitrain.core.errors import ModelError
from mitrain.methods.aurora.config import COMPOSED_LAYERS, AuroraConfig
from mitrain.methods.aurora.fusion import Fusion, distinct, enhanced, pooled
from mitrain.methods.aurora.modes import Modes
from mitrain.methods.aurora.points import Point, find_points, has_cross_attention, laid_out, widths_of
from mitrain.methods.base import Adapter, Attachment, Traits
from mitrain.models import frozen, layouts, loading
from mitrain.models.batch import ModalityInputs, Outputs, TextBatch
from mitrain.models.layers import Layers


class Aurora(Adapter):
    """Aurora's updates of the backbones ``text`` and ``encoder``, and the fusion of the two.

    The parameters are made by the first ``attach``, in float32 or the text model's type if wider. Names in the state
    dict: ``modes.<down|up|core>.<set>``, ``modes.vectors.<part>``, ``fusion.<gqt|scale>`` and the fixed ``fusion.turn``.
    Our name ↔ the paper's: down U, up V, core λ (or the release's C), vectors P, gqt (γ, β); `modes.Modes` has
    the equations.
    """

    traits = Traits("aurora", backbones=("text", "encoder"))

    def __init__(self, config: AuroraConfig):
        super().__init__()
        self.config = config
        self.modes: Modes | None = None
        self.fusion: Fusion | None = None
        self._points: list[Point] = []
        self._encoders: dict[str, Layers] = {}
        self._first: int | None = None
        self._crossing = False
        self._widths = (0, 0)

    # Attaching

    def _install(self, backbones: Mapping[str, PreTrainedModel]) -> Attachment:
        encoders = {name: Layers.of(backbones[name]) for name in self.traits.backbones}
        text, other = backbones["text"], encoders["encoder"]
        own = has_cross_attention(text)
        layers = self._fusion_layers(own, encoders["text"].depth)
        first = first_token(self.config.joint_token, text.config, own and layers > 0)
        widths = (encoders["text"].width, other.width)
        points = self._find(backbones, own, layers)
        hidden = {"encoder": widths[1], "text": widths[0], "fusion": widths[0]}
        factors = widths_of(points, self.config, hidden)
        points = laid_out(points, self.config, factors)
        self._make_parameters(points, factors, layers, widths, own, text)
        self._encoders, self._points, self._widths, self._first = encoders, points, widths, first
        self._undo.callback(self._forget)
        for module, own_points, across in by_module(points, own):
            self._undo.callback(module.register_forward_hook(self._hook(own_points, across)).remove)
        if self.fusion is not None:
            self.fusion.place(encoders["text"], self._across, self._undo.callback)
        joint = 0 if self.fusion is None else self.fusion.width
        return Attachment(dict.fromkeys(self.traits.backbones, 0), other.width, joint)

    def _fusion_layers(self, own: bool, depth: int) -> int:
        asked = self.config.fusion_layers
        if asked is None:
            return depth if own else min(COMPOSED_LAYERS, depth)
        if asked > depth or (own and asked not in (0, depth)):
            what = f"which has a cross-attention in each of its {depth} layers" if own else f"which has {depth} layers"
            raise ModelError(f"adapter.fusion_layers={asked} does not fit the text model, {what}: set {depth}, 0 or null")
        return asked

    def _find(self, backbones: Mapping[str, PreTrainedModel], own: bool, layers: int) -> list[Point]:
        config, text = self.config, backbones["text"]
        points = find_points(backbones["encoder"], "encoder", config.encoder) + find_points(text, "text", config.text)
        if own and layers:
            return points + find_points(text, "fusion", config.fusion)
        inside = find_points(text, "text", config.fusion) if layers else []
        lowest = len(layouts.layers_of(text)) - layers
        return points + [replace(point, part="fusion") for point in inside if point.layer >= lowest]

    def _make_parameters(
        self,
        points: list[Point],
        factors: dict[str, int],
        layers: int,
        widths: tuple[int, int],
        own: bool,
        text: PreTrainedModel,
    ) -> None:
        if self.modes is not None:
            self.modes.check(points, factors)
            if (self.fusion is not None) != bool(layers):
                raise ModelError("this Aurora was made for models of other widths or depth: make a new one")
            if self.fusion is not None:
                self.fusion.check(layers, widths, not own)
            return
        like = torch.empty(0, device=text.device, dtype=torch.promote_types(text.dtype, torch.float32))
        modes = Modes(self.config, points, factors, like)
        if layers:
            self.fusion = Fusion(self.config, layers, widths, not own, like)
        self.modes = modes

    def _forget(self) -> None:
        self._encoders, self._points = {}, []

    def _hook(self, own: list[Point], across: list[Point]) -> Callable[..., Tensor]:
        """What a tuned projection gives becomes W x + ΔW x; ``across``: its updates inside a composed cross-attention."""

        def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            if self._disabled:
                return output
            for point in across if self._crossing else own:
                added = self.modes(point, args[0]).to(output.dtype)
                rest = output.shape[-1] - point.offset - point.out
                output = output + (F.pad(added, (point.offset, rest)) if rest or point.offset else added)
            return output

        return add

    @contextlib.contextmanager
    def _across(self) -> Iterator[None]:
        self._crossing = True
        try:
            yield
        finally:
            self._crossing = False

    # The forward pass

    def encode(self, texts: TextBatch | None, inputs: ModalityInputs | None) -> Outputs:
        """See `Adapter.encode`. A text or file that stands in several rows, as in the pairs of a matching loss, goes
        through its encoder once."""
        text = mask = vector = joint = None
        if inputs is not None:
            seen, vector = self._see(inputs)
        if texts is not None:
            mask, kinds = texts.mask, distinct(texts.ids.masked_fill(texts.mask == 0, -1))
            entering, text = self._write(texts, *kinds)
        if texts is not None and inputs is not None and self.fusion is not None:
            joint = self._joint(mask, entering, text, seen, inputs, kinds[0])
        return Outputs(text, mask, {} if inputs is None else inputs.with_vector(vector), joint)

    def _see(self, inputs: ModalityInputs) -> tuple[Tensor, Tensor]:
        """The other encoder's final tokens (B, N, c) and its vector (B, c)."""
        layers, hidden = self._encoders["encoder"], inputs.states
        if hidden is None or inputs.depth:
            raise ModelError("aurora changes every layer of the other encoder: give the states that enter its layer 0")
        first, group = distinct(hidden)
        visible, shown = (None if mask is None else mask[first] for mask in (inputs.visible, inputs.shown))
        hidden = hidden[first].to(layers.model.device, layers.model.dtype)
        for index in range(layers.depth):
            hidden = layers.run(index, hidden, visible)
        return layers.finish(hidden)[group], layers.summary(hidden, shown)[group]

    def _write(self, texts: TextBatch, first: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """The text's states where they enter the fusion (or the bottom), and its final states: (B, T, D) each."""
        layers, hidden, mask = self._encoders["text"], texts.states, texts.mask[first]
        if texts.depth:
            raise ModelError("aurora changes every layer of the text model: give the states that enter its layer 0")
        if hidden is None:
            hidden = frozen.trunk_states(layers.model, 0, input_ids=texts.ids[first], attention_mask=mask)
        else:
            hidden = hidden[first]
        entering, lowest = hidden, 0 if self.fusion is None else self.fusion.first
        for index in range(layers.depth):
            entering = hidden if index == lowest else entering
            hidden = layers.run(index, hidden, mask.bool())
        return entering[group], layers.finish(hidden)[group]

    def _joint(
        self, mask: Tensor, entering: Tensor, text: Tensor, seen: Tensor, inputs: ModalityInputs, texts: Tensor
    ) -> Tensor:
        """(B, D): the fused vector of texts and the tokens ``seen``; the text's own where a sample lacks its file, and
        where nothing is to be seen. ``texts``: a row of each different text."""
        own = self._pooled(text, mask)
        if not inputs.infused:
            return own
        states = self.fusion(self._entering(entering), mask.bool(), seen.to(text.device), inputs.shown)
        fused = self._pooled(states, mask)
        fused = enhanced(fused, own[texts]) if self.config.ice else fused
        return fused if inputs.lacking is None else torch.where(inputs.lacking[:, None], own, fused)

    def _entering(self, hidden: Tensor) -> Tensor:
        """What enters the fusion (B, T, D), its first token exchanged: the pass starts at the embeddings then."""
        if self._first is None:
            return hidden
        ids = torch.full((1, 1), self._first, device=hidden.device)
        first = frozen.trunk_states(self._encoders["text"].model, 0, input_ids=ids)
        return torch.cat([first.to(hidden).expand(len(hidden), -1, -1), hidden[:, 1:]], dim=1)

    def _pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        name = self.config.joint
        if name == "auto":
            composed = "last" if self._encoders["text"].causal else "mean"
            name = composed if self.fusion.composed else "cls"
        return pooled(hidden, mask, name)

    # Merging

    @torch.no_grad()
    def merge(self) -> None:
        """Add every ΔW_n to its frozen weight, and detach: the backbones then give what they gave with the adapter.

        Exact but for the rounding of the weights' type. Refused, before anything is changed, where a part does not
        fold: quantised or sharded weights, GQT, ICE, and a composed fusion, whose cross-attention has updates of its
        own on weights that the text layers use.
        """
        if not self._points:
            raise ModelError("this aurora adapter is not attached: call attach() before merge()")
        if reason := self._unfoldable():
            raise ModelError(f"aurora cannot be merged: {reason}")
        for point in self._points:
            weight = point.module.weight[point.offset : point.offset + point.out]
            added = self.modes.delta(point).to(weight.device)
            weight.copy_(weight.to(torch.promote_types(weight.dtype, added.dtype)) + added)
        self.detach()

    def _unfoldable(self) -> str | None:
        config = self.config
        if self.fusion is not None and self.fusion.composed:
            return "its composed fusion shares the text layers' weights: train with adapter.fusion_layers=0, or keep it"
        if self.fusion is not None and config.gqt != "none":
            return "GQT changes states, not weights: train with adapter.gqt=none, or keep the adapter attached"
        if self.fusion is not None and config.ice:
            return "ICE depends on the batch: set adapter.ice=false, or keep the adapter attached"
        for point in self._points:
            weight = getattr(point.module, "weight", None)
            if weight is None or not weight.is_floating_point() or loading.is_sharded(weight):
                return f"the {point.part} model's weights are quantised or sharded: load it whole, in floats"
        return None


def first_token(asked: int | str, config: PretrainedConfig, own: bool) -> int | None:
    """The id that stands first in the fused pass; None for the text's own.

    BLIP added two tokens to BERT's: [DEC], its configuration's ``bos_token_id``, and [ENC] behind it, which its
    multimodal passes begin with. HF's tokenizer files do not list it.
    """
    if asked == "none" or (asked == "auto" and not own):
        return None
    if not own:
        raise ModelError("adapter.joint_token is for text models with a cross-attention of their own: set it to none")
    enc = (config.bos_token_id or 0) + 1 if asked == "auto" else asked
    if not 0 <= enc < config.vocab_size or (asked == "auto" and enc != config.vocab_size - 1):
        raise ModelError(
            f"the text model's {config.vocab_size} tokens have no [ENC] where BLIP has it, behind the token"
            f" {config.bos_token_id} as the last one: set adapter.joint_token to its id, or to none"
        )
    return int(enc)


def by_module(points: list[Point], own: bool) -> Iterator[tuple[nn.Module, list[Point], list[Point]]]:
    """Each tuned module with its points, and with those that it has inside a composed cross-attention."""
    for module in {point.module: None for point in points}:
        mine = [point for point in points if point.module is module]
        across = [point for point in mine if point.part == "fusion" and not own]
        yield module, [point for point in mine if point not in across], across
