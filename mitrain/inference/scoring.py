"""What a finished run is asked: a split's metrics, one picture's answer or mask; and what a data set holds."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mitrain.core import dist
from mitrain.core.errors import ConfigError, DataError, UserError
from mitrain.core.files import atomic_folder, write_atomic
from mitrain.core.parsing import is_whole
from mitrain.data.features import ImageFeatures
from mitrain.data.images import BadSamples, open_image
from mitrain.data.inspection import inspect_splits
from mitrain.data.sources import limit, portion
from mitrain.models.digests import frozen_digest
from mitrain.tasks import TASKS, figures
from mitrain.tasks.answer import answers_by_prompt
from mitrain.tasks.base import Answer, Batch, Question, Task, cautions
from mitrain.training import runs, schema
from mitrain.training.baselines import baselines_of
from mitrain.training.build import cache_root, resolve_data
from mitrain.training.evaluate import Evaluation, evaluate
from mitrain.training.fingerprint import digest, fingerprint, require_same
from mitrain.training.runs import Run

log = logging.getLogger(__name__)


def set_data_root(run: Run, root: str | None) -> None:
    """Let ``root`` be the folder of a run's data, if given; DataError where the folder is not there."""
    if root is not None:
        data = run.config.data.model_copy(update={"source": None, "root": root})
        run.config = run.config.model_copy(update={"data": data})
    folder = run.config.data.root
    if folder is not None and not os.path.isdir(os.path.expanduser(folder)):
        raise DataError(f"the folder {folder!r} is not there: give the data's folder with --data")


def split_of(run: Run, split: str, samples: int | None = None) -> tuple[list[Any], ImageFeatures]:
    """A split's samples (at most ``samples``, evenly spread) that can be read, and their images' features."""
    data = run.config.data
    root = resolve_data(data)
    images = run.model.images(data.image_root(root), BadSamples(data.bad_samples, data.bad_share))
    chosen = images.readable(limit(data.read(root, split), samples), run.config.features.eval_views)
    if not chosen:
        raise DataError(f"no sample of the split {split!r} can be read: check the data folder {root}")
    if run.model.task.remembers:
        recall(run, scoring=True)
    if dist.world() > 1:
        require_same(
            fingerprint(run.config.to_dict(), {split: chosen}, images.key, run.model.base) | trained_parts(run)
        )
    for line in cautions(run.model.task, chosen, f"the split {split!r}", getattr(run.model.task, "known", None)):
        log.warning(line)
    run.model.states.prepare(run.model.texts(chosen, True))
    return chosen, images


def trained_parts(run: Run) -> dict[str, str]:
    """The checkpoint, and the answers that training gave, for `mitrain.training.fingerprint`."""
    parts = {f"checkpoint.{name}": frozen_digest(module) for name, module in run.model.trainable.items()}
    parts["data.train.answers"] = sorted(getattr(run.model.task, "known", {}).items())
    return {"checkpoint.step": str(run.saved.step), **{name: digest([value]) for name, value in parts.items()}}


def score_split(
    run: Run, samples: list[Any], images: ImageFeatures, control: str, generate: bool = False, seed: int = 0
) -> Evaluation:
    """Metrics and predictions of prepared ``samples``."""
    if generate and not run.model.task.speaks:
        raise ConfigError(
            "--generate lets the model speak, which only the tasks 'answer' and 'caption' do: leave it out"
        )
    batch = run.config.train.eval_batch
    what = f"{run.folder} at step {run.saved.step}"
    return evaluate(run.model, images, samples, control=control, seed=seed, batch=batch, generate=generate, what=what)


def recall(run: Run, scoring: bool = False) -> None:
    """Let the task know the answers that training gave: an export's, or the data's, which ``scoring`` reads anyway."""
    if run.answers or (run.answers is not None and not scoring):
        run.model.task.known = run.answers
        return
    try:
        samples = run.config.data.read(resolve_data(run.config.data), "train")
    except UserError as error:
        log.warning("the training split cannot be read, so that its answers are not known: %s", error)
        return
    run.model.task.remember(portion(samples, run.config.train.fraction))


