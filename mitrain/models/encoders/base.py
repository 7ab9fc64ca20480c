"""What frozen encoders of every kind of input have in common.

Shapes: B samples, T steps of time, D hidden width, e feature width.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from mitrain.core import dist
from mitrain.core.errors import ConfigError, ModelError
from mitrain.models import efficientnet_lite, layouts, loading, stream
from mitrain.models.digests import frozen_digest, settings_of, weights_of
from mitrain.models.encoders.config import EncoderConfig

log = logging.getLogger(__name__)
Pool = Literal["auto", "mean", "mean+std"]
Made = TypeVar("Made")
Entering = tuple[Tensor, int]
"""The states (T, D) that enter a layer, and how many of them, the first, are read out: the others see and are seen."""


class Encoder(nn.Module):
    """A frozen encoder: files' content in, one vector for each out.

    ``width``: e. ``depth``: its layers. ``family``: its model type. ``settings``: its configuration. ``model``: its modules.
    ``views``: how many variants of a sample differ. ``enters``: it has `entering`, and ``tokens`` is the most states of a
    sample. A kind implements ``_make``, ``preprocess`` (of what was decoded, in
    any thread), ``_pooled`` and ``_preprocessing``.
    """

    views, enters = 1, False
    feature_map = False
    """Whether it has no layers but a feature map, whose places are read as tokens: `entering` layer 0 gives them."""
    config: Any
    model: nn.Module
    settings: Any
    family: str
    source: str | Path | None
    width: int
    depth: int
    tokens: int
    _settings: dict[str, Any]

    def __init__(
        self,
        config: EncoderConfig,
        folder: str | Path | None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        shard: stream.Shard | None = None,
    ):
        super().__init__()
        efficientnet_lite.register()
        self.config, source = config, folder or config.name
        self.source = None if config.shape else source
        settings = read_settings(config, source)
        self.family, self._settings = settings.model_type, settings_of(settings, self.source)
        self._make(settings, source, dtype, device, shard)

    def _make(self, settings: Any, source: str | Path, *where: Any) -> None:
        """Take over the model at ``source``, whose configuration is ``settings``; ``where``: dtype, device and shard."""
        raise NotImplementedError

    def preprocess(self, decoded: Any, view: int = 0) -> Tensor:
        raise NotImplementedError

    @property
    def reads(self) -> dict[str, Any]:
        """What the reader of its kind of files is told, by name."""
        return {}

    def blank(self) -> Tensor:
        """Some preprocessed sample, where one must be encoded."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, samples: Sequence[Any], views: Sequence[int] | None = None) -> dict[str, Tensor]:
        """``pooled`` (B, e) float32: each is what it would be alone.

        ``views``: the variant of each of the ``samples`` (0 where none are given); tensors are preprocessed already. Where
        weights lie in shards all ranks call it equally often, and it sees to it that they run the model equally often.
        """
        rows = torch.zeros(len(samples), self.width)
        for members, pooled in self._by_size(samples, views, self._pooled):
            rows[members] = pooled.float().cpu()
        return {"pooled": rows}

    @torch.no_grad()
    def entering(self, depth: int, samples: Sequence[Any], views: Sequence[int] | None = None) -> list[Entering]:
        """What enters layer ``depth`` of each sample, as it would be alone. Weights in shards: as for `encode`."""
        states: dict[int, Entering] = {}
        for members, entering in self._by_size(samples, views, partial(self._entering, depth)):
            states |= zip(members, entering, strict=True)
        return [states[i] for i in range(len(samples))]

    def _by_size(
        self, samples: Sequence[Any], views: Sequence[int] | None, run: Callable[[Sequence[Tensor]], Made]
    ) -> Iterator[tuple[list[int], Made]]:
        """What ``run`` makes of the samples that run together, with their places."""
        items = self._items(samples, views)
        groups = self._groups(items)
        for members, own in dist.lockstep(groups) if loading.holds_shards(self) else ((g, True) for g in groups):
            made = run([items[i] for i in members])
            if own:
                yield members, made

    def _items(self, samples: Sequence[Any], views: Sequence[int] | None) -> list[Tensor]:
        """The samples preprocessed, where they are not."""
        views = views or [0] * len(samples)
        return [s if isinstance(s, Tensor) else self.preprocess(s, v) for s, v in zip(samples, views, strict=True)]

    def _groups(self, items: Sequence[Tensor]) -> list[list[int]]:
        """Which samples run together: those of one shape, so that nothing is padded for another's sake."""
        groups: dict[Any, list[int]] = {}
        for i, item in enumerate(items):
            groups.setdefault(self._size(item), []).append(i)
        return list(groups.values())

    def _size(self, item: Tensor) -> Any:
        return tuple(item.shape)

    def _pooled(self, items: Sequence[Tensor]) -> Tensor:
        """(B, e) of samples of one `_size`."""
        raise NotImplementedError

    def _entering(self, depth: int, items: Sequence[Tensor]) -> Sequence[Entering]:
        """`entering` of samples of one `_size`, where the kind's layers can be changed (``enters``)."""
        raise NotImplementedError

    def _preprocessing(self) -> Any:
        """What, in plain JSON types, decides what ``preprocess`` makes."""
        raise NotImplementedError

    @cached_property
    def _digest(self) -> str:
        return frozen_digest(self.model)

    def identity(self) -> dict[str, Any]:
        """What the features depend on: the caches' address. The weights are those at the first call."""
        return {
            "takes": self.config.takes,
            "weights": self._digest,
            "preprocess": self._preprocessing(),
            "layer": self.config.layer,
            "pool": self.config.pool,
            "dtype": str(next(self.model.parameters()).dtype),
        }

    def base(self) -> dict[str, Any]:
        """What decides what the encoder computes, its preprocessing included, whatever its precision."""
        weights = weights_of(self.source, self.model)
        return {"weights": weights, **self._settings, "preprocess": self._preprocessing()}

    def _batch(self, items: Sequence[Tensor]) -> Tensor:
        weight = next(self.model.parameters())
        return torch.stack(list(items)).to(weight.device, weight.dtype)


