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
from transformers import PretrainedConfig, PreTrainedModel

from mitrain import methods
from mitrain.core import hub, prepared, user_code
from mitrain.core.errors import ConfigError, DataError
from mitrain.core.files import cache_home
from mitrain.data.features import FeatureNorm, Features, Inputs
from mitrain.data.hidden_states import EncoderStates, TextStates
from mitrain.data.loader import Draw
from mitrain.data.media import Limits
from mitrain.data.samples import BadSamples
from mitrain.methods.base import Adapter, turn_takers
from mitrain.models import Encoder, ModelConfig, Shard, TextBackbone, encoder_of, loading
from mitrain.models.batch import ModalityInputs
from mitrain.models.digests import named_digests
from mitrain.models.encoders.text import pooling
from mitrain.models.release import below, release
from mitrain.models.stream import Unread, nothing
from mitrain.models.text import read_tokenizer
from mitrain.tasks import TASKS
from mitrain.tasks.base import Batch, Given, Parts, Task
from mitrain.tasks.language import chatting
from mitrain.training.schema import RunConfig

FEW = 8  # samples whose features are read at a time


def resolve_model(name: str) -> str | Path:
    """A prepared model's folder (prepared on first use); a local folder or Hugging Face id as it is."""
    if name in prepared.recipes("models") and not Path(name).exists():
        return prepared.ensure_model(name)
    return name


def resolve_data(data: Any) -> Path:
    """The folder of a prepared data set (prepared on first use), or the user's own."""
    if data.source is not None and data.source.startswith(hub.PREFIX):
        return hub.ensure(data.source)
    if data.source is not None:
        return prepared.ensure_data(data.source, seed=data.source_seed)
    return Path(data.root).expanduser()


def resolved(config: RunConfig) -> RunConfig:
    """The configuration with what follows from this machine written out: where its folders are, the classes of a
    classification, the model's chat template, and how its texts' vectors are made."""
    data = config.data.model_copy(update={"root": absolute_if_there(config.data.root)} if config.data.root else {})
    encoders = {
        name: part.model_copy(update={"name": absolute_if_there(part.name)}) for name, part in config.model.encoders.items()
    }
    model = config.model.model_copy(update={"llm": absolute_if_there(config.model.llm), "encoders": encoders})
    data = data.with_class_names(lambda: resolve_data(data))
    task = config.task
    if getattr(task, "chat", False):
        task = chatting(task, read_tokenizer(resolve_model(model.llm)), model.llm)
    start = absolute_if_there(config.train.init_from) if config.train.init_from else None
    train = config.train.model_copy(update={"init_from": start})
    adapter = config.adapter
    if hasattr(adapter, "with_pooling"):
        adapter = adapter.with_pooling(lambda: pooling(resolve_model(model.llm)))
    parts = {"data": data, "model": model, "adapter": adapter, "task": task, "train": train}
    return config.model_copy(update=parts)


