"""A run's model, assembled: frozen backbones + adapter + task head, and the frozen features they feed on.

Only three things in it are ever trained or saved: the adapter's tensors, the task head's, and the feature statistics.
"""

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mitrain import methods
from mitrain.core import prepared
from mitrain.core.errors import ConfigError, DataError
from mitrain.core.files import cache_home
from mitrain.data.features import FeatureNorm, ImageFeatures
from mitrain.data.hidden_states import PictureStates, TextStates
from mitrain.data.images import BadSamples
from mitrain.data.loader import Draw
from mitrain.methods.base import Adapter
from mitrain.models import ModelConfig, Shard, TextBackbone, VisionEncoder, loading
from mitrain.models.batch import ModalityInputs
from mitrain.tasks import TASKS
from mitrain.tasks.base import Batch, Given, Parts, Task
from mitrain.training.fingerprint import digest
from mitrain.training.schema import RunConfig


def resolve_model(name: str) -> str | Path:
    """A prepared model's folder (prepared on first use); a local folder or Hugging Face id as it is."""
    if name in prepared.recipes("models") and not Path(name).exists():
        return prepared.ensure_model(name)
    return name


def resolve_data(data: Any) -> Path:
    """The folder of a prepared data set (prepared on first use), or the user's own."""
    if data.source is not None:
        return prepared.ensure_data(data.source, seed=data.source_seed)
    return Path(data.root).expanduser()


def resolved(config: RunConfig) -> RunConfig:
    """The configuration with what follows from this machine written out: where its folders are, and the classes of a
    classification."""
    data = config.data.model_copy(update={"root": absolute_if_there(config.data.root)} if config.data.root else {})
    vision = tuple(part.model_copy(update={"name": absolute_if_there(part.name)}) for part in config.model.vision)
    model = config.model.model_copy(update={"llm": absolute_if_there(config.model.llm), "vision": vision})
    data = data.with_class_names(lambda: resolve_data(data))
    return config.model_copy(update={"data": data, "model": model})


def absolute_if_there(name: str) -> str:
    """The absolute path of a folder that is there; any other name, as a prepared model's, as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if os.path.exists(path) else name


@dataclass
class Model:
    """The assembled parts. ``trainable`` holds what is trained and saved: adapter, head, feature statistics.

    ``pictures``: what enters the changed layers of the first encoder, for methods that change it. ``pretrained``: how many
    parameters the backbones have by themselves.
    """

    config: RunConfig
    text: TextBackbone
    encoders: list[VisionEncoder]
    adapter: Adapter
    norm: FeatureNorm
    task: Task
    states: TextStates
    pictures: PictureStates | None = None
    pretrained: int = 0

    def train(self, mode: bool = True) -> None:
        """Adapter and head in training mode, or not; what is frozen never is."""
        self.task.train(mode)
        self.adapter.train(mode)

    @property
    def trainable(self) -> dict[str, nn.Module]:
        return {"adapter": self.adapter, "head": self.task, "features": self.norm}

    @property
    def frozen(self) -> dict[str, nn.Module]:
        return {"text": self.text.model, **{f"encoder{i}": e for i, e in enumerate(self.encoders)}}

    @cached_property
    def base(self) -> dict[str, str]:
        """Digests of the frozen models by name (text.weights, encoder0.settings, …), for `mitrain.training.fingerprint`.

        They are of what was loaded, whatever its precision, and stay the same when a method changes the weights.
        """
        named = {"text": self.text.base(), **{f"encoder{i}": e.base() for i, e in enumerate(self.encoders)}}
        return {key: value for name, parts in named.items() for key, value in named_digests(name, parts).items()}

    def texts(self, samples: Sequence[Any], every_candidate: bool) -> list[list[int]]:
        """`Task.texts`; where a text cannot be read, the error names its sample."""
        try:
            return self.task.texts(samples, every_candidate)
        except DataError:
            for sample in samples:
                try:
                    self.task.texts([sample], every_candidate)
                except DataError as error:
                    raise DataError(f"sample {sample.id!r}: {error}") from None
            raise

    def images(self, root: Path, bad: BadSamples | None = None, cached: bool = True) -> ImageFeatures:
        """The encoders' view of the image files under ``root``."""
        cache = cache_root(self.config) if cached else None
        also = [self.pictures] if self.pictures else []
        return ImageFeatures(self.encoders, root, cache, self.config.data.max_pixels, bad, self.adapter.disabled, also)

    def training_batch(self, draws: Sequence[Draw], images: ImageFeatures, share: slice = slice(None)) -> Batch:
        """Drawn samples, each with one of its image's views; noise comes from the draws' own generators.

        ``share``: the part of them that the batch holds, with the choices it would have in the whole.
        """
        config = self.config.features
        paths = [draw.sample.image for draw in draws]
        views = [draw.random.randrange(config.views) for draw in draws]
        features = self.norm(images.pooled(paths[share], views[share]))
        noise = torch.Generator().manual_seed(draws[0].random.getrandbits(62))
        whole = features.new_zeros(len(draws), features.shape[1])
        whole[share] = features
        features = self.norm.disturb(whole, noise)[share]
        samples = [draw.sample for draw in draws[share]]
        placed = self._placed(features)
        levels = self._levels(images, paths[share])
        inputs = ModalityInputs(placed, *self._states(images, paths[share], views[share]))
        return Batch(samples, inputs, levels)

    def evaluation_batch(
        self, samples: Sequence[Any], paths: Sequence[str], images: ImageFeatures, blind: bool = False
    ) -> Batch:
        """Samples with the images ``paths`` (their own, or a control's); ``blind`` leaves the infusion out.

        Features are the mean over ``features.eval_views``; states are those of the image as it is.
        """
        features = self._placed(self.norm(images.averaged(paths, self.config.features.eval_views)))
        inputs = ModalityInputs(features, *self._states(images, paths), infused=not blind)
        return Batch(samples, inputs, self._levels(images, paths))

    def _levels(self, images: ImageFeatures, paths: Sequence[str]) -> list[Tensor]:
        return [level.to(self.text.device) for level in images.levels(paths)] if self.task.decodes else []

    def _states(
        self, images: ImageFeatures, paths: Sequence[str], views: Sequence[int] | None = None
    ) -> tuple[Tensor | None, int]:
        if self.pictures is None:
            return None, 0
        return self._placed(self.pictures.batch(images, paths, views)), self.pictures.depth

    def _placed(self, features: Tensor) -> Tensor:
        return features.to(self.text.device, self.text.dtype)


