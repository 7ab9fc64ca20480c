"""MiT, Multimodal Infusion Tuning (arXiv 2403.05060): a frozen language model reads the text, and each modality's one
global vector multiplies, and is added to, the keys, values and feed-forward activations of a few of its layers.

Where the paper and the authors' release differ, both are settings; see config.py.
"""

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import find_packed_sequence_indices

from mitrain.core.errors import ConfigError, ModelError
from mitrain.methods.base import Attachment, Traits
from mitrain.methods.checkpointing import CheckpointedLayer
from mitrain.methods.mit import attention, ffn
from mitrain.methods.mit.bound import BoundFeatures
from mitrain.methods.mit.condition import Condition
from mitrain.methods.mit.config import MiTConfig
from mitrain.methods.mit.decoder import Decoder, InfusionPoint, find_decoder, infusion_point
from mitrain.methods.mit.gate_cache import check_cache
from mitrain.methods.mit.lora import LowRank, sizes_of
from mitrain.methods.mit.maps import LayerInfusion, attention_maps, inputs_of
from mitrain.methods.selection import select_layers
from mitrain.models import loading
from mitrain.models.layouts import CACHES, projections
from mitrain.models.reading import READ


@dataclass(frozen=True)
class PassState:
    """What the infused layers need during one forward pass, also when they are computed again in backward.

    ``versions`` tell whether the adapter's parameters changed since the last pass; only for passes without gradients.
    """

    condition: Condition
    inputs: dict[str, Tensor]
    present: dict[str, Tensor]
    padding: Tensor | None
    read: Tensor | None
    versions: tuple[int, ...]