def read_settings(config: EncoderConfig, source: str | Path) -> PretrainedConfig:
    """The configuration of an encoder's checkpoint, or its ``shape``."""
    if config.shape:
        return loading.config_from_shape(config.shape, f"the shape of {config.label}")
    found = loading.read_config(source, f"{config.takes} encoder")
    if getattr(found, "quantization_config", None):
        raise ModelError(f"{config.label} is quantised: give its weights in floats")
    return found


def load(
    config: EncoderConfig,
    source: str | Path,
    factory: Any,
    settings: PretrainedConfig,
    used: Callable[[str], bool],
    dtype: torch.dtype,
    device: torch.device | str,
    shard: stream.Shard | None,
) -> nn.Module:
    """The frozen model, without weights where ``config`` gives a shape; in shards, layer by layer as rank 0 reads them,
    where its names allow that."""
    what = f"{config.takes} encoder"
    if config.shape:
        model = empty_vision(factory, settings)
        loading.freeze(model)
        return model
    if shard and (weights := stream.Weights.of(source)):
        model = empty_vision(factory, settings).to(dtype)
        loading.freeze(model)
        if stream.fits(model, weights):
            loading.tell_unplaced(stream.unplaced(model, weights), source, what)
            stream.fill(model, weights, device, lambda name, unit: shard(unit), reads=dist.is_main())
            return model
    model = loading.load_model(factory, source, what, used, config=settings, dtype=dtype).to(device)
    loading.freeze(model)
    for _, unit in stream.units(model) if shard else ():
        shard(unit)
    return model


def empty_vision(factory: Any, config: Any) -> nn.Module:
    if isinstance(factory, type) and issubclass(factory, nn.Module):
        with torch.device("meta"), loading.quiet():
            return factory(config)
    return loading.empty_model(factory, config)


def cut_to_layer(model: nn.Module, config: EncoderConfig, depth: int) -> None:
    """Leave out the layers above ``config.layer``; ConfigError where there is no such layer."""
    if config.layer is None:
        return
    if not 1 <= config.layer <= depth:
        more = f"has {depth} layers, not a layer {config.layer}: give one of 1..{depth}" if depth else ""
        raise ConfigError(f"{config.label} {more or 'has no layers that can be read: leave out layer'}")
    del layouts.layers_of(model)[config.layer :]
    model.config.num_hidden_layers = config.layer


@contextmanager
def top_layer(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, what leaves the topmost layer, before any norm that follows it, is appended to the list."""
    seen: list[Tensor] = []
    keep = lambda _, inputs, out: seen.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
    hook = layouts.layers_of(model)[-1].register_forward_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()


def over_time(states: Tensor, steps: Sequence[int], pool: str) -> Tensor:
    """(B, D), or (B, 2 D) with the standard deviation behind the mean: of the first ``steps`` of ``states`` (B, T, D)."""
    states, count = states.float(), torch.tensor(steps, device=states.device)
    shown = (torch.arange(states.shape[1], device=states.device) < count[:, None])[..., None]
    mean = (states * shown).sum(1) / count[:, None]
    if pool != "mean+std":
        return mean
    variance = ((states - mean[:, None]).square() * shown).sum(1) / count[:, None]
    return torch.cat([mean, variance.sqrt()], dim=-1)
