"""A run's folder: what is in it, how it is made, and how its model is opened again.

runs/NAME-TIME/
    config.yaml          the resolved configuration with its hash
    metrics.jsonl        one JSON object per logged step
    checkpoints/         see `mitrain.training.checkpoint`
    summary.json         written when the run has finished
    report.html          the curves, the scores and the configuration, with curves.svg: written at the end
    state.json           running, preempted, failed or done, and why: see `mitrain.training.state`
    .owner               while a process trains in it, see `mitrain.core.ownership`
"""

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypedDict

from mitrain import methods
from mitrain.core import config, dist, parsing
from mitrain.core.errors import CheckpointError, ConfigError, ModelError
from mitrain.core.files import remedy, write_atomic
from mitrain.core.ownership import OWNERSHIP
from mitrain.methods import export_format
from mitrain.methods.export_format import Contents, EncoderShape
from mitrain.models import Encoder, ModelConfig, TextBackbone, loading
from mitrain.models.encoders.image import Preprocess
from mitrain.training import checkpoint, moved, schema
from mitrain.training.build import Model, build, encoders_of, resolve_model, resolved
from mitrain.training.checkpoint import Checkpoint
from mitrain.training.engine import ZeroConfig
from mitrain.training.engine.zero import gather_as_needed, sharding
from mitrain.training.fingerprint import differences, flat, listed
from mitrain.training.schema import RunConfig
from mitrain.training.state import STATE

log = logging.getLogger(__name__)

FEW, BESIDE_FROZEN = 1 << 28, 4
"""An export may hold so many numbers, or so many for each one of the frozen models."""


def create(run_config: RunConfig, parent: str | Path) -> Path:
    """A new run folder under ``parent`` with the resolved configuration in it."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder, attempt = Path(parent) / f"{run_config.name}-{stamp}", 1
    while True:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            attempt += 1
            folder = Path(parent) / f"{run_config.name}-{stamp}-{attempt}"
        except OSError as error:
            raise cannot_make(folder, error, "--runs") from None
    begin(run_config, folder, "--runs")
    return folder


def create_or_find(run_config: RunConfig, folder: str | Path, allow_changes: bool = False) -> Path:
    """``folder`` as the run folder of this configuration: made, or the one that an earlier start of the run left.

    ConfigError where it holds a run of another configuration (unless ``allow_changes``), or anything else.
    """
    folder = Path(folder)
    if (folder / "config.yaml").exists():
        differing = differences(*(flat(resolved(config).to_dict()) for config in (read_config(folder), run_config)))
        if differing and not allow_changes:
            raise ConfigError(
                f"{folder} is a run of another configuration ({listed(differing)}): give another folder with --run-dir,"
                " or go on all the same with --allow-changes"
            )
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        strange = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise cannot_make(folder, error, "--run-dir") from None
    if strange:
        raise ConfigError(f"{folder} is no run folder and holds {strange[0]!r}: give another with --run-dir")
    begin(run_config, folder, "--run-dir")
    return folder


def begin(run_config: RunConfig, folder: Path, option: str) -> None:
    """Write the configuration into a new run folder, which does not stay empty where that fails."""
    try:
        write_config(run_config, folder)
    except OSError as error:
        with suppress(OSError):
            folder.rmdir()
        raise cannot_make(folder, error, option) from None


def cannot_make(folder: Path, error: OSError, option: str) -> ConfigError:
    why = error.strerror or error
    return ConfigError(f"cannot make the run folder {folder} ({why}): {remedy(error)} or give another with {option}")


def remove_unstarted(folder: Path) -> None:
    """Remove the folder of a run that was refused before it began: a mended configuration may take the same name.

    Its owner calls this. One that holds more than its configuration and an empty log stays.
    """
    held = {path.name: path for path in folder.iterdir()}
    log = held.get("metrics.jsonl")
    if held.keys() <= {"config.yaml", "metrics.jsonl", STATE, *OWNERSHIP} and (log is None or log.stat().st_size == 0):
        for path in held.values():
            path.unlink()
        folder.rmdir()


def write_config(run_config: RunConfig, folder: Path, note: str = "") -> None:
    text = parsing.dump_yaml(run_config.to_dict())
    head = f"# resolved configuration, hash {run_config.hash}{note}\n{moved.told(folder)}"
    write_atomic(folder / "config.yaml", head + text)


def read_config(folder: str | Path) -> RunConfig:
    """The resolved configuration of a run folder; its paths as they are now, if the run was moved with what they name."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{str(folder)!r} is no run folder (it has no config.yaml): give one that mitrain train made")
    values = config.read_file(path)
    return schema.from_dict(moved.found(values, moved.written_in(path.read_text("utf-8")), Path(folder)))


