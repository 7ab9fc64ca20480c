"""What a finished run is asked: a split's metrics, one picture's answer or mask; and what a data set holds."""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mitrain import dist, figures, runs, schema
from mitrain.backbones.digests import frozen_digest
from mitrain.cautions import cautions
from mitrain.data.captions import CaptionSample
from mitrain.data.images import BadSamples, open_image
from mitrain.data.labels import LabelSample
from mitrain.data.records import AnswerSample
from mitrain.data.refcoco import ReferSample
from mitrain.data.sources import limit, portion
from mitrain.data.survey import survey
from mitrain.errors import ConfigError, DataError, UserError
from mitrain.evaluate import Evaluation, evaluate
from mitrain.features import ImageFeatures
from mitrain.files import atomic_folder, write_atomic
from mitrain.fingerprint import digest, fingerprint, require_same
from mitrain.floors import floors_of
from mitrain.model import resolve_data
from mitrain.parsing import is_whole
from mitrain.runs import Run
from mitrain.tasks.answer import answers_by_prompt
from mitrain.tasks.base import Batch, Prediction, require_finite

log = logging.getLogger(__name__)


def place_data(run: Run, root: str | None) -> None:
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
    chosen = images.readable(limit(data.read(root, split), samples))
    if not chosen:
        raise DataError(f"no sample of the split {split!r} can be read: check the data folder {root}")
    if run.config.task.section_name == "answer":
        recall(run, scoring=True)
    if dist.world() > 1:
        require_same(
            fingerprint(run.config.to_dict(), {split: chosen}, images.key, run.model.base) | trained_parts(run)
        )
    for line in cautions(chosen, f"the split {split!r}", getattr(run.model.task, "known", None)):
        log.warning(line)
    run.model.prepare(images, sorted({s.image for s in chosen}), run.config.features.eval_views)
    run.model.states.prepare(run.model.texts(chosen, True))
    return chosen, images


def trained_parts(run: Run) -> dict[str, str]:
    """The checkpoint, and the answers that training gave, for `mitrain.fingerprint`."""
    parts = {f"checkpoint.{name}": frozen_digest(module) for name, module in run.model.trainable.items()}
    parts["data.train.answers"] = sorted(getattr(run.model.task, "known", {}).items())
    return {"checkpoint.step": str(run.saved.step), **{name: digest([value]) for name, value in parts.items()}}


def score_split(
    run: Run, samples: list[Any], images: ImageFeatures, control: str, generate: bool = False, seed: int = 0
) -> Evaluation:
    """Metrics and predictions of prepared ``samples``."""
    if generate and not run.model.task.speaks:
        raise ConfigError("--generate lets the model speak, which only the task 'answer' does: leave it out")
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
    floors: bool = False,
    allow_changes: bool = False,
    root: str | None = None,
    base: str | None = None,
    encoders: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The metrics of a run's checkpoint on a split under a control, and those of the ``floors`` if asked for.

    ``root``: the folder of the data, where it is another than the run's; ``base``, ``encoders`` as in `runs.open_run`.
    """
    if samples is not None and samples < 1:
        raise ConfigError(f"--samples {samples} scores nothing: give at least 1")
    run = runs.open_run(folder, which, allow_changes, base, encoders)
    place_data(run, root)
    chosen, images = split_of(run, split, samples)
    found = score_split(run, chosen, images, control, generate, seed)
    beside = {"floors": floors_of(run, split, chosen, images)} if floors else {}
    if len(images.bad):
        beside["bad_samples"] = len(images.bad)
    return {**found.metrics, "split": split, "step": run.saved.step, "run": str(folder), **beside}


@dataclass(frozen=True)
class Answer:
    """A prediction for one picture, as JSON values and as lines to print; ``mask``: (H, W) bool, of `segment`."""

    values: dict[str, Any]
    lines: list[str]
    mask: np.ndarray | None = None


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
    if run.model.task.decodes:
        return predict_mask(run, images, path, text, Path(out) if out else None)
    if out:
        raise ConfigError("--out writes a mask, which only the task 'segment' has: leave it out")
    if run.config.task.section_name == "retrieve":
        return predict_ranking(run, images, path, text, candidates)
    if not run.model.task.speaks:
        return predict_labels(run, images, path, text, candidates)
    return predict_answer(run, images, path, text, candidates)


def check_words(text: str, candidates: Sequence[str] | None) -> None:
    if not text.strip():
        raise ConfigError("--text is empty: give the prompt, or the expression to segment")
    if isinstance(candidates, str):
        raise ConfigError(f"candidates={candidates[:40]!r} is one text: give a list of them")
    for name, words in (("--text", text), *(("--candidates", words) for words in candidates or ())):
        if not is_whole(words):
            raise ConfigError(f"{name} {words[:40]!r} holds half a character: write it in UTF-8")


def one(run: Run, images: ImageFeatures, sample: Any) -> Batch:
    return run.model.evaluation_batch([sample], [sample.image], images)


def predict_answer(run: Run, images: ImageFeatures, path: Path, text: str, candidates: Sequence[str] | None) -> Answer:
    """What the model says, and the likeliest of the candidates, or of the answers that training gave to this prompt."""
    if candidates and len(set(candidates)) < 2:
        raise ConfigError(f"--candidates {candidates[0][:60]} leaves nothing to choose: give two or more, or none")
    if not candidates:
        recall(run)
    sample = AnswerSample(path.name, path.name, text, "", tuple(candidates or ()))
    found = predicted(run, run.model.task.predict(one(run, images, sample), generate=True))
    values: dict[str, Any] = {"image": str(path), "prompt": text, "generated": found["generated"]}
    values["answer"] = found["predicted"]
    lines = [f"answer: {found['predicted']}", f"says: {found['generated']}"]
    if "probabilities" in found:
        values["probabilities"] = found["probabilities"]
        lines += [f"{p:7.3f}  {candidate}" for candidate, p in found["probabilities"].items()]
    return Answer(values, lines)


def predicted(run: Run, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The values of one picture's prediction; UserError where they were made of what is no number."""
    require_finite([p.id for p in predictions if not p.finite], 1, str(run.folder))
    return predictions[0].values


