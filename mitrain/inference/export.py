"""Publishing a run's adapter, and loading it again with or without the rest of mitrain around it."""

import logging
import math
import os
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedModel

from mitrain import methods
from mitrain.core import config, prepared
from mitrain.core.errors import CheckpointError, DataError, ModelError, UserError
from mitrain.data.features import FeatureNorm
from mitrain.data.sources import portion
from mitrain.inference import scoring
from mitrain.methods import export_format
from mitrain.methods.base import Adapter, check_free, without_wrapper
from mitrain.methods.export_format import Contents, EncoderPart, PreprocessPart, RunPart
from mitrain.methods.export_format.contents import ANSWER_LENGTH, ANSWERS_KEPT, PROMPTS_KEPT
from mitrain.models import Encoder, loading
from mitrain.models.digests import PEFT, stored_digests
from mitrain.tasks import TASKS
from mitrain.tasks.answer import answers_by_prompt
from mitrain.training import checkpoint, curves, runs, schema
from mitrain.training.build import Model, build, resolve_data
from mitrain.training.checkpoint import Checkpoint
from mitrain.training.schema import RunConfig

log = logging.getLogger(__name__)

SUFFIXES = {"image": ".png", "audio": ".wav", "video": ".mp4", "text": ".txt", "features": ".npy"}
"""Of files whose bytes are given: what is in them decides how they are read, but for arrays."""

WEB = ("http://", "https://")
FETCH_S, FETCHED = 60, 256 << 20  # seconds without an answer, and bytes of one file, after which an address is given up

QUEUE = "slow."
"""Of retrieval's head what serves training alone: the momentum copies and their queue."""


def export(
    run_dir: str | Path, out: str | Path, which: str = "best", splits: Sequence[str] = (), samples: int | None = None
) -> dict[str, Any]:
    """Write a run's ``best`` or ``latest`` checkpoint to the new folder ``out``; returns what was written.

    Without the frozen weights: they are neither loaded nor exported. ``splits`` are scored first, which does load them,
    and join the val metrics of the checkpoint's step in the model card. Nothing is written where anything fails.
    """
    export_format.check_target(out)
    run_config, saved = runs.read_config(run_dir), runs.newest(run_dir, which)
    model = build(run_config, empty=True)
    for name, module in model.trainable.items():
        checkpoint.check_fit(module, saved.tensors.get(name, {}), f"{name} in {saved.path}")
    metrics = recorded(Path(run_dir), saved.step)
    for split in splits:
        scores = scoring.score_run(run_dir, split=split, control="none", which=which, samples=samples)
        metrics[split] = {key: value for key, value in scores.items() if key not in ("split", "step", "run", "control")}
    counts = export_format.count(model.trainable.values(), model.text.model)
    base = export_format.without_home(run_config.model.llm)
    adapter = model.adapter
    fields = export_format.method_fields(adapter.traits.name, adapter.config, model.text.model.config, base, counts)
    fields["run"] = run_part(run_config, model, saved, metrics, Path(out)).to_dict()
    fields["frozen"] = runs.frozen_of(saved) or None
    tensors = {name: saved.tensors[name] for name in model.trainable}
    tensors["head"] = {n: t for n, t in tensors["head"].items() if not n.startswith(QUEUE)}
    alone = adapter.traits.backbones == ("text",)
    encoder = next((section["name"] for section in fields["run"]["config"]["model"]["encoders"].values()), "")
    names = {"text": base, "encoder": encoder}
    peft = export_format.peft_files(adapter.attachment.peft, alone, tensors["adapter"], names)
    card = lambda contents: export_format.model_card(contents, licences(), alone)  # noqa: E731
    folder = export_format.publish(out, fields, tensors, card, peft)
    models = [base, *(encoder["name"] for encoder in fields["run"]["config"]["model"]["encoders"].values())]
    if local := [name for name in models if os.path.isdir(os.path.expanduser(name))]:
        log.warning(
            "the export names folders of this machine (%s): others give --base and --encoder (in Python base=, encoders=)",
            ", ".join(local),
        )
    return {
        "folder": str(folder),
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()),
        "step": saved.step,
        "bytes": export_format.read(folder).contents.tensors.bytes,
        "parameters": counts.to_dict(),
        "metrics": metrics,
    }