class MiT(BoundFeatures):
    """MiT's maps in the chosen layers of the backbone ``text`` (our names ↔ the paper's):

        maps.k_mul, k_add, v_mul, v_add     W_d^k, W_a^k, W_d^v, W_a^v with their biases     Eq. 1
        head_logit                          L in the gate σ(L + cos(V, v_add))
        maps.ffn                            W_f, b_f                                          Eq. 7

    The parameters are made by the first ``attach``, beside each layer's own, in float32 or the model's type if wider.
    Names in the state dict: ``infused.<index>.maps.<modality>.<k_mul|k_add|v_mul|v_add|ffn>``,
    ``infused.<index>.head_logit`` and, with a rank, ``projections.<modality>``; with a LoRA rank ``lora.<down|up>.<i>``.
    """

    traits = Traits("mit", text_depends_on_input=True, checkpointing=True)

    def __init__(self, config: MiTConfig):
        super().__init__()
        if not config.modalities:
            raise ConfigError("adapter.modalities is empty: name each modality and its feature width, as {image: 768}")
        self.config = config
        self.infused = nn.ModuleDict()
        self.projections = nn.ModuleDict()
        self.lora: LowRank | None = None
        self._calls: dict[int, PassState] = {}  # by thread
        self._decoder: Decoder | None = None
        self._checkpointing = False

    @property
    def feature_widths(self) -> Mapping[str, int]:
        return self.config.modalities

    @property
    def layers(self) -> list[int]:
        """Indices of the infused layers, ascending; known once attached."""
        return [int(index) for index in self.infused]

    @property
    def infusions(self) -> list[LayerInfusion]:
        """The infused layers' maps, in the order of ``layers``."""
        return list(self.infused.values())

    # Attaching

    def _install(self, backbones: Mapping[str, PreTrainedModel]) -> Attachment:
        decoder = find_decoder(backbones["text"])
        indices = select_layers(self.config.layers, len(decoder.layers))
        points = [infusion_point(decoder, index, self.config.ffn) for index in indices]
        check_attention_base(decoder, self.config)
        both_ways = any(getattr(m, "is_causal", True) is False for point in points for m in point.attention.modules())
        if both_ways and self.config.kernel_gate == "prefix":
            raise ConfigError(
                "an encoder reads its text both ways, and the gate 'prefix' the text so far: set adapter.gate=sequence"
            )
        others = self._others(backbones["text"])
        if others and (self._checkpoint or any(other._checkpointing for other in others)):
            raise ModelError("activation checkpointing serves a model with one adapter: switch it off")
        self._make_parameters(points, decoder)
        if self.config.lora_rank:
            self._place_lora(decoder, indices)
        self._switch_attention(decoder)
        self._undo.callback(decoder.model.register_forward_pre_hook(self._enter_decoder, with_kwargs=True).remove)
        self._undo.callback(decoder.model.register_forward_hook(self._leave_decoder, always_call=True).remove)
        for point in points:
            announce = partial(self._enter_attention, point.index)
            self._undo.callback(point.attention.register_forward_pre_hook(announce, with_kwargs=True).remove)
            self._undo.callback(point.attention.register_forward_hook(check_used, with_kwargs=True).remove)
            if point.projection is not None:
                layer, factor = decoder.layers[point.index], partial(self._ffn_factor, point.index)
                read = self._read if point.index == len(decoder.layers) - 1 else lambda: None
                self._undo.callback(ffn.infuse(layer, point.projection, factor, decoder.model.dtype, self._backend, read))
        self._decoder = decoder
        self._undo.callback(self.set_checkpointing, False)
        self.set_checkpointing(self._checkpoint)
        linear = [module for module in self.modules() if isinstance(module, nn.Linear)]
        return Attachment(
            {"text": indices[0]},
            modalities=self.feature_widths,
            infused_parameters={int(index): loading.count_parameters(layer) for index, layer in self.infused.items()},
            # each runs once per sample, whatever its length; LoRA's do for each token
            macs=None if self.lora else sum(module.weight.numel() for module in linear),
        )

    def _make_parameters(self, points: list[InfusionPoint], decoder: Decoder) -> None:
        shapes = {str(point.index): point.shape for point in points}
        if len(self.infused):
            if shapes != {index: layer.shape for index, layer in self.infused.items()}:
                raise ModelError("this MiT was made for a model of other widths or depth: make a new one")
            return
        widths, rank = dict(self.config.modalities), self.config.rank
        dtype = torch.promote_types(decoder.model.dtype, torch.float32)
        if rank:
            like = next(decoder.layers[points[0].index].parameters())
            for name, width in widths.items():
                self.projections[name] = nn.Linear(width, rank, bias=False, device=like.device, dtype=dtype)
            widths = dict.fromkeys(widths, rank)
        names = attention_maps(self.config.k_add, self.config.terms)
        options = {"ffn": self.config.ffn, "base": self.config.base, "dtype": dtype}
        for point in points:
            like = next(decoder.layers[point.index].parameters())
            layer = LayerInfusion(widths, point.shape, names, **options, device=like.device)
            if self.config.init == "identity":
                layer.start_as_identity()
            self.infused[str(point.index)] = layer

    def _place_lora(self, decoder: Decoder, indices: list[int]) -> None:
        modules = [module for *_, module in projections(decoder.model, ("q", "v"), indices)]
        sizes = [sizes_of(module) for module in modules]
        if self.lora is None:
            like = next(self.infused.parameters())
            self.lora = LowRank(sizes, self.config.lora_rank, device=like.device, dtype=like.dtype)
        if self.lora.sizes != sizes:
            raise ModelError("this MiT was made for a model of other widths or depth: make a new one")
        self.lora.place(modules, lambda: self._acts, self._undo.callback)

    def _switch_attention(self, decoder: Decoder) -> None:
        attention.register()
        before = decoder.model.config._attn_implementation
        base = before.removeprefix(attention.PREFIX)  # another adapter's
        decoder.model.set_attn_implementation(attention.PREFIX + base)
        self._undo.callback(decoder.model.set_attn_implementation, before)
        if decoder.model.config._attn_implementation != attention.PREFIX + base:
            raise ModelError(f"{decoder.name} does not use Hugging Face's attention interface: not supported")

    @property
    def _call(self) -> PassState | None:
        """The forward pass that this thread is in."""
        return self._calls.get(threading.get_ident())

    @_call.setter
    def _call(self, call: PassState | None) -> None:
        if call is None:
            self._calls.pop(threading.get_ident(), None)
        else:
            self._calls[threading.get_ident()] = call

    def set_checkpointing(self, enabled: bool) -> None:
        if self._decoder is None or enabled == self._checkpointing:
            return
        if enabled and self._backbones and self._others(self._backbones["text"]):
            raise ModelError("activation checkpointing serves a model with one adapter: detach the others")
        layers = self._decoder.layers
        for index in self.layers:
            layers[index] = CheckpointedLayer(layers[index], self._remember) if enabled else layers[index].layer
        self._checkpointing = enabled

    def _remember(self) -> Any:
        return partial(self._during, self._call)

    @contextmanager
    def _during(self, call: PassState | None) -> Iterator[None]:
        before, self._call = self._call, call
        try:
            yield
        finally:
            self._call = before

    # The forward pass, in the order in which the hooks run

    def _enter_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self._call = None
        condition = self.condition
        if condition is None:
            return None
        given = {**inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments, **kwargs}
        tokens = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
        if tokens is None:
            return None
        self._check_inputs(decoder, given)
        inputs, present = inputs_of(condition, len(tokens), next(self.parameters()), self.projections)
        padding = given.get("attention_mask")
        padding = None if padding is None else padding.to(torch.bool)
        versions = () if torch.is_grad_enabled() else tuple(map(version, self.parameters()))
        self._call = PassState(condition, inputs, present, padding, READ.get(), versions)
        if self._checkpointing and torch.is_grad_enabled():
            return args, {**kwargs, "use_cache": False}
        return None

    def _check_inputs(self, decoder: nn.Module, given: Mapping[str, Any]) -> None:
        mask, positions = (given.get(name) for name in ("attention_mask", "position_ids"))
        cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
        if self.config.kernel_gate == "sequence" and (cache is not None or inside_generate()):
            raise ModelError("the gate 'sequence' reads the whole text at once and cannot generate: set adapter.gate=prefix")
        if cache is not None:
            check_cache(cache)
        if torch.is_grad_enabled() and getattr(decoder, "gradient_checkpointing", False):
            raise ModelError(
                "transformers' own activation checkpointing undoes the frozen trunk: use mit.set_checkpointing(True)"
            )
        if cache is not None and self._checkpointing and torch.is_grad_enabled():
            raise ModelError("activation checkpointing cannot fill a KV cache: give none in training")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ModelError("infused layers need the attention mask as (batch, tokens): 1 for a token, 0 for padding")
        alone = mask is None and cache is None and positions is not None and positions.ndim == 2
        if given.get("cu_seq_lens_q") is not None or (alone and find_packed_sequence_indices(positions) is not None):
            raise ModelError("packed sequences are not supported by infused layers: give one sample per row, padded")

    def _leave_decoder(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        self._call = None

    def _recall(self, call: PassState, index: int, what: str) -> Any:
        """What the maps of layer ``index`` give for ``call``; in generation they are computed once, not per token."""
        layer = self.infused[str(index)]
        compute = layer if what == "attention" else layer.ffn_factor
        if torch.is_grad_enabled():
            return compute(call.inputs, call.present)
        memory, key = call.condition.memory, (index, what, len(next(iter(call.inputs.values()))))
        if key not in memory or memory[key][0] != call.versions:
            memory[key] = call.versions, compute(call.inputs, call.present)
        return memory[key][1]

    def _enter_attention(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = self._call
        if call is None:
            return None
        cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
        infusion = attention.Infusion(
            maps=self._recall(call, index, "attention"),
            gate=self.config.kernel_gate,
            condition=call.condition,
            padding=call.padding,
            cache=cache,
            layer_idx=index,
            depth=len(self._decoder.layers),
            backend=self._backend,
        )
        return args, {**kwargs, "infusion": infusion}

    def _ffn_factor(self, index: int) -> Tensor | None:
        return None if self._call is None else self._recall(self._call, index, "ffn")

    def _read(self) -> Tensor | None:
        return None if self._call is None else self._call.read


def version(parameter: nn.Parameter) -> int:
    """How often the tensor was changed in place (inference tensors, which never train, don't count)."""
    return 0 if parameter.is_inference() else parameter._version


def check_used(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    infusion = kwargs.get("infusion")
    if infusion is not None and not infusion.used:
        raise ModelError(f"{type(module).__name__} does not use Hugging Face's attention interface: not supported")


def inside_generate() -> bool:
    """Whether a call of transformers' generate is under way; a forward pass without a cache does not tell."""
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def check_attention_base(decoder: Decoder, config: MiTConfig) -> None:
    base = decoder.model.config._attn_implementation.removeprefix(attention.PREFIX)
    if base not in attention.BASES:
        raise ModelError(
            f"{decoder.name} runs on the attention {base!r}: load it with attn_implementation set to one of "
            f"{', '.join(attention.BASES)}"
        )
    if getattr(decoder.model.config, "attn_logit_softcapping", None):
        if base != "eager":
            raise ModelError(f"{decoder.name} caps its attention scores: load it with attn_implementation='eager'")
        if config.k_add and config.gate != "token":
            raise ModelError(f"{decoder.name} caps its attention scores, where k_add does not fold: adapter.k_add=false")


def attach(model: PreTrainedModel, config: MiTConfig, backend: str = "auto", name: str | None = None) -> MiT:
    """Freeze ``model`` and attach a new MiT to it; undo with the returned adapter's ``detach()``.

    ``name``: of the adapter, where several take turns on the model (`set_adapter`, `using_adapter`).
    The features of a pass come by ``mit.bind({"image": x})`` or as the keyword ``model(..., infused={"image": x})``.
    Raises ModelError, in one line, for what cannot be infused.
    """
    adapter = MiT(config)
    adapter.attach({"text": model}, backend=backend, name=name)
    return adapter