def absolute_if_there(name: str) -> str:
    """The absolute path of a folder that is there; any other name, as a prepared model's, as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if os.path.exists(path) else name


@dataclass
class Model:
    """The assembled parts. ``trainable`` holds what is trained and saved: adapter, head, feature statistics.

    ``entering``: what enters the changed layers of the first encoder, for methods that change it. ``pretrained``: how many
    parameters the backbones have by themselves.
    """

    config: RunConfig
    text: TextBackbone
    encoders: dict[str, Encoder]
    adapter: Adapter
    norm: FeatureNorm
    task: Task
    states: TextStates
    entering: EncoderStates | None = None
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
        return {"text": self.text.model, **numbered(self.encoders)}

    def trained(self) -> list[nn.Parameter]:
        """What training changes, each once: also weights of a backbone, where the method trains those."""
        parts = [*self.trainable.values(), *self.frozen.values()]
        return list({id(p): p for part in parts for p in part.parameters() if p.requires_grad}.values())

    @cached_property
    def base(self) -> dict[str, str]:
        """Digests of the frozen models by name (text.weights, encoder0.settings, …), for `mitrain.training.fingerprint`.

        They are of what was loaded, whatever its precision, and stay the same when a method changes the weights.
        """
        named = {"text": self.text.base(), **{name: e.base() for name, e in numbered(self.encoders).items()}}
        return {key: value for name, parts in named.items() for key, value in named_digests(name, parts).items()}

    def unread(self, cached: bool) -> list[tuple[TextBackbone | Encoder, list[nn.Module]]]:
        """The modules whose frozen weights no step reads once the cache holds what they make of the samples, by backbone.

        ``cached``: it holds the states of texts, too.
        """
        text, unchanged = self.text, () if self.adapter.traits.changes_encoder else self.encoders.values()
        parts = [(text, below(text.model, self.states.depth, self.task.speaks))] if cached else []
        return [*parts, *((encoder, [*encoder.model.modules()]) for encoder in unchanged)]

    def release(self) -> None:
        """Let go of `unread` weights. What runs them all the same, as generation does, reads them again."""
        for backbone, modules in self.unread(self.states.cached):
            release(backbone.model, backbone.source, modules)

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

    def features(self, root: Path, bad: BadSamples | None = None, cached: bool = True) -> Features:
        """The encoders' view of samples whose files lie under ``root``."""
        cache, limits = cache_root(self.config) if cached else None, Limits(self.config.data.max_pixels)
        modalities = self.config.model.modalities
        disabled = self.adapter.disabled
        return Features(self.encoders, modalities, root, cache, limits, bad, disabled, self.entering)

    def training_batch(self, draws: Sequence[Draw], files: Features, share: slice = slice(None)) -> Batch:
        """Drawn samples, each with one view of its files; noise comes from the draws' own generators.

        ``share``: the part of them that the batch holds, with the choices it would have in the whole.
        """
        config = self.config.features
        views = [draw.random.randrange(config.views) for draw in draws]
        given = [self._dropped(draw) for draw in draws]
        pooled, present = files.pooled(given[share], views[share])
        features = self.norm(pooled)
        noise = torch.Generator().manual_seed(draws[0].random.getrandbits(62))
        whole = features.new_zeros(len(draws), features.shape[1])
        whole[share] = features
        features = self.norm.disturb(whole, noise)[share]
        samples = [draw.sample for draw in draws[share]]
        return self._batch(samples, given[share], files, features, present, views[share])

    def _dropped(self, draw: Draw) -> Inputs:
        """A drawn sample's inputs but those that ``train.modality_dropout`` takes; what masks are decoded from is left, and
        one at least."""
        rate, inputs = self.config.train.modality_dropout, draw.sample.inputs
        if not rate or len(inputs) < 2:
            return inputs
        seen = {e.config.input for e in self.encoders.values() if self.task.decodes and getattr(e.config, "levels", ())}
        kept = [name for name in inputs if draw.random.random() >= rate or name in seen]
        kept = kept or [draw.random.choice(list(inputs))]
        return {name: inputs[name] for name in kept}

    def evaluation_batch(
        self, samples: Sequence[Any], inputs: Sequence[Inputs], files: Features, blind: bool = False
    ) -> Batch:
        """Samples with the files ``inputs`` (their own, or a control's); ``blind`` leaves the infusion out.

        Features are the mean over ``features.eval_views``; states are those of the file as it is.
        """
        pooled, present = files.averaged(inputs, self.config.features.eval_views)
        return self._batch(samples, inputs, files, self.norm(pooled), present, None, not blind)

    def _batch(
        self,
        samples: Sequence[Any],
        inputs: Sequence[Inputs],
        files: Features,
        features: Tensor,
        present: Mapping[str, Tensor],
        views: Sequence[int] | None,
        infused: bool = True,
    ) -> Batch:
        """``features`` (B, E): normalised; those of a modality that a sample lacks become 0."""
        there = {name: mask.to(self.text.device) for name, mask in present.items()}
        split = self.norm.split(self._placed(features))
        split = {name: x * there[name][:, None] if name in there else x for name, x in split.items()}
        states, counts, depth, changed = None, None, 0, ""
        if self.entering is not None:
            states, counts = files.states(inputs, views)
            states, counts = self._placed(states), counts if counts is None else counts.to(self.text.device)
            depth, changed = self.entering.depth, next(iter(self.norm.widths))
        levels = [level.to(self.text.device) for level in files.levels(inputs)] if self.task.decodes else []
        given = ModalityInputs(split, there, states, depth, changed, infused, counts) if split else None  # a text alone
        return Batch(samples, given, levels)

    def normalised(self, samples: Sequence[Any], files: Features) -> Tensor:
        """(n, E): the samples' features side by side, as they are infused; 0 for a modality that one lacks."""
        starts = range(0, len(samples), FEW)
        rows = []
        for start in starts:
            pooled, present = files.pooled([s.inputs for s in samples[start : start + FEW]])
            parts = self.norm.split(self.norm(pooled))
            there = [x * present[m][:, None] if m in present else x for m, x in parts.items()]
            rows.append(torch.cat([pooled[:, :0], *there], 1))
        return torch.cat(rows)

    def _placed(self, features: Tensor) -> Tensor:
        return features.to(self.text.device, self.text.dtype)