def predict_labels(run: Run, images: ImageFeatures, path: Path, text: str, candidates: Sequence[str] | None) -> Answer:
    if candidates:
        raise ConfigError("--candidates are for the task 'answer'; the classes of 'classify' are trained: leave it out")
    found = predicted(run, run.model.task.predict(one(run, images, LabelSample(path.name, path.name, text, ()))))
    values = {"image": str(path), "text": text, "labels": found["predicted"], "probabilities": found["probabilities"]}
    lines = [f"{p:7.3f}  {label}" for label, p in found["probabilities"].items()]
    return Answer(values, [f"labels: {', '.join(found['predicted']) or '(none)'}", *lines])


def predict_ranking(run: Run, images: ImageFeatures, path: Path, text: str, candidates: Sequence[str] | None) -> Answer:
    """How well ``text`` and the ``candidates`` fit the picture, the best first."""
    texts = list(dict.fromkeys([text, *(candidates or ())]))
    found = run.model.task.fits(one(run, images, CaptionSample(path.name, path.name, text)), texts)
    require_finite([path.name] * (not all(map(math.isfinite, found))), 1, str(run.folder))
    ranked = dict(sorted(zip(texts, found, strict=True), key=lambda pair: -pair[1]))
    values: dict[str, Any] = {"image": str(path), "text": text, "scores": ranked}
    if len(texts) > 1:
        values["rank"] = list(ranked).index(text) + 1
    return Answer(values, [f"{score:7.3f}  {words}" for words, score in ranked.items()])


def predict_mask(run: Run, images: ImageFeatures, path: Path, text: str, out: Path | None) -> Answer:
    picture = open_image(path.parent, path.name, run.config.data.max_pixels)
    sample = ReferSample.unlabelled(path.name, path.name, text, (picture.height, picture.width))
    predictions = run.model.task.predict(one(run, images, sample))
    predicted(run, predictions)
    mask = predictions[0].mask
    share = float(mask.mean())
    values: dict[str, Any] = {"image": str(path), "expression": text, "mask_share": share}
    lines = [f"{text!r}: {int(mask.sum())} of {mask.size} pixels ({100 * share:.1f} %)"]
    if out:
        values["files"] = write_mask(out, picture, text, mask)
        lines += [f"wrote {name}" for name in values["files"]]
    return Answer(values, lines, mask)


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
    report, text = survey(splits, data.image_root(root), out / f"{run_config.name}.png", data.max_pixels)
    known = answers_by_prompt(splits.get("train", ())) if run_config.task.section_name == "answer" else None
    report["cautions"] = [line for split, samples in splits.items() for line in told(samples, split, known)]
    return report, "\n".join([text, *report["cautions"]])


def told(samples: Sequence[Any], split: str, known: Mapping[str, Sequence[str]] | None) -> list[str]:
    """The cautions about a split, or why it cannot be scored at all."""
    try:
        return cautions(samples, split, known)
    except DataError as error:
        return [str(error)]