def licences() -> dict[str, str]:
    """Of prepared models and data sets, by their names."""
    return {name: r.licence for what in ("models", "data") for name, r in prepared.recipes(what).items()}


def run_part(
    run_config: RunConfig, model: Model, saved: Checkpoint, metrics: dict[str, dict[str, Any]], out: Path
) -> RunPart:
    values = export_format.settings_from(run_config.to_dict(), out)
    del values["model"]["llm"]
    values["task"] |= {"queue": 0} if "queue" in values["task"] else {}
    return RunPart(
        config=values,
        encoders=[encoder_part(encoder) for encoder in model.encoders.values()],
        answers=training_answers(run_config),
        step=saved.step,
        best=saved.best,
        metrics=metrics,
    )


def encoder_part(encoder: Encoder) -> EncoderPart:
    if encoder.config.takes != "image":
        return EncoderPart(shape=runs.encoder_shape(encoder), preprocess=None)
    used = encoder.preprocess
    preprocess = PreprocessPart(size=used.size, mean=list(used.mean), std=list(used.std), resize=used.resize)
    return EncoderPart(shape=runs.encoder_shape(encoder), preprocess=preprocess)


def training_answers(run_config: RunConfig) -> dict[str, list[str]] | None:
    """The answers that training samples had, by prompt; None for other tasks, missing data or too many prompts."""
    if not TASKS[run_config.task.section_name].remembers:
        return None
    try:
        samples = run_config.data.read(resolve_data(run_config.data), "train")
    except DataError:
        return None
    answers = answers_by_prompt(portion(samples, run_config.train.fraction))
    if len(answers) > PROMPTS_KEPT:
        return None
    few = {prompt: list(given) for prompt, given in answers.items() if len(given) <= ANSWERS_KEPT}
    return {prompt: given for prompt, given in few.items() if max(map(len, given), default=0) <= ANSWER_LENGTH}


def recorded(run_dir: Path, step: int) -> dict[str, dict[str, Any]]:
    """The metrics of ``val`` that a run has logged of a step; none where its file is missing or damaged."""
    metrics: dict[str, dict[str, Any]] = {}
    for values in curves.logged(run_dir):
        if values.get("kind") == "val" and values.get("step") == step:
            metrics["val"] = {k: v for k, v in values.items() if k not in ("kind", "step", "time", "control") and sane(v)}
    return metrics