def numbered(encoders: Mapping[str, Encoder]) -> dict[str, Encoder]:
    """The encoders as encoder0, encoder1, …: their names in checkpoints, whatever a configuration calls them."""
    return {f"encoder{i}": encoder for i, encoder in enumerate(encoders.values())}


def cache_root(config: RunConfig) -> Path | None:
    return cache_home() / "features" if config.cache else None


def encoders_of(config: ModelConfig, device: torch.device, shard: Shard | None = None) -> dict[str, Encoder]:
    """The frozen encoders, on ``device``; those that a shape describes are without weights."""
    dtype = loading.DTYPES[config.dtype]
    return {
        name: encoder_of(part, None if part.shape else resolve_model(part.name), dtype, device, shard)
        for name, part in config.encoders.items()
    }


def build(
    config: RunConfig,
    *,
    empty: bool = False,
    shard: Shard | None = None,
    encoders: dict[str, Encoder] | None = None,
    text: TextBackbone | None = None,
    lean: bool = False,
) -> Model:
    """Load the backbones, attach the adapter, make the head.

    ``empty`` builds everything without weights (meta device), for counting; models are then described by their shapes
    or their configurations alone. ``shard`` spreads the frozen weights over the ranks while they are read. ``encoders``,
    ``text``: where they are loaded already; the adapter then takes turns with those on the language model. ``lean``: what of
    the language model a filled cache stands for is read when it is run.
    """
    if text is None:
        text = text_of(config, empty, shard, unread_of(config) if lean else nothing)
    encoders = encoders or encoders_of(config.model, torch.device("cpu") if empty else text.device, shard)
    return assemble(config, text, encoders, empty=empty)


def unread_of(config: RunConfig) -> Unread:
    """What of a language model no step reads once texts' states are cached: below the first layer that the method changes,
    which is found by attaching it to a model without weights."""
    if not config.cache:
        return nothing

    def unread(model: PreTrainedModel) -> list[nn.Module]:
        with torch.device("meta"):
            widths = getattr(config.adapter, "modalities", {}) or dict.fromkeys(config.model.modalities, 1)
            twin = methods.build(config.adapter, widths)
            if twin.traits.changes_encoder:
                return []
            twin.attach({"text": loading.weightless(model)})
        return below(model, twin.attachment.first_layers["text"], TASKS[config.task.section_name].speaks)

    return unread