def named_digests(name: str, parts: Mapping[str, Any]) -> dict[str, str]:
    """Digests of what decides what a frozen model computes, as NAME.PART."""
    return {f"{name}.{part}": digest([value]) for part, value in parts.items()}


def cache_root(config: RunConfig) -> Path | None:
    return cache_home() / "features" if config.cache else None


def encoders_of(config: ModelConfig, device: torch.device, shard: Shard | None = None) -> list[VisionEncoder]:
    """The frozen image encoders, on ``device``; those that a shape describes are without weights."""
    dtype = loading.DTYPES[config.dtype]
    return [VisionEncoder(v, None if v.shape else resolve_model(v.name), dtype, device, shard) for v in config.vision]


def build(
    config: RunConfig,
    *,
    empty: bool = False,
    shard: Shard | None = None,
    encoders: list[VisionEncoder] | None = None,
) -> Model:
    """Load the backbones, attach the adapter, make the head.

    ``empty`` builds everything without weights (meta device), for counting; models are then described by their shapes
    or their configurations alone. ``shard`` spreads the frozen weights over the ranks while they are read. ``encoders``:
    where they are loaded already.
    """
    if empty:
        shape = config.model.llm_shape
        described = (
            loading.config_from_shape(shape, "model.llm_shape")
            if shape
            else TextBackbone.read_config(resolve_model(config.model.llm))
        )
        text = TextBackbone.empty(described)
    elif config.model.llm_shape:
        raise ConfigError(
            f"model.llm_shape describes {config.model.llm!r} without weights, which serves --dry-run alone:"
            " set model.llm to a folder with the weights and model.llm_shape=null to train"
        )
    else:
        device = loading.device_of(config.model.device)
        text = TextBackbone.load(
            resolve_model(config.model.llm),
            loading.DTYPES[config.model.dtype],
            config.model.attention,
            device,
            config.model.quantize,
            config.model.quantize_embedding,
            shard,
        )
    encoders = encoders or encoders_of(config.model, torch.device("cpu") if empty else text.device, shard)
    return assemble(config, text, encoders, empty=empty)


def assemble(config: RunConfig, text: TextBackbone, encoders: list[VisionEncoder], *, empty: bool = False) -> Model:
    """Adapter, head and statistics on loaded backbones; their start values follow from ``config.seed``."""
    seed_everything(config.seed)
    width = sum(encoder.width for encoder in encoders)
    device = torch.device("meta") if empty else text.device
    pretrained = loading.count_parameters(nn.ModuleList([text.model, *encoders]))
    with torch.device(device):
        adapter = methods.build(config.adapter, modality_widths(config, encoders))
        backend = config.kernels.backend
        backbones = {"text": text.model}
        if "image" in adapter.traits.backbones:
            backbones["image"] = changeable(encoders, adapter)
            if not empty:
                encoders[0].identity()  # the pretrained weights', before anything is put into them
        adapter.attach(backbones, checkpoint=config.train.checkpoint_activations, backend=backend)
        cache = None if empty else cache_root(config)
        first = adapter.attachment.first_layers
        states = TextStates(text, first["text"], cache, adapter.traits.runs_layers, adapter.disabled)
        pictures = None
        if "image" in adapter.traits.backbones:
            pictures = PictureStates(encoders[0], first["image"], cache)
        given = Given(
            Parts(text, adapter, states), config.data, lambda: resolve_data(config.data), encoders, config.train.batch
        )
        task = TASKS[config.task.section_name].build(config.task, given)
    return Model(
        config, text, encoders, adapter, FeatureNorm(width, config.features), task, states, pictures, pretrained
    )


def modality_widths(config: RunConfig, encoders: Sequence[VisionEncoder]) -> dict[str, int]:
    """The modalities that the encoders make: one of all their features, or one of each where the adapter names as many."""
    names = tuple(getattr(config.adapter, "modalities", ()))
    if len(names) > 1 and len(names) == len(encoders):
        return {name: encoder.width for name, encoder in zip(names, encoders, strict=True)}
    return {"image": sum(encoder.width for encoder in encoders)}


def changeable(encoders: Sequence[VisionEncoder], adapter: Adapter) -> nn.Module:
    """The first image encoder's model, which a method changes."""
    if not encoders[0].depth:
        raise ConfigError(
            f"the method {adapter.traits.name!r} changes the image encoder's transformer layers, and"
            f" {encoders[0].config.name!r} has none: put another encoder first in model.vision, as dinov2-vits14"
        )
    return encoders[0].model


def seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
