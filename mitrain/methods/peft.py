"""The methods that users would pick instead, by the PEFT library: LoRA, IA³, prompt tuning, prefix tuning.

PEFT makes and runs the trained parts; here they are put in place, taken off, saved and loaded as every method's are.
LoRA: arXiv 2106.09685. IA³: arXiv 2205.05638. Prompt tuning: arXiv 2104.08691. Prefix tuning: arXiv 2101.00190.

Shapes: B samples, T tokens, D width of the text model, P virtual tokens.
"""

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mitrain.core.config import Section
from mitrain.core.errors import MissingExtraError, ModelError
from mitrain.methods.base import Adapter, Attachment, Traits
from mitrain.methods.selection import LayersSetting, select_layers
from mitrain.models import layouts, loading, quant
from mitrain.models.batch import ModalityInputs, Outputs, TextBatch
from mitrain.models.layers import Layers
from mitrain.models.layouts import Projection, kind_of, projections

Where = Literal["text", "encoder", "both"]
SIDES: dict[str, tuple[str, ...]] = {"text": ("text",), "encoder": ("encoder",), "both": ("text", "encoder")}
STORED = {"text": "text", "encoder": "image"}
"""Each side in the names of saved tensors, which are older than encoders of anything but images."""


def library() -> Any:
    """PEFT, where it is installed."""
    try:
        with quant.nothing_fetched():  # it imports bitsandbytes
            import peft
    except ImportError:
        raise MissingExtraError("this method comes from the PEFT library: install it with pip install peft") from None
    return peft


class InjectedConfig(Section):
    """``where``: which frozen models are changed. ``targets``: which projections of their ``layers``; one that makes
    queries, keys and values at once (GPT-2, GPT-NeoX, Phi-3) is changed whole.
    """

    where: Where = "text"
    layers: LayersSetting = "all"
    targets: tuple[Projection, ...] = Field(("q", "v"), min_length=1)


class LoRAConfig(InjectedConfig, kind="adapter", name="lora"):
    """W + (alpha / rank) B A, B zero at first; ``dropout`` of what A reads."""

    rank: int = Field(8, ge=1, le=65536)
    alpha: float = Field(16, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)


class IA3Config(InjectedConfig, kind="adapter", name="ia3"):
    """Factors, 1 at first, of keys and values and of what enters the feed-forward's last projection."""

    targets: tuple[Projection, ...] = Field(("k", "v", "mlp"), min_length=1)