@dataclass
class Run:
    """An opened run: its configuration, its model with the trained tensors in place, and where they came from.

    ``answers``: of an exported run, the answers that training samples had, by prompt; otherwise None: ask the data.
    ``turn``: held by the thread that asks it, as a prediction puts stand-ins into the model while it runs.
    """

    folder: Path
    config: RunConfig
    model: Model
    saved: Checkpoint
    answers: Mapping[str, Sequence[str]] | None = None
    turn: Any = field(default_factory=threading.RLock, repr=False)


class Opening(TypedDict, total=False):
    """What `open_run` takes besides a run's folder, for those that open one themselves (``**opening: Unpack[Opening]``)."""

    which: str
    allow_changes: bool
    base: str | Path | None
    encoders: Sequence[str | Path] | None
    dtype: str
    quantize: str
    device: str


def open_run(
    folder: str | Path,
    which: str = "best",
    allow_changes: bool = False,
    base: str | Path | None = None,
    encoders: Sequence[str | Path] | None = None,
    beside: "Run | None" = None,
    **changes: Any,
) -> Run:
    """Rebuild a run's model and load its ``best`` or ``latest`` checkpoint, or what was exported of it.

    ``base`` and ``encoders``: where the language model and the encoders are, if not where they were in training;
    ``beside``: a run whose language model it shares; ``changes``: other values of `ModelConfig`, as quantize="int8".
    ModelError where the frozen models are not those it was trained on, unless ``allow_changes``.
    """
    folder = export_format.local(folder)
    if export_format.is_published(folder):
        if which != "best":
            raise CheckpointError(f"{str(folder)!r} is an export and holds one checkpoint: leave out --checkpoint {which}")
        return open_published(folder, base, encoders, allow_changes, beside, **changes)
    run_config, saved = read_config(folder), newest(folder, which)
    model_config = config.parse(ModelConfig, run_config.model.to_dict() | changes, "model")
    run_config = run_config.model_copy(update={"model": elsewhere(model_config, base, encoders)})
    zero = run_config.zero if dist.world() > 1 else ZeroConfig()  # one process holds everything whatever the stage
    if beside is not None:
        check_shared(run_config, beside, folder)
    shard = sharding(zero, run_config.train.optimizer)
    model = build(run_config, shard=shard, text=beside and beside.model.text)
    check_frozen(frozen_of(saved), lambda: model.base, folder, allow_changes)
    restore(model, saved)
    if zero.stage == 3:
        gather_as_needed(model.frozen, zero)
    return sharing(Run(folder, run_config, model, saved), beside)


def frozen_of(saved: Checkpoint) -> dict[str, str]:
    """The digests of the frozen models that a checkpoint was trained on, if it says them."""
    fingerprint = saved.state.get("fingerprint")
    parts = fingerprint.items() if isinstance(fingerprint, dict) else ()
    return {str(name).removeprefix("base."): str(value) for name, value in parts if str(name).startswith("base.")}


def check_frozen(
    there: Mapping[str, str], here: Callable[[], Mapping[str, str]], folder: str | Path, allow_changes: bool
) -> None:
    """Compare the digests of the frozen models with those that the run was trained on, if any; all ranks together."""
    changed = dist.first_not_none(differences(there, here()) or None) if there else None
    if changed and not allow_changes:
        raise ModelError(
            f"the frozen models are not those that {str(folder)!r} was trained on ({listed(changed)}): bring those back, or"
            " take these all the same with --allow-changes (in Python: allow_changes=True)"
        )
    if changed:
        log.warning("%s was trained on other frozen models: %s", folder, listed(changed))


