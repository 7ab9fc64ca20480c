"""Frozen image encoders: a global feature for the infusion, patch tokens of several levels for a decoder.

Any Hugging Face vision model with the usual interface works; CLIP gives its projected pooled feature, DINOv2 its CLS
token, others their pooled output. Shapes: B images, S side in pixels, N patches, e feature width, c channel width.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoModel, CLIPVisionModelWithProjection, PretrainedConfig

from mitrain.core.config import read_file
from mitrain.core.errors import ConfigError, ModelError
from mitrain.models import blip, frozen, layouts, loading, stream
from mitrain.models.encoders.base import Encoder, load
from mitrain.models.encoders.config import EncoderConfig
from mitrain.models.shapes import LARGEST, SMALLEST

log = logging.getLogger(__name__)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
FAMILIES = {"clip": CLIP, "blip": CLIP, "siglip": HALF, "dinov2": IMAGENET, "deit": IMAGENET}
FAMILIES |= {"videomae": IMAGENET, "vivit": ((0.75,) * 3, (0.25,) * 3)}
"""Mean and standard deviation of all published checkpoints of a family, by how its model type begins."""
POOLING = ("pooler", "head", "visual_projection")
VIEWS = 6
LONGEST = 4096  # side of the largest picture made on the way to the encoder's, whose own is at most as large
UNFIT = re.compile(r"Kernel size can't be greater|is invalid for input of size|must match the size of tensor")
PATCHES = 1 << 14
"""The most patches of a picture: attention over more takes minutes for one."""
View = int
Channels = tuple[float, float, float]


class ImageConfig(EncoderConfig):
    """One frozen image encoder."""

    takes: Literal["image"] = "image"
    size: int | None = Field(None, ge=14, le=LONGEST)
    pool: Literal["auto", "cls", "mean", "cls+mean"] = "auto"
    levels: tuple[int, ...] = ()
    infused: bool = True
    resize: Literal["squash", "pad"] = "squash"


@dataclass(frozen=True)
class Preprocess:
    """RGB image → (3, S, S) float32, normalised per channel. However long and thin it is, at most 4096² pixels are made."""

    size: int
    mean: Channels
    std: Channels
    resize: str

    def __call__(self, image: Image.Image, view: View = 0) -> Tensor:
        if image.height * self.size > LONGEST**2:  # PIL scales the width of all rows first
            image = bounded(image, LONGEST)
        image = augment(image, view)
        if self.resize == "pad":
            image = pad_square(image)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels = np.asarray(image, dtype=np.float32) / 255.0
        pixels = (pixels - np.float32(self.mean)) / np.float32(self.std)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32))


def pad_square(image: Image.Image, scale: float = 1.0) -> Image.Image:
    """``image`` centred on a white square whose side is its longer side divided by ``scale``."""
    image = bounded(image, LONGEST * scale)
    side = round(max(image.size) / scale)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def bounded(image: Image.Image, longest: float) -> Image.Image:
    """``image`` with its longer side at most ``longest``: what is made of it then takes memory of that side's square."""
    share = longest / max(image.size)
    if share >= 1:
        return image
    return image.resize([max(1, round(side * share)) for side in image.size], Image.Resampling.BICUBIC)


