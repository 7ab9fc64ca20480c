"""What a finished run is asked: a split's metrics, one sample's answer or mask; and what a data set holds."""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from PIL import Image

from mitrain.core import dist, glance
from mitrain.core.errors import ConfigError, DataError, UserError
from mitrain.core.files import atomic_folder, write_atomic
from mitrain.data import figures
from mitrain.data.features import Features
from mitrain.data.formats.rle import encode_mask
from mitrain.data.images import open_image
from mitrain.data.inspection import inspect_splits
from mitrain.data.media import Limits
from mitrain.data.samples import BadSamples, Sample
from mitrain.data.sources import ConversationsConfig, DataSection, limit, portion
from mitrain.models.digests import frozen_digest
from mitrain.tasks import TASKS
from mitrain.tasks.answer import answers_by_prompt
from mitrain.tasks.base import Answer, Batch, Prediction, Question, Task, cautions
from mitrain.tasks.language import speaking, told_to_speak
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


def split_of(run: Run, split: str, samples: int | None = None) -> tuple[list[Any], Features]:
    """A split's samples (at most ``samples``, evenly spread) that can be read, and their files' features."""
    data = run.config.data
    root = resolve_data(data)
    files = run.model.features(data.file_root(root), BadSamples(data.bad_samples, data.bad_share))
    chosen = files.readable(limit(data.read(root, split), samples), run.config.features.eval_views)
    if not chosen:
        raise DataError(f"no sample of the split {split!r} can be read: check the data folder {root}")
    if run.model.task.remembers:
        recall(run, scoring=True)
    if dist.world() > 1:
        require_same(fingerprint(run.config.to_dict(), {split: chosen}, files.contents, run.model.base) | trained_parts(run))
    for line in cautions(run.model.task, chosen, f"the split {split!r}", getattr(run.model.task, "known", None)):
        log.warning(line)
    run.model.states.prepare(run.model.texts(chosen, True))
    return chosen, files


def trained_parts(run: Run) -> dict[str, str]:
    """The checkpoint, and the answers that training gave, for `mitrain.training.fingerprint`."""
    parts = {f"checkpoint.{name}": frozen_digest(module) for name, module in run.model.trainable.items()}
    parts["data.train.answers"] = sorted(getattr(run.model.task, "known", {}).items())
    return {"checkpoint.step": str(run.saved.step), **{name: digest([value]) for name, value in parts.items()}}


def score_split(
    run: Run, samples: list[Any], files: Features, control: str, generate: bool = False, seed: int = 0, **changed: Any
) -> Evaluation:
    """Metrics and predictions of prepared ``samples``; ``changed``: ``without`` and ``shuffled`` of `evaluate`."""
    if generate and not run.model.task.speaks:
        raise ConfigError("--generate lets the model speak, which only the tasks 'answer' and 'caption' do: leave it out")
    batch = run.config.train.eval_batch
    what = f"{run.folder} at step {run.saved.step}"
    return evaluate(
        run.model, files, samples, control=control, seed=seed, batch=batch, generate=generate, what=what, **changed
    )


def recall(run: Run, scoring: bool = False) -> None:
    """Let the task know the answers that training gave: an export's, or the data's, which ``scoring`` reads anyway."""
    if run.answers or (run.answers is not None and not scoring):
        run.model.task.known = run.answers
        return
    try:
        samples = run.config.data.read(resolve_data(run.config.data), "train")
    except UserError as error:
        log.warning("the training split cannot be read, so that its answers are not known: %s", error)
        run.answers = {}  # said once
        return
    run.model.task.remember(portion(samples, run.config.train.fraction))
    run.answers = run.model.task.known


