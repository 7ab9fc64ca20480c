"""The methods that users would pick instead, by the PEFT library: LoRA, IA³, prompt tuning, prefix tuning.

PEFT makes and runs the trained parts; here they are put in place, taken off, saved and loaded as every method's are.
LoRA: arXiv 2106.09685. IA³: arXiv 2205.05638. Prompt tuning: arXiv 2104.08691. Prefix tuning: arXiv 2101.00190.

Shapes: B samples, T tokens, D width of the text model, P virtual tokens.
"""

import contextlib
import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mitrain.core.config import Section
from mitrain.core.errors import MissingExtraError, ModelError
from mitrain.methods import export_format
from mitrain.methods.base import Adapter
from mitrain.methods.selection import LayersSetting, select_layers
from mitrain.models import layouts, loading, quant
from mitrain.models.batch import ModalityInputs, Outputs, TextBatch
from mitrain.models.layers import Layers
from mitrain.models.layouts import Projection, kind_of, projections

Where = Literal["text", "image", "both"]
SIDES: dict[str, tuple[str, ...]] = {"text": ("text",), "image": ("image",), "both": ("text", "image")}


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
    """A PEFT method that puts modules in place of projections; the text model and the image encoder are read alone.

    ``weights`` holds PEFT's parameters under their names in the frozen models, a point written as a slash.
    """

    backbones: ClassVar[tuple[str, ...]] = ("text", "image")

    def __init__(self, config: InjectedConfig):
        super().__init__()
        self.config = config
        self.backbones = ("text",) if config.where == "text" else ("text", "image")
        self.weights = nn.ParameterDict()
        self._layers: dict[str, list[int]] = {}
        self._depth: dict[str, int] = {}
        self._image: Layers | None = None
        self._peft: dict[str, Any] = {}

    def peft_config(self, names: list[str], model: nn.Module) -> Any:
        """PEFT's own configuration for the projections ``names`` of ``model``."""
        raise NotImplementedError

    def peft_files(self, tensors: Mapping[str, Tensor], base: str) -> export_format.PeftFiles | None:
        if self.config.where != "text":  # PEFT would load the text model's half and say nothing of the other
            return None
        return saved_config(self._peft["text"], base), {peft_name(name): tensor for name, tensor in tensors.items()}

    def first_layer(self, name: str) -> int:
        return min(self._layers.get(name, [self._depth[name]]))

    def image_width(self, feature: int) -> int:
        return feature if self._image is None else self._image.width

    def install(self, backbones: Mapping[str, PreTrainedModel]) -> None:
        self._depth = {name: len(layouts.layers_of(model)) for name, model in backbones.items()}
        self._image = Layers.of(backbones["image"]) if "image" in self.backbones else None
        new: dict[str, nn.Parameter] = {}
        for name in SIDES[self.config.where]:
            self._layers[name] = select_layers(self.config.layers, self._depth[name])
            new |= self._inject(name, backbones[name])
        if len(self.weights) and {n: p.shape for n, p in self.weights.items()} != {n: p.shape for n, p in new.items()}:
            raise ModelError(f"this {self.method} was made for a model of other widths or depth: make a new one")
        for key, parameter in new.items():
            if key in self.weights:
                put(backbones, key, self.weights[key])
            else:
                self.weights[key] = parameter

    def _inject(self, side: str, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        found = list(projections(model, self.config.targets, self._layers[side]))
        whole = {id(module): name for name, module in model.named_modules()}
        names = []
        for owner, attribute, module in found:
            if not isinstance(module, nn.Linear | Conv1D):
                raise ModelError(
                    f"{self.method} needs float projections, and the {side} model's are {type(module).__name__}:"
                    " set model.quantize=none"
                )
            names.append(whole[id(module)])
            self.undo(setattr, owner, attribute, module)
        before, self._peft[side] = {id(p) for p in model.parameters()}, self.peft_config(names, model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of what is meant here: no PeftModel around the model
            library().inject_adapter_in_model(self._peft[side], model)
        added = {n: p for n, p in model.named_parameters() if id(p) not in before}
        for parameter in added.values():  # PEFT makes them in the projection's type, where small updates would be lost
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        return {f"{side}/{name.replace('.', '/')}": parameter for name, parameter in added.items()}

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

    def encode(self, words: TextBatch | None, picture: ModalityInputs | None) -> Outputs:
        found = super().encode(words, picture)
        if picture is None or self._image is None:
            return found
        return Outputs(found.text, found.mask, self._image.encode_image(picture)[1])

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

    method: ClassVar[str] = "lora"

    def peft_config(self, names: list[str], model: nn.Module) -> Any:
        config = self.config
        options = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
        return library().LoraConfig(target_modules=names, **options)


class IA3(Injected):
    """IA³ on keys, values and the feed-forward's last projection."""

    method: ClassVar[str] = "ia3"

    def peft_config(self, names: list[str], model: nn.Module) -> Any:
        feed_forward = [name for name in names if kind_of(within_layer(name)) == "mlp"]
        last = last_of_each_layer(model, feed_forward)
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

    wraps_text_model: ClassVar[bool] = True

    def __init__(self, config: VirtualConfig):
        super().__init__()
        self.config = config
        self.prompt_encoder: nn.Module | None = None
        self._peft: Any = None

    def peft_config(self, model: PreTrainedModel) -> Any:
        """PEFT's own configuration for ``model``."""
        raise NotImplementedError

    def first_layer(self, name: str) -> int:
        return 0

    def install(self, backbones: Mapping[str, PreTrainedModel]) -> None:
        base = backbones["text"].base_model
        check_room(base, self.config.tokens, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = library().get_peft_model(base, self.peft_config(base))
        made, self._peft = wrapped.prompt_encoder["default"], wrapped.peft_config["default"]
        if self.prompt_encoder is None:
            self.prompt_encoder = made.to(next(base.parameters()).device)
        elif [p.shape for p in made.parameters()] != [p.shape for p in self.prompt_encoder.parameters()]:
            raise ModelError(f"this {self.method} was made for a model of other widths or depth: make a new one")
        wrapped.prompt_encoder["default"] = self.prompt_encoder
        object.__setattr__(self, "_wrapped", wrapped)
        self.undo(object.__setattr__, self, "_wrapped", None)

    def peft_files(self, tensors: Mapping[str, Tensor], base: str) -> export_format.PeftFiles | None:
        (vectors,) = tensors.values()
        return saved_config(self._peft, base), {"prompt_embeddings": vectors}

    def encode(self, words: TextBatch | None, picture: ModalityInputs | None) -> Outputs:
        text = None
        if words is not None:
            check_room(self._wrapped.get_base_model(), self.config.tokens, words.ids.shape[1])
            options = {"attention_mask": words.mask, "use_cache": self.method == "prefix"}
            hidden = self._wrapped(input_ids=words.ids, **options).last_hidden_state
            text = hidden[:, -words.ids.shape[1] :]
        return Outputs(text, words and words.mask, picture and picture.feature)


class Prompt(Virtual):
    """Prompt tuning."""

    method: ClassVar[str] = "prompt"

    def peft_config(self, model: PreTrainedModel) -> Any:
        return library().PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=self.config.tokens)


class Prefix(Virtual):
    """Prefix tuning."""

    method: ClassVar[str] = "prefix"

    def peft_config(self, model: PreTrainedModel) -> Any:
        if not Layers.of(model).causal:
            raise ModelError(
                "prefix tuning needs a cache of keys, which an encoder does not have: take adapter.name=prompt"
            )
        return library().PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=self.config.tokens)


def check_room(model: PreTrainedModel, virtual: int, tokens: int) -> None:
    """ModelError where ``virtual`` vectors and a text of ``tokens`` tokens are more than the model has positions for."""
    limit = loading.positions(model)
    if limit and virtual + tokens > limit:
        raise ModelError(
            f"{virtual} vectors before a text of {tokens} tokens exceed the {limit} positions of {type(model).__name__}:"
            " lower adapter.tokens or task.max_tokens"
        )


def put(backbones: Mapping[str, nn.Module], key: str, parameter: nn.Parameter) -> None:
    """Put ``parameter`` at its place in the backbones, in place of PEFT's new one."""
    side, *path = key.split("/")
    *owner, name = path
    setattr(backbones[side].get_submodule(".".join(owner)), name, parameter)


def saved_config(config: Any, base: str) -> dict[str, Any]:
    """What PEFT writes of ``config`` for an adapter that was trained on the model ``base``."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        values = json.loads((Path(folder) / "adapter_config.json").read_text())
    return {**values, "base_model_name_or_path": base}


def peft_name(name: str) -> str:
    """Under which name PEFT saves a parameter that `Injected` holds as ``weights.SIDE/PATH/IN/MODEL``."""
    path = name.partition("/")[2].replace("/", ".")
    return f"base_model.model.{re.sub(r'[.]default(?=$|[.]weight$|[.]bias$)', '', path)}"


def within_layer(name: str) -> str:
    """The path inside its layer of a module of a model: what follows the layer's number."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), -1)
    return ".".join(parts[number + 1 :])


def last_of_each_layer(model: nn.Module, names: list[str]) -> set[str]:
    """Of feed-forward projections the one that gives the hidden width back, per layer."""
    width = model.config.get_text_config().hidden_size
    widths = {
        name: module.nf if isinstance(module, Conv1D) else module.out_features
        for name in names
        for module in [model.get_submodule(name)]
    }
    return {name for name, out in widths.items() if out == width}