def newest(folder: str | Path, which: str) -> Checkpoint:
    """A run's newest usable checkpoint, or with ``which="best"`` the best where there is one."""
    saved = next(checkpoint.usable(folder, best_first=which == "best"), None)
    return saved or without_checkpoint(require_started(folder))


def require_started(folder: str | Path) -> Path:
    """``folder``, where the run in it has published a checkpoint, usable or not; CheckpointError where it has none."""
    if not checkpoint.any_published(folder):
        raise CheckpointError(
            f"{str(folder)!r} has no complete checkpoint yet: train it first"
            f" (mitrain train {folder}/config.yaml --run-dir {folder})"
        )
    return Path(folder)


def without_checkpoint(folder: Path) -> NoReturn:
    """CheckpointError of a run none of whose checkpoints can be used: it must not begin again on top of them."""
    raise CheckpointError(
        f"{str(folder)!r} has no complete checkpoint that can be used: bring one back to checkpoints/, or start a new run"
    )


def open_published(
    folder: str | Path,
    base: str | Path | None = None,
    encoders: Sequence[str | Path] | None = None,
    allow_changes: bool = False,
    beside: "Run | None" = None,
    **changes: Any,
) -> Run:
    """Rebuild an exported run's model on its frozen weights.

    ``base`` and ``encoders``: other places of the same language model and encoders; ``changes``: other values of
    `ModelConfig`, as quantize="int8". ``beside``: a run whose language model it shares. ModelError where the base or an
    encoder is of another shape or, unless ``allow_changes``, has other weights.
    """
    folder = export_format.local(folder)
    contents, _ = export_format.read_contents(folder)
    part = contents.run
    if part is None:
        raise CheckpointError(
            f"{str(folder)!r} holds an adapter without encoders and task: mitrain.load_adapter(model, folder) attaches it"
        )
    run_config = published_config(folder, contents, base, encoders, changes)
    if beside is not None:
        check_shared(run_config, beside, folder)
    llm = resolve_model(run_config.model.llm)
    here = export_format.base_shape(TextBackbone.read_config(llm))
    export_format.require_same(contents.base, here, f"the language model {str(llm)!r}", "give another with base=")
    seeing = encoders_of(run_config.model, loading.device_of(run_config.model.device))
    for encoder, saved in zip(seeing.values(), part.encoders, strict=True):
        what = f"the {encoder.config.takes} encoder {encoder.config.name!r}"
        export_format.require_same(saved.shape, encoder_shape(encoder), what, "give another with encoders=")
        values = saved.preprocess
        if values is not None:
            encoder.preprocess = Preprocess(values.size, tuple(values.mean), tuple(values.std), values.resize)
    published = export_format.read(folder, trained_shapes(run_config, seeing, folder))
    model = build(run_config, encoders=seeing, text=beside and beside.model.text)
    check_frozen(contents.frozen or {}, lambda: model.base, folder, allow_changes)
    saved_run = Checkpoint(Path(folder), part.step, part.best, published.tensors, {})
    restore(model, saved_run)
    return sharing(Run(Path(folder), run_config, model, saved_run, part.answers or {}), beside)


def sharing(run: Run, beside: Run | None) -> Run:
    """The run, which is asked in turn with the one ``beside`` whose language model it has."""
    if beside is not None:
        run.turn = beside.turn
    return run


def check_shared(run_config: RunConfig, beside: Run, folder: str | Path) -> None:
    """ModelError where the run cannot share the language model of the run ``beside``."""
    own, there = (each.model.to_dict() | {"encoders": None} for each in (run_config, beside.config))
    if wrong := [name for name, value in own.items() if value != there[name]]:
        raise ModelError(
            f"{str(folder)!r} cannot share the language model of {str(beside.folder)!r}: model.{wrong[0]} is"
            f" {own[wrong[0]]!r} here and {there[wrong[0]]!r} there"
        )
    for name in (run_config.adapter.section_name, beside.config.adapter.section_name):
        if not methods.METHODS[name]._takes_turns:
            raise ModelError(f"{name} cannot take turns with another adapter on one language model: load it by itself")