def text_of(config: RunConfig, empty: bool, shard: Shard | None, unread: Unread = nothing) -> TextBackbone:
    """The language model, loaded, or without weights."""
    if empty:
        return TextBackbone.empty(described(config.model))
    if config.model.llm_shape:
        raise ConfigError(
            f"model.llm_shape describes {config.model.llm!r} without weights, which serves --dry-run alone:"
            " set model.llm to a folder with the weights and model.llm_shape=null to train"
        )
    return TextBackbone.load(
        resolve_model(config.model.llm),
        loading.DTYPES[config.model.dtype],
        config.model.attention,
        loading.device_of(config.model.device),
        config.model.quantize,
        config.model.quantize_embedding,
        shard,
        unread,
    )


def described(config: ModelConfig) -> PretrainedConfig:
    """The language model's configuration: the one that ``llm_shape`` gives, or that lies beside the weights."""
    if config.llm_shape:
        return loading.config_from_shape(config.llm_shape, "model.llm_shape")
    return TextBackbone.read_config(resolve_model(config.llm))


def assemble(config: RunConfig, text: TextBackbone, encoders: dict[str, Encoder], *, empty: bool = False) -> Model:
    """Adapter, head and statistics on loaded backbones; their start values follow from ``config.seed``."""
    seed_everything(config.seed)
    widths = {name: sum(encoders[one].width for one in names) for name, names in config.model.modalities.items()}
    device = torch.device("meta") if empty else text.device
    pretrained = loading.count_parameters(nn.ModuleList([text.model, *encoders.values()]))
    with torch.device(device):
        adapter = methods.build(config.adapter, widths)
        backend = config.kernels.backend
        backbones, entering, first = {"text": text.model}, None, next(iter(encoders.values()), None)
        if adapter.traits.changes_encoder:
            backbones["encoder"] = changeable(first, adapter)
            if not empty:
                first.identity()  # the pretrained weights', before anything is put into them
        beside = {"name": f"{adapter.traits.name}_{len(there) + 1}"} if (there := turn_takers(text.model)) else {}
        adapter.attach(backbones, checkpoint=config.train.checkpoint_activations, backend=backend, **beside)
        cache = None if empty else cache_root(config)
        layers = adapter.attachment.first_layers
        states = TextStates(text, layers["text"], cache, adapter.traits.runs_layers, adapter.disabled)
        if adapter.traits.changes_encoder:
            entering = EncoderStates(first, layers["encoder"], cache)
        parts = Parts(text, adapter, states)
        root = lambda: resolve_data(config.data)  # noqa: E731
        given = Given(parts, config.data, root, list(encoders.values()), widths, config.train.batch)
        task = TASKS[config.task.section_name].build(config.task, given)
        task.own_metric = getattr(config.task, "metric", None)
        if task.own_metric and user_code.trusted() and (lowest := user_code.minimises(task.own_metric)) is not None:
            task.metric, task.minimises = task.own_metric.partition(":")[2], lowest
    norm = FeatureNorm(widths, config.features)
    return Model(config, text, encoders, adapter, norm, task, states, entering, pretrained)


def changeable(encoder: Encoder | None, adapter: Adapter) -> nn.Module:
    """The first encoder's model, which a method changes."""
    if not getattr(encoder and encoder.config, "infused", True):
        raise ConfigError(
            f"the method {adapter.traits.name!r} changes the first encoder, which infused=false leaves to the decoder alone:"
            " put another encoder first in model.encoders"
        )
    if encoder is not None and adapter.traits.reads_tokens and encoder.feature_map:
        return encoder.model
    if encoder is None or not encoder.depth:
        raise ConfigError(
            f"the method {adapter.traits.name!r} changes an encoder's transformer layers, and"
            f" {encoder.config.name if encoder else 'none'!r} has none: put another encoder first in model.encoders, as"
            " dinov2-vits14"
        )
    if not encoder.enters:
        raise ConfigError(
            f"the method {adapter.traits.name!r} changes the layers of the first encoder, which it can do for images, speech"
            f" and texts, not for {encoder.config.label}: put another encoder before it, or take another method"
        )
    return encoder.model


def seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