class Injected(Adapter):
    """A PEFT method that puts modules in place of projections; the text model and the encoder are read alone.

    ``weights`` holds PEFT's parameters under their names in the frozen models, a point written as a slash.
    """

    def __init__(self, config: InjectedConfig):
        super().__init__()
        self.config = config
        self.traits = replace(self.traits, backbones=("text",) if config.where == "text" else ("text", "encoder"))
        self.weights = nn.ParameterDict()

    def peft_config(self, names: list[str], model: nn.Module) -> Any:
        """PEFT's own configuration for the projections ``names`` of ``model``."""
        raise NotImplementedError

    def _install(self, backbones: Mapping[str, PreTrainedModel]) -> Attachment:
        first_layers = {name: len(layouts.layers_of(model)) for name, model in backbones.items()}
        self._encoder = Layers.of(backbones["encoder"]) if "encoder" in self.traits.backbones else None
        new: dict[str, nn.Parameter] = {}
        peft = {}
        for name in SIDES[self.config.where]:
            indices = select_layers(self.config.layers, first_layers[name])
            first_layers[name] = indices[0]
            settings, added = self._inject(name, backbones[name], indices)
            peft[name] = settings, partial(peft_name, STORED[name])
            new |= added
        if len(self.weights) and {n: p.shape for n, p in self.weights.items()} != {n: p.shape for n, p in new.items()}:
            raise ModelError(f"this {self.traits.name} was made for a model of other widths or depth: make a new one")
        for key, parameter in new.items():
            if key in self.weights:
                put(backbones, key, self.weights[key])
            else:
                self.weights[key] = parameter
        width = 0 if self._encoder is None else self._encoder.width
        return Attachment(first_layers, width, peft=peft)

    def _inject(self, side: str, model: PreTrainedModel, layers: list[int]) -> tuple[Any, dict[str, nn.Parameter]]:
        """PEFT's configuration, and the parameters that it has put into ``layers`` of ``model``, by our names."""
        targets = list(projections(model, self.config.targets, layers))
        whole = {id(module): name for name, module in model.named_modules()}
        names = []
        for owner, attribute, module in targets:
            if not isinstance(module, nn.Linear | Conv1D):
                raise ModelError(
                    f"{self.traits.name} needs float projections, and the {side} model's are {type(module).__name__}:"
                    " set model.quantize=none"
                )
            names.append(whole[id(module)])
            self._undo.callback(setattr, owner, attribute, module)
        before, settings = {id(p) for p in model.parameters()}, self.peft_config(names, model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of what is meant here: no PeftModel around the model
            library().inject_adapter_in_model(settings, model)
        added = {n: p for n, p in model.named_parameters() if id(p) not in before}
        for parameter in added.values():  # PEFT makes them in the projection's type, where small updates would be lost
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        return settings, {f"{STORED[side]}/{name.replace('.', '/')}": parameter for name, parameter in added.items()}

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        layers = list(self._inserted())
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    def merge(self) -> None:
        """Fold PEFT's parts into the frozen weights, by PEFT's own arithmetic, and take the adapter off."""
        for layer in self._inserted():
            layer.merge()
        self.detach()

    def _inserted(self) -> Iterator[Any]:
        """PEFT's modules in the backbones."""
        kind = library().tuners.tuners_utils.BaseTunerLayer
        return (module for model in self._backbones.values() for module in model.modules() if isinstance(module, kind))


class LoRA(Injected):
    """LoRA on the chosen projections."""

    traits = Traits("lora")

    def peft_config(self, names: list[str], model: nn.Module) -> Any:
        config = self.config
        options = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
        return library().LoraConfig(target_modules=names, **options)


class IA3(Injected):
    """IA³ on keys, values and the feed-forward's last projection."""

    traits = Traits("ia3")

    def peft_config(self, names: list[str], model: nn.Module) -> Any:
        feed_forward = [name for name in names if kind_of(within_layer(name)) == "mlp"]
        # of a layer's feed-forward projections, the one that gives the hidden width back
        width = model.config.get_text_config().hidden_size
        widths = {
            name: module.nf if isinstance(module, Conv1D) else module.out_features
            for name in feed_forward
            for module in [model.get_submodule(name)]
        }
        last = {name for name, out in widths.items() if out == width}
        kept = [name for name in names if name not in feed_forward or name in last]
        return library().IA3Config(target_modules=kept, feedforward_modules=sorted(last))


class VirtualConfig(Section):
    """``tokens``: the number P of trained vectors."""

    tokens: int = Field(16, ge=1, le=1024)


class PromptConfig(VirtualConfig, kind="adapter", name="prompt"):
    """P trained input embeddings before every text."""


class PrefixConfig(VirtualConfig, kind="adapter", name="prefix"):
    """P trained keys and values before every text, in every layer; for causal language models."""


class Virtual(Adapter):
    """A PEFT method that puts trained vectors before the text; ``prompt_encoder`` is PEFT's."""

    def __init__(self, config: VirtualConfig):
        super().__init__()
        self.config = config
        self.prompt_encoder: nn.Module | None = None

    def peft_config(self, model: PreTrainedModel) -> Any:
        """PEFT's own configuration for ``model``."""
        raise NotImplementedError

    def _install(self, backbones: Mapping[str, PreTrainedModel]) -> Attachment:
        base = backbones["text"].base_model
        check_positions(base, self.config.tokens, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = library().get_peft_model(base, self.peft_config(base))
        made = wrapped.prompt_encoder["default"]
        if self.prompt_encoder is None:
            self.prompt_encoder = made.to(next(base.parameters()).device)
        elif [p.shape for p in made.parameters()] != [p.shape for p in self.prompt_encoder.parameters()]:
            raise ModelError(f"this {self.traits.name} was made for a model of other widths or depth: make a new one")
        wrapped.prompt_encoder["default"] = self.prompt_encoder
        object.__setattr__(self, "_wrapped", wrapped)
        self._undo.callback(object.__setattr__, self, "_wrapped", None)
        return Attachment({"text": 0}, peft={"text": (wrapped.peft_config["default"], lambda _: "prompt_embeddings")})

    def encode(self, texts: TextBatch | None, inputs: ModalityInputs | None) -> Outputs:
        text = None
        if texts is not None:
            check_positions(self._wrapped.get_base_model(), self.config.tokens, texts.ids.shape[1])
            options = {"attention_mask": texts.mask, "use_cache": self.traits.name == "prefix"}
            hidden = self._wrapped(input_ids=texts.ids, **options).last_hidden_state
            text = hidden[:, -texts.ids.shape[1] :]
        return Outputs(text, texts and texts.mask, inputs.features if inputs else {})


class Prompt(Virtual):
    """Prompt tuning."""

    traits = Traits("prompt", wraps_text_model=True)

    def peft_config(self, model: PreTrainedModel) -> Any:
        return library().PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=self.config.tokens)


class Prefix(Virtual):
    """Prefix tuning."""

    traits = Traits("prefix", wraps_text_model=True)

    def peft_config(self, model: PreTrainedModel) -> Any:
        if not Layers.of(model).causal:
            raise ModelError("prefix tuning needs a cache of keys, which an encoder does not have: take adapter.name=prompt")
        return library().PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=self.config.tokens)


def check_positions(model: PreTrainedModel, virtual: int, tokens: int) -> None:
    """ModelError where ``virtual`` vectors and a text of ``tokens`` tokens are more than the model has positions for."""
    limit = loading.positions(model)
    if limit and virtual + tokens > limit:
        raise ModelError(
            f"{virtual} vectors before a text of {tokens} tokens exceed the {limit} positions of {type(model).__name__}:"
            " lower adapter.tokens or task.max_tokens"
        )


def put(backbones: Mapping[str, nn.Module], key: str, parameter: nn.Parameter) -> None:
    """Put ``parameter`` at its place in the backbones, in place of PEFT's new one."""
    stored, *owner, name = key.split("/")
    side = "text" if stored == "text" else "encoder"
    setattr(backbones[side].get_submodule(".".join(owner)), name, parameter)


def peft_name(stored: str, name: str) -> str | None:
    """Under which name PEFT saves a parameter that `Injected` holds as ``weights.STORED/PATH/IN/MODEL``; None of others."""
    if not name.startswith(f"weights.{stored}/"):
        return None
    path = name.partition("/")[2].replace("/", ".")
    return f"base_model.model.{re.sub(r'[.]default(?=$|[.]weight$|[.]bias$)', '', path)}"


def within_layer(name: str) -> str:
    """The path inside its layer of a module of a model: what follows the layer's number."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), -1)
    return ".".join(parts[number + 1 :])