def trained_shapes(run_config: RunConfig, encoders: dict[str, Encoder], folder: str | Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of what a run trains, made without memory: what its export must hold, and no more.

    CheckpointError where `check_amount` has one.
    """
    twin = build(run_config, empty=True, encoders=encoders)
    shapes = {
        f"{part}.{name}": tuple(tensor.shape)
        for part, module in twin.trainable.items()
        for name, tensor in module.state_dict().items()
    }
    twin.adapter.detach()
    check_amount(sum(map(math.prod, shapes.values())), twin.pretrained, folder)
    return shapes


def check_amount(trained: int, frozen: int, folder: str | Path) -> None:
    """CheckpointError where an export claims more trained numbers than anyone trains beside so many frozen ones."""
    if trained > max(FEW, BESIDE_FROZEN * frozen):
        raise CheckpointError(
            f"{str(folder)!r} describes {trained:,} trained numbers beside {frozen:,} frozen ones, which is no adapter:"
            " export it again or take another copy"
        )


def published_config(
    folder: str | Path,
    contents: Contents,
    base: str | Path | None,
    encoders: Sequence[str | Path] | None,
    changes: Mapping[str, Any],
) -> RunConfig:
    """The configuration of an exported run, its frozen models replaced as asked."""
    part = contents.run
    try:
        saved = schema.from_dict(with_base(part.config, os.path.expanduser(contents.base_model_name_or_path)))
    except ConfigError as error:
        raise CheckpointError(f"{folder}: the exported configuration is not understood ({error})") from None
    model = config.parse(ModelConfig, saved.model.to_dict() | dict(changes), "model")
    if len(part.encoders) != len(model.encoders):
        raise CheckpointError(f"{folder} describes {len(part.encoders)} of {len(model.encoders)} encoders: export it again")
    values = elsewhere(model, base, encoders).to_dict()
    for encoder, saved_encoder in zip(values["encoders"].values(), part.encoders, strict=True):
        encoder |= {"size": saved_encoder.preprocess.size} if saved_encoder.preprocess else {}
    data = saved.data.model_copy(update={"root": export_format.data_seen(saved.data.root, Path(folder))})
    return saved.model_copy(update={"model": config.parse(ModelConfig, values, "model"), "data": data})


def elsewhere(model: ModelConfig, base: str | Path | None, encoders: Sequence[str | Path] | None) -> ModelConfig:
    """The frozen models ``model`` of a run where they are on this machine.

    ModelError where a folder that it names is not there and no other is given.
    """
    given = [v.name for v in model.encoders.values()] if encoders is None else encoders
    if len(given) != len(model.encoders):
        raise ConfigError(
            f"{len(given)} encoders were given, the adapter has {len(model.encoders)}: give one for each, in order"
        )
    llm, *names = (os.path.expanduser(str(name)) for name in (base or model.llm, *given))
    for name, option in [(llm, "--base"), *((name, "--encoder") for name in names)]:
        if os.path.isabs(name) and not os.path.exists(name):
            raise ModelError(
                f"the folder {name!r} of a frozen model is not there: say where it is with {option} (in Python"
                f" {'base=' if option == '--base' else 'encoders='})"
            )
    moved = {
        key: part.model_copy(update={"name": name}) for (key, part), name in zip(model.encoders.items(), names, strict=True)
    }
    return model.model_copy(update={"llm": llm, "encoders": moved})


def with_base(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    model = values.get("model")
    return {**values, "model": {**model, "llm": name} if isinstance(model, dict) else model}


def encoder_shape(encoder: Encoder) -> EncoderShape:
    channels, patch = (getattr(encoder.settings, name, None) for name in ("hidden_size", "patch_size"))
    return EncoderShape(
        model_type=encoder.family,
        width=encoder.width,
        layers=encoder.depth,
        channels=channels if isinstance(channels, int) else None,
        patch=patch if isinstance(patch, int) else None,
    )


def restore(model: Model, saved: Checkpoint) -> None:
    """Put a checkpoint's trained tensors into ``model``."""
    for name, module in model.trainable.items():
        checkpoint.restore(module, saved.tensors.get(name, {}), f"{name} in {saved.path}")
    model.train(False)