def sane(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


class Pretrained:
    """A run on its frozen weights, ready to predict; made by `from_pretrained`. Threads may share it."""

    def __init__(self, run: runs.Run):
        self.run = run

    @property
    def model(self) -> Model:
        """The assembled parts: ``text.model`` (transformers), ``encoders``, ``adapter``, ``norm``, ``task``."""
        return self.run.model

    @property
    def adapter(self) -> Adapter:
        return self.run.model.adapter

    def predict(
        self, image: Any, text: str = "", candidates: Sequence[str] | None = None
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """What ``mitrain predict --json`` prints for one picture and a prompt or expression.

        image: a file, its bytes, its address on the web, a PIL image, or an array (H, W, 3) of uint8; of other modalities,
        or several: a mapping of a run's inputs to such, as {"speech": "a.wav", "image": "a.png"}, of arrays of one's own to
        arrays, too. A list of mappings {"image": …, "text": …, "candidates": […]} is asked together, and its answers come as
        a list. Of the task `segment` also ``mask``, (H, W) bool. Raises a `mitrain.core.errors.UserError` for what cannot be
        read.
        """
        first = self.run.config.data.inputs[0]
        many = isinstance(image, list | tuple)
        given = dict(image) if isinstance(image, Mapping) else {first: image}
        rows = image if many else [{**given, "text": text, "candidates": candidates}]
        with tempfile.TemporaryDirectory() as folder:
            asked, in_memory = [], []
            for number, row in enumerate(rows):
                files = {name: value for name, value in row.items() if name not in ("text", "candidates")}
                at = {name: v for name, v in files.items() if isinstance(v, str) and v.startswith(WEB)}
                files |= {name: fetched(address) for name, address in at.items()}
                held = {name: v for name, v in files.items() if not isinstance(v, str | Path)}
                place = Path(folder) / str(number)
                files |= {name: self._saved(place, name, value) for name, value in held.items()}
                asked.append(scoring.Asked(files, row.get("text") or "", row.get("candidates")))
                in_memory.append(dict.fromkeys(held) | at)
            found: list[dict[str, Any]] = []
            size = self.run.config.train.eval_batch
            for start in range(0, len(asked), size):
                for answer in scoring.ask_all(self.run, asked[start : start + size]):
                    if isinstance(answer, UserError):
                        raise answer
                    mask = {} if answer.mask is None else {"mask": answer.mask}
                    found.append({**answer.values, **in_memory[len(found)], **mask})
        return found if many else found[0]

    def _saved(self, folder: Path, name: str, value: Any) -> Path:
        """What is in memory as a file of the input ``name``, which is read as any other."""
        folder.mkdir(exist_ok=True)
        takes = {section.input: section.takes for section in self.run.config.model.encoders.values()}.get(name, "image")
        if isinstance(value, np.ndarray) and takes == "features":
            np.save(folder / f"{name}.npy", value)
            return folder / f"{name}.npy"
        if isinstance(value, bytes):
            path = folder / f"{name}{SUFFIXES[takes]}"
            path.write_bytes(value)
            return path
        if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (2, 3) and takes == "image":
            value = Image.fromarray(value)
        if not isinstance(value, Image.Image):
            kind = f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
            raise DataError(f"{name}: a {kind} is no {takes} file: give a path, the file's bytes, or a picture as uint8")
        if 0 in value.size:
            raise DataError(f"the picture has no pixels ({value.width} × {value.height}): give another")
        value.convert("RGBA" if value.has_transparency_data else "RGB").save(folder / f"{name}.png")
        return folder / f"{name}.png"


def fetched(address: str) -> bytes:
    """What is at an address on the web; DataError where nothing is, or more than `FETCHED` bytes are."""
    try:
        with urllib.request.urlopen(address, timeout=FETCH_S) as answer:
            content = answer.read(FETCHED + 1)
    except (OSError, ValueError, HTTPException) as error:
        raise DataError(f"{address[:200]!r} cannot be fetched ({error}): give a file, or its bytes") from None
    if len(content) > FETCHED:
        raise DataError(f"{address[:200]!r} holds more than {FETCHED >> 20} MiB: give a file")
    return content


def from_pretrained(
    folder: str | Path,
    *,
    base: str | Path | None = None,
    encoders: Sequence[str | Path] | None = None,
    allow_changes: bool = False,
    beside: Pretrained | None = None,
    **model: Any,
) -> Pretrained:
    """Load what ``mitrain export`` wrote, on the frozen models that it names; a folder, or USER/NAME on the Hub.
    Of a run's folder its best checkpoint is loaded.

    ``base`` and ``encoders``: their folders or names here, where they differ; with ``allow_changes`` also models of the
    same shape with other weights, of which a line is said. ``beside``: a predictor whose language model this one shares in
    place of loading it again; each says what it says alone. Further keywords are keys of the configuration's section
    ``model``, as quantize="int8", dtype="bf16", device="cpu". Raises ModelError where the base is of another shape or has
    other weights, with every difference, and CheckpointError for a damaged folder.
    """
    opening = runs.open_run if (Path(folder) / "config.yaml").is_file() else runs.open_published
    where = {"base": base, "encoders": encoders, "allow_changes": allow_changes, "beside": beside and beside.run}
    return Pretrained(opening(folder, **where, **model))


def load_adapter(
    model: PreTrainedModel, folder: str | Path, *, allow_changes: bool = False, name: str | None = None
) -> tuple[Adapter, FeatureNorm | None]:
    """Attach a published adapter to a transformers model that is in memory already.

    Returns the adapter (``detach()`` takes it off) and, of an exported run, the module that turns encoders' features
    (B, e) into what is infused. Raises ModelError where the model is of another shape or, unless ``allow_changes``, was
    read from other weights than the run's; it is then left as it was. ``name``: as of `mitrain.attach`.
    """
    folder = export_format.local(folder)
    contents, _ = export_format.read_contents(folder)
    given, model = model, without_wrapper(model)
    runs.check_amount(contents.tensors.bytes // 4, loading.count_parameters(model), folder)
    published = export_format.read(folder)
    here = export_format.base_shape(model.config)
    export_format.require_same(contents.base, here, "this language model", "load the one that the adapter names")
    try:
        section = config.choose("adapter", contents.adapter)
        adapter = methods.build(section)
        norm = feature_norm(published)
    except UserError as error:
        raise CheckpointError(f"{published.path}: {error}") from None
    if adapter.traits.backbones != ("text",):
        raise ModelError(
            f"{published.path}: {adapter.traits.name} attaches to the first encoder too, not to a language model alone:"
            " open a run's export with mitrain.from_pretrained"
        )
    check_base(model, contents, folder, allow_changes)
    if name and not adapter._takes_turns:
        raise ModelError(f"{adapter.traits.name} cannot take turns with other adapters on a model: leave out name=")
    check_free({"text": model}, name or adapter.traits.name)
    check_size(methods.build(section), model, published)
    adapter.attach({"text": given}, **({"name": name} if name else {}))
    try:
        checkpoint.restore(adapter, published.tensors["adapter"], f"adapter in {published.path}")
    except BaseException:
        adapter.detach()
        raise
    adapter.eval()
    return adapter, norm


def check_base(model: PreTrainedModel, contents: Contents, folder: str | Path, allow_changes: bool) -> None:
    """Compare what ``model`` was read from with the language model that a run was trained on, as `runs.check_frozen`."""
    there = {name: value for name, value in (contents.frozen or {}).items() if name.startswith("text.")}
    there.pop("text.tokenizer", None)  # the caller's
    here = stored_digests(model) if there else {}
    if "text.weights" in there and "text.weights" not in here:
        log.warning("%s: the model in memory names no folder with its weights: they are not compared", folder)
        there = {name: value for name, value in there.items() if name == PEFT}
    runs.check_frozen(there, lambda: here, folder, allow_changes)


def check_size(twin: Adapter, model: PreTrainedModel, published: export_format.Published) -> None:
    """CheckpointError where the settings make more numbers than the saved file has bytes; no memory is taken for them."""
    twin.attach({"text": loading.weightless(model)})
    count, held = loading.count_parameters(twin), published.contents.tensors.bytes
    if count > held:
        raise CheckpointError(
            f"{published.path} describes {count:,} trained numbers, and its weights have {held:,} bytes: export it again"
            " or take another copy"
        )


def feature_norm(published: export_format.Published) -> FeatureNorm | None:
    """The saved feature statistics, or None for an adapter that was exported without a run."""
    part, saved = published.contents.run, published.tensors["features"]
    if part is None:
        return None
    values = runs.with_base(part.config, published.contents.base_model_name_or_path)
    run_config = schema.from_dict(values)
    shapes = dict(zip(run_config.model.encoders, part.encoders, strict=True))
    widths = {
        modality: sum(shapes[name].shape.width for name in names) for modality, names in run_config.model.modalities.items()
    }
    norm = FeatureNorm(widths, run_config.features)
    checkpoint.restore(norm, saved, f"features in {published.path}")
    return norm.requires_grad_(False)