def score_run(
    folder: str | Path,
    *,
    split: str,
    control: str = "none",
    without: Sequence[str] = (),
    shuffled: Sequence[str] = (),
    missing: Sequence[str] = (),
    samples: int | None = None,
    generate: bool = False,
    seed: int = 0,
    baselines: bool = False,
    root: str | None = None,
    out: str | Path | None = None,
    generation: Mapping[str, Any] | None = None,
    details: bool = False,
    **opening: Unpack[runs.Opening],
) -> dict[str, Any]:
    """The metrics of a run's checkpoint on a split under a control, and those of the ``baselines`` if asked for.

    ``details``: also the scores of each class, and which are taken for which, by the classes' names.

    ``without``, ``shuffled``: inputs that no sample is shown, or another sample's; ``missing``: inputs for each of which the
    score is also told where a growing share of the samples lacks it.
    ``root``: the folder of the data, where it is another than the run's; ``opening``: as `runs.open_run` takes it.
    ``out``: a new file for each sample's prediction. ``generation``: as in `ask_all`, told beside the metrics.
    """
    if out is not None and Path(out).exists():
        raise ConfigError(f"--out {str(out)!r} exists: give a new file for the predictions")
    if samples is not None and samples < 1:
        raise ConfigError(f"--samples {samples} scores nothing: give at least 1")
    run = runs.open_run(folder, **opening)
    for name in (*without, *shuffled, *missing):
        if name not in run.config.data.inputs:
            raise ConfigError(f"{name!r} is none of this run's inputs: it reads {', '.join(run.config.data.inputs)}")
    set_data_root(run, root)
    if generation:
        run.model.task.config = told_to_speak(run.model.task, generation)
    generate = generate or bool(generation)
    chosen, files = split_of(run, split, samples)
    gone = dict.fromkeys(without, 1.0)
    scored = partial(score_split, run, chosen, files, control, generate, seed, shuffled=shuffled)
    evaluation = scored(without=gone)
    if out is not None and dist.is_main():
        lines = [{"id": p.id, **p.inputs, **values_of(p)} for p in evaluation.predictions]
        write_atomic(Path(out), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    beside: dict[str, Any] = {"generation": dict(generation)} if generation else {}
    beside |= {"baselines": baselines_of(run, split, chosen, files)} if baselines else {}
    if details:
        beside |= run.model.task.details(chosen, evaluation.predictions)
    metric = run.model.task.metric
    for name in missing:
        lost = {f"{share:.0%}": scored(without=gone | {name: share}).metrics[metric] for share in SHARES}
        beside[f"{metric}_without_{name}"] = {"0%": evaluation.metrics[metric], **lost}
    if len(files.bad):
        beside["bad_samples"] = len(files.bad)
    return {**evaluation.metrics, "split": split, "step": run.saved.step, "run": str(folder), **beside}


SHARES = (0.25, 0.5, 0.75, 1.0)  # of samples that lack an input
Files = Mapping[str, str | Path]
"""One file for each of a run's inputs, by their names."""


@dataclass(frozen=True)
class Asked:
    """A file for each of a run's inputs, a text about them, and what the user lets the model choose among.

    ``turns``: of a conversation that has gone on, its questions and answers up to the question now; ``text`` has them as
    lines."""

    files: Files
    text: str = ""
    candidates: Sequence[str] | None = None
    turns: tuple[str, ...] = ()

    @property
    def paths(self) -> dict[str, Path]:
        return {name: Path(file).expanduser() for name, file in self.files.items()}

    @property
    def others(self) -> dict[int, Path]:
        """The candidates, where they are files."""
        return {number: Path(file).expanduser() for number, file in enumerate(self.candidates or ())}


def ask(
    run: Run,
    files: Files,
    text: str,
    *,
    candidates: Sequence[str] | None = None,
    out: str | None = None,
    generation: Mapping[str, Any] | None = None,
) -> Answer:
    """What an opened run says of one sample's files. Threads may share the run: they take turns."""
    if out and not run.model.task.decodes:
        raise ConfigError("--out writes a mask, which only the task 'segment' has: leave it out")
    asked = Asked(files, text, candidates)
    (answer,) = ask_all(run, [asked], generation=generation)
    if isinstance(answer, UserError):
        raise answer
    if not out:
        return answer
    root, inputs = together(asked.paths)
    picture = open_image(root, inputs[masked_input(run)], run.config.data.max_pixels)
    written = write_mask(Path(out), picture, text, answer.mask)
    lines = [*answer.lines, *(f"wrote {name}" for name in written)]
    return replace(answer, values={**answer.values, "files": written}, lines=lines)


def masked_input(run: Run) -> str:
    """The input that a run's masks are of: what the first encoder with levels reads."""
    return next(part.input for part in run.config.model.encoders.values() if getattr(part, "levels", ()))


def ask_all(
    run: Run,
    asked: Sequence[Asked],
    infused: bool = True,
    generation: Mapping[str, Any] | None = None,
    hear: Callable[[str], None] | None = None,
) -> list[Answer | UserError]:
    """What an opened run says of several samples, asked together; of each that it cannot be asked about, why.

    ``infused`` False: the text is answered without the other inputs. ``generation``: settings of the task by which it
    speaks, in place of the run's. ``hear`` is told piece by piece what is said of a sample that is asked about alone.
    Threads may share the run: they take turns.
    """
    found: dict[int, Answer | UserError] = {}
    for i, one in enumerate(asked):
        try:
            glance.words(one.text, one.candidates)
            check_asked(one.files, one.text, run.config.data, run.model.task.reads_no_text)
            check_turns(one, run)
        except UserError as error:
            found[i] = error
    others = [one.others if run.model.task.keeps else {} for one in asked]  # candidates that are files
    wanted = [one.paths | others[i] for i, one in enumerate(asked)]
    root, paths = together({(i, n): p for i, part in enumerate(wanted) if i not in found for n, p in part.items()})
    features = run.model.features(root, cached=False)

    def see(samples: Sequence[Any]) -> Batch:
        return run.model.evaluation_batch(samples, [s.inputs for s in samples], features, blind=not infused)

    questions: dict[int, Question] = {}
    for i, one in enumerate(asked):
        if i in found:
            continue
        inputs = {name: paths[i, name] for name in one.files}
        try:
            features.contents(Sample("", inputs))  # what cannot be read is said first
        except UserError as error:
            found[i] = error
            continue
        names, shown = " ".join(path.name for path in one.paths.values()), {n: str(p) for n, p in one.paths.items()}
        decoded = cache(partial(features.content, inputs))
        seen = lambda sample: see([sample])  # noqa: E731
        what, choices = str(run.folder), [paths[i, n] for n in others[i]] or one.candidates or ()
        questions[i] = Question(names, inputs, shown, one.text, choices, seen, decoded, what, one.turns)
    with run.turn, speaking(run.model.task, generation or {}, hear), run.model.adapter.conditioned(None):  # not a caller's
        if run.model.task.remembers and not all(question.candidates for question in questions.values()):
            recall(run)
        found |= answered(run.model.task, questions, see)
    return [found[i] for i in range(len(asked))]


def answered(
    task: Task, questions: Mapping[int, Question], see: Callable[[Sequence[Any]], Batch]
) -> dict[int, Answer | UserError]:
    """The answers; where one question cannot be answered, the others are asked without it."""
    if not questions:
        return {}
    try:
        return dict(zip(questions, task.answers(list(questions.values()), see), strict=True))
    except UserError as error:
        if len(questions) == 1:
            return dict.fromkeys(questions, error)
        return {i: answer for i, one in questions.items() for answer in answered(task, {i: one}, see).values()}


def check_asked(files: Files, text: str, data: DataSection, no_text: bool) -> None:
    """ConfigError where ``files`` are not those that a run reads, or there is no text where it needs one."""
    inputs, may_lack = data.inputs, data.may_lack
    if unknown := [name for name in files if name not in inputs]:
        raise ConfigError(f"--input {unknown[0]}=… is none of this run's inputs: it reads {', '.join(inputs)}")
    if absent := [name for name in inputs if name not in files and name not in may_lack]:
        raise ConfigError(f"this run reads {', '.join(inputs)}: give --input {absent[0]}=FILE")
    if not text.strip() and not no_text:
        raise ConfigError("the text is empty: give the prompt, or the expression to segment, with --text")


def check_turns(asked: Asked, run: Run) -> None:
    """What was said before is read by ``task.turn``, or from lines of text as training had them."""
    turn = getattr(run.config.task, "turn", "")
    if asked.turns and not turn and not isinstance(run.config.data, ConversationsConfig):
        raise ConfigError(
            "this run was trained on single questions, without a chat template or task.turn for what was said"
            " before: ask one question"
        )


def together(files: Mapping[Any, Path]) -> tuple[Path, dict[Any, str]]:
    """A folder that all ``files`` are in, and their paths below it."""
    paths = {name: Path(os.path.abspath(path)) for name, path in files.items()}
    root = Path(os.path.commonpath([path.parent for path in paths.values()])) if paths else Path.cwd()
    return root, {name: str(path.relative_to(root)) for name, path in paths.items()}


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


def values_of(answer: Answer | Prediction) -> dict[str, Any]:
    """An answer or a prediction as JSON values; a mask as COCO's run lengths."""
    if answer.mask is None:
        return answer.values
    return {**answer.values, "mask": encode_mask(answer.mask)}


def inspect_data(config: str, assignments: Sequence[str], out: Path) -> tuple[dict[str, Any], str]:
    """Report on every split of a configuration's data, and write its contact sheet to ``out``."""
    run_config = schema.load(config, list(assignments))
    data = run_config.data
    root = resolve_data(data)
    splits = {split: data.read(root, split) for split in data.split_names(root)}
    task = TASKS[run_config.task.section_name]
    sheet, cache = out / f"{run_config.name}.png", cache_root(run_config)
    media = {section.input: section.takes for section in reversed(run_config.model.encoders.values())}
    limits, folder = Limits(data.max_pixels), data.file_root(root)
    report, text = inspect_splits(task, splits, folder, sheet, limits, media, cache=cache)
    known = answers_by_prompt(splits.get("train", ())) if task.remembers else None
    report["cautions"] = []
    for split, samples in splits.items():
        try:
            report["cautions"] += cautions(task, samples, split, known)
        except DataError as error:  # it cannot be scored at all
            report["cautions"].append(str(error))
    return report, "\n".join([text, *report["cautions"]])