def augment(image: Image.Image, view: View) -> Image.Image:
    """The ``view``-th deterministic variant: 0 as it is, odd ones mirrored, 2-3 smaller, 4-5 cropped by an eighth."""
    if view % 2:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if view // 2 == 1:
        image = pad_square(image, 0.75)
    if view // 2 == 2:
        w, h = image.size
        image = image.crop((w // 12, h // 12, w - w // 12, h - h // 12))
    return image


class ImageEncoder(Encoder):
    """See `Encoder`. ``level_width``: c of the patch tokens. ``grid``: patches per side."""

    views, enters = VIEWS, True

    def _make(self, settings: Any, source: str | Path, *where: Any) -> None:
        if blip.is_blip(settings):
            self.model = blip_encoder(settings if self.config.shape else None, source, *where)
            loading.freeze(self.model)
        else:
            factory = CLIPVisionModelWithProjection if self.family in ("clip", "clip_vision_model") else AutoModel
            self.model = load(self.config, source, factory, seeing_part(settings, self.config.name), self._reads, *where)
        self.settings = getattr(self.model.config, "vision_config", self.model.config)
        self.preprocess = preprocessing(self.config, self.settings, source, self.family)
        self._check_levels()

    def _reads(self, name: str) -> bool:
        """Whether a tensor of the encoder counts: what pools its tokens does where it makes the global feature."""
        pools = self.config.pool == "auto" and self.config.layer is None
        return pools or not set(POOLING) & set(name.split("."))

    def _check_levels(self) -> None:
        if (channels := getattr(self.settings, "num_channels", 3)) != 3:
            raise ConfigError(f"the encoder {self.config.name!r} takes pictures of {channels} channels, not of three")
        depth, layer = self.depth, self.config.layer
        wanted = [*self.config.levels, *([layer] if layer else [])]
        if self.config.levels and depth == 0:
            raise ConfigError(f"the encoder {self.config.name!r} has no transformer layers: leave out levels")
        if layer and depth == 0 and not self._channels:
            raise ConfigError(
                f"the feature maps of {self.config.name!r}, a {self.family} model, are not known: leave out layer"
            )
        most = depth or len(self._channels)
        for level in wanted:
            if not 1 <= level <= most:
                raise ConfigError(
                    f"the encoder {self.config.name!r} has {most} layers, not a layer {level}: give one of 1..{most}"
                )
        if self.config.pool != "auto" and depth == 0:
            raise ConfigError(f"the encoder {self.config.name!r} has no CLS token: leave out pool")
        reads_cls = self.config.pool.startswith("cls") or (self.config.pool == "auto" and self.config.layer is not None)
        if depth and not self.prefix_tokens and reads_cls:
            raise ConfigError(f"the encoder {self.config.name!r} has no CLS token: give pool=mean")
        if wanted and max(wanted) < depth and self.config.pool != "auto":
            del layouts.layers_of(self.model)[max(wanted) :]
            self.settings.num_hidden_layers = max(wanted)
        if layer and (cut := getattr(self.model, "cut", None)):  # EfficientNet-lite's blocks above it do not run
            cut(layer)

    @cached_property
    def _channels(self) -> list[int]:
        """Channels of a convolutional encoder's feature maps, after each block or, as a ResNet's, each stage."""
        return [] if self.depth else list(getattr(self.settings, "hidden_sizes", []))

    @property
    def depth(self) -> int:
        return getattr(self.settings, "num_hidden_layers", 0)

    @property
    def level_width(self) -> int:
        return self.settings.hidden_size

    @property
    def grid(self) -> int:
        return self.preprocess.size // self.settings.patch_size

    @cached_property
    def tokens(self) -> int:
        if not self.feature_map:
            return self.prefix_tokens + self.grid**2
        size, weight = self.preprocess.size, next(self.model.parameters())
        return self._map(weight.new_zeros(1, 3, size, size)).shape[1]

    @property
    def feature_map(self) -> bool:
        return bool(self._channels) and (self.config.layer is None or hasattr(self.model, "cut"))

    @torch.no_grad()
    def _map(self, pixels: Tensor) -> Tensor:
        """(B, h·w, c): the places of a convolutional encoder's last feature map, row by row."""
        found = self.model(pixel_values=pixels).last_hidden_state
        if found.ndim != 4:
            raise ModelError(f"the image encoder {self.config.name!r} has no feature map to read as tokens: take another")
        return found.flatten(2).transpose(1, 2)

    @property
    def patch(self) -> int:
        return self.settings.patch_size

    @cached_property
    def prefix_tokens(self) -> int:
        """CLS, distillation (DeiT) and register tokens before the patches; SigLIP has none."""
        names = {name.rpartition(".")[2] for name, _ in self.model.named_parameters()}
        single = [name for name in (*layouts.CLASS_TOKENS, "distillation_token") if name in names]
        return len(single) + getattr(self.settings, "num_register_tokens", 0)

    @property
    def width(self) -> int:
        """e of the global feature."""
        if self._channels and self.config.layer:
            return self._channels[self.config.layer - 1]
        if self.config.pool == "auto":
            names = (*["projection_dim"] * self.family.startswith("clip"), "pooled_dim", "hidden_size", "hidden_dim")
            if width := next(filter(None, (getattr(self.settings, name, None) for name in names)), None):
                return width
            if stages := getattr(self.settings, "hidden_sizes", None):  # as ResNet's
                return stages[-1]
            raise ConfigError(
                f"the feature width of {self.config.name!r}, a {self.family} model, is not known: take another"
            )
        return self.settings.hidden_size * (2 if self.config.pool == "cls+mean" else 1)

    def blank(self) -> Image.Image:
        """A picture that says nothing, where some file must be encoded."""
        return Image.new("RGB", (8, 8))

    def identity(self) -> dict[str, Any]:
        """What the features depend on: the caches' address. The weights are those at the first call."""
        return {
            "weights": self._digest,
            "preprocess": [self.preprocess.size, self.preprocess.mean, self.preprocess.std, self.preprocess.resize],
            "layer": self.config.layer,
            "pool": self.config.pool,
            "levels": list(self.config.levels),
            "dtype": str(next(self.model.parameters()).dtype),
        }

    def _preprocessing(self) -> Any:
        return [self.preprocess.size, self.preprocess.mean, self.preprocess.std]

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image | Tensor], views: Sequence[View] | None = None) -> dict[str, Tensor]:
        """``pooled`` (B, e) float32 and, where levels are asked for, ``levels`` (B, levels, prefix + N, c) float32.

        ``views``: the variant of each image (0, as it is, where none are given). Tensors are preprocessed already.
        """
        pixels = self._batch(self._items(images, views))
        wanted = {"output_hidden_states": True} if self.depth or self.config.layer else {}
        try:
            output = self.model(pixel_values=pixels, **wanted)
        except RuntimeError as error:
            if not UNFIT.search(str(error)):  # memory, or a rank that ended
                raise
            reason = " ".join(str(error).split())
            raise ModelError(
                f"the image encoder {self.config.name!r} cannot take pictures of {self.preprocess.size} × "
                f"{self.preprocess.size} ({reason}): give another size"
            ) from None
        features = {"pooled": self._global(output).float().cpu()}
        if (given := features["pooled"].shape[1]) != self.width:
            raise ModelError(
                f"the image encoder {self.config.name!r} gives {given} numbers there, not {self.width}: leave out layer"
            )
        if self.config.levels:
            levels = [output.hidden_states[level] for level in self.config.levels]
            features["levels"] = torch.stack(levels, dim=1).float().cpu()
        return features

    @torch.no_grad()
    def entering(self, depth: int, images: Sequence[Image.Image | Tensor], views: Sequence[View] | None = None) -> Tensor:
        """(B, prefix + N, c): what enters layer ``depth``; (B, h·w, c) of a `feature_map`."""
        if self.feature_map:
            return self._map(self._batch(self._items(images, views)))
        return frozen.trunk_states(self.model, depth, pixel_values=self._batch(self._items(images, views)))

    def _global(self, output: Any) -> Tensor:
        if self.config.pool == "auto":
            for name in ("image_embeds", "pooler_output"):
                if self.config.layer is None and getattr(output, name, None) is not None:
                    return getattr(output, name).flatten(1)
        states = output.hidden_states[self.config.layer] if self.config.layer else output.last_hidden_state
        if self._channels:
            return states.mean((2, 3))
        patches = states[:, -(self.grid**2) :].mean(1)
        if self.config.pool == "auto" and not self.prefix_tokens:
            raise ConfigError(f"the encoder {self.config.name!r} pools nothing and has no CLS token: give pool=mean")
        parts = {"mean": [patches], "cls+mean": [states[:, 0], patches]}.get(self.config.pool, [states[:, 0]])
        return torch.cat(parts, dim=-1)