def score_run(
    folder: str | Path,
    *,
    split: str,
    control: str,
    which: str = "best",
    samples: int | None = None,
    generate: bool = False,
    seed: int = 0,
    baselines: bool = False,
    allow_changes: bool = False,
    root: str | None = None,
    base: str | None = None,
    encoders: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The metrics of a run's checkpoint on a split under a control, and those of the ``baselines`` if asked for.

    ``root``: the folder of the data, where it is another than the run's; ``base``, ``encoders`` as in `runs.open_run`.
    """
    if samples is not None and samples < 1:
        raise ConfigError(f"--samples {samples} scores nothing: give at least 1")
    run = runs.open_run(folder, which, allow_changes, base, encoders)
    set_data_root(run, root)
    chosen, images = split_of(run, split, samples)
    evaluation = score_split(run, chosen, images, control, generate, seed)
    beside = {"baselines": baselines_of(run, split, chosen, images)} if baselines else {}
    if len(images.bad):
        beside["bad_samples"] = len(images.bad)
    return {**evaluation.metrics, "split": split, "step": run.saved.step, "run": str(folder), **beside}


def predict_one(
    folder: str | Path,
    image: str,
    text: str,
    *,
    candidates: Sequence[str] | None = None,
    out: str | None = None,
    which: str = "best",
    allow_changes: bool = False,
    base: str | None = None,
    encoders: Sequence[str] | None = None,
) -> Answer:
    """Answer a prompt about a picture, or segment an expression in it; ``base``, ``encoders`` as in `runs.open_run`."""
    check_words(text, candidates)
    run = runs.open_run(folder, which, allow_changes, base, encoders)
    return ask(run, image, text, candidates=candidates, out=out)


def ask(
    run: Run, image: str | Path, text: str, *, candidates: Sequence[str] | None = None, out: str | None = None
) -> Answer:
    """What an opened run says of one picture."""
    check_words(text, candidates)
    path = Path(image).expanduser()
    images = run.model.images(path.parent, cached=False)
    images.key(path.name)
    task = run.model.task
    if out and not task.decodes:
        raise ConfigError("--out writes a mask, which only the task 'segment' has: leave it out")
    if task.remembers and not candidates:
        recall(run)
    picture = cache(lambda: open_image(path.parent, path.name, run.config.data.max_pixels))

    def see(sample: Any) -> Batch:
        return run.model.evaluation_batch([sample], [sample.image], images)

    answer = task.ask(Question(path, text, candidates or (), see, picture, str(run.folder)))
    if not out:
        return answer
    files = write_mask(Path(out), picture(), text, answer.mask)
    lines = [*answer.lines, *(f"wrote {name}" for name in files)]
    return replace(answer, values={**answer.values, "files": files}, lines=lines)


def check_words(text: str, candidates: Sequence[str] | None) -> None:
    if not text.strip():
        raise ConfigError("--text is empty: give the prompt, or the expression to segment")
    if isinstance(candidates, str):
        raise ConfigError(f"candidates={candidates[:40]!r} is one text: give a list of them")
    for name, words in (("--text", text), *(("--candidates", words) for words in candidates or ())):
        if not is_whole(words):
            raise ConfigError(f"{name} {words[:40]!r} holds half a character: write it in UTF-8")


def write_mask(out: Path, picture: Image.Image, text: str, mask: np.ndarray) -> list[str]:
    """Image, overlay, mask and expression, published together."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{str(out)!r} exists and is not an empty folder: give a new one with --out")
    names = ["image.png", "overlay.png", "mask.png", "expression.txt"]
    with atomic_folder(out) as work:
        picture.save(work / names[0])
        figures.overlay(picture, mask).save(work / names[1])
        Image.fromarray(mask.astype(np.uint8) * 255).save(work / names[2])
        write_atomic(work / names[3], text + "\n")
    return [str(out / name) for name in names]


def inspect_data(config: str, assignments: Sequence[str], out: Path) -> tuple[dict[str, Any], str]:
    """Report on every split of a configuration's data, and write its contact sheet to ``out``."""
    run_config = schema.load(config, list(assignments))
    data = run_config.data
    root = resolve_data(data)
    splits = {split: data.read(root, split) for split in data.split_names(root)}
    task = TASKS[run_config.task.section_name]
    sheet, cache = out / f"{run_config.name}.png", cache_root(run_config)
    report, text = inspect_splits(task, splits, data.image_root(root), sheet, data.max_pixels, cache=cache)
    known = answers_by_prompt(splits.get("train", ())) if task.remembers else None
    report["cautions"] = [
        line for split, samples in splits.items() for line in cautions_of(task, samples, split, known)
    ]
    return report, "\n".join([text, *report["cautions"]])


def cautions_of(
    task: type[Task], samples: Sequence[Any], split: str, known: Mapping[str, Sequence[str]] | None
) -> list[str]:
    """The cautions about a split, or why it cannot be scored at all."""
    try:
        return cautions(task, samples, split, known)
    except DataError as error:
        return [str(error)]