def seeing_part(config: PretrainedConfig, name: str) -> PretrainedConfig:
    """The configuration of the image encoder in a model of texts and pictures; ConfigError where it is not known alone."""
    if not hasattr(config, "vision_config"):
        return config
    if config.model_type not in ("clip", "siglip"):
        raise ConfigError(
            f"{name!r} in model.encoders holds more than an image encoder ({config.model_type}): give its encoder alone,"
            " or a CLIP, SigLIP or BLIP checkpoint"
        )
    return config.vision_config


def blip_encoder(
    shape: PretrainedConfig | None,
    source: str | Path,
    dtype: torch.dtype,
    device: torch.device | str,
    shard: stream.Shard | None,
) -> nn.Module:
    if shape is not None:
        return blip.empty(shape, "vision_model")
    if shard is not None:
        raise ConfigError("BLIP's encoders are held whole: set zero.stage=0")
    return blip.load(source, "vision_model", dtype).to(device)


def preprocessing(config: ImageConfig, settings: Any, source: str | Path, kind: str) -> Preprocess:
    """As the model's image processor was saved, else with its family's constants; in the setting's size or the model's."""
    mean, std = normalisation(config, source, kind)
    usual = getattr(settings, "image_size", 224)
    size = config.size or int(usual[0] if isinstance(usual, list | tuple) else usual)
    patch = getattr(settings, "patch_size", None)
    if isinstance(patch, int) and size % patch:
        raise ConfigError(
            f"{config.name!r} in model.encoders: size={size} is no multiple of its patch {patch}: give"
            f" {size // patch * patch}"
        )
    if isinstance(patch, int) and (size // patch) ** 2 > PATCHES:
        raise ConfigError(
            f"{config.name!r} in model.encoders: size={size} makes {(size // patch) ** 2} patches of a picture, more than"
            f" {PATCHES}: give at most {int(PATCHES**0.5) * patch}"
        )
    return Preprocess(size, mean, std, config.resize)


def normalisation(config: ImageConfig, source: str | Path, kind: str) -> tuple[Channels, Channels]:
    """Mean and standard deviation of each channel, of pixels from 0 to 1."""
    path, values = written(source)
    if values.get("do_normalize") is False:
        values = values | {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    family = next((constants for name, constants in FAMILIES.items() if kind.startswith(name)), None)
    if not family and not config.shape and not {"image_mean", "image_std"} <= values.keys():
        log.warning(
            "the image encoder %r has no preprocessor_config.json: its pictures are normalised with ImageNet's mean and"
            " standard deviation; put the file there if it was trained with others",
            config.name,
        )
    try:
        mean, std = (
            tuple(float(x) for x in values.get(key, usual))
            for key, usual in zip(("image_mean", "image_std"), family or IMAGENET, strict=True)
        )
        scale = float(values.get("rescale_factor", 1 / 255))
    except (TypeError, ValueError):
        raise ModelError(f"{path} is malformed: image_mean and image_std must be three numbers each") from None
    if values.get("offset") and abs(scale * 127.5 - 1) <= 1e-3:  # ViViT's pixels are from -1 to 1 before they are normalised
        mean, std, scale = tuple((1 + m) / 2 for m in mean), tuple(s / 2 for s in std), 1 / 255
    sane = all(SMALLEST <= s <= LARGEST for s in std) and all(-LARGEST <= m <= LARGEST for m in mean)
    if len(mean) != 3 or len(std) != 3 or not sane:
        raise ModelError(
            f"{path} is malformed: image_mean and image_std must be three numbers each, std {SMALLEST} to {LARGEST:g}"
        )
    if values.get("do_rescale") is False or abs(scale * 255 - 1) > 1e-3:
        raise ModelError(f"{path} does not scale pixels to 0 … 1 (rescale_factor 1/255), which is all that is supported")
    return mean, std


def written(source: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file that an encoder's image processor was saved in, alone or as a part of a processor, and what it says."""
    for name, part in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if path := loading.find(source, name):
            values = read_file(path)
            values = values if part is None else values.get(part)
            if isinstance(values, dict):
                return path, values
    return Path(source), {}
