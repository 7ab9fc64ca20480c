"""Scoring a split, as it is and under negative controls."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from mitrain.core import dist, user_code
from mitrain.core.errors import ConfigError, DataError
from mitrain.data.features import Features, Inputs
from mitrain.tasks import controls
from mitrain.tasks.base import Prediction, require_finite
from mitrain.training.build import Model

Control = Literal["none", "shuffle", "other-inputs", "other-text", "frozen"]
CONTROLS: tuple[Control, ...] = get_args(Control)
NOTHING: Mapping[str, float] = MappingProxyType({})


@dataclass
class Evaluation:
    """Metrics of a split and every sample's prediction."""

    metrics: dict[str, Any]
    predictions: list[Prediction]


def evaluate(
    model: Model,
    files: Features,
    samples: Sequence[Any],
    *,
    control: str = "none",
    without: Mapping[str, float] = NOTHING,
    shuffled: Sequence[str] = (),
    seed: int = 0,
    batch: int = 32,
    generate: bool = False,
    what: str = "evaluation",
    progress: Callable[[int], object] = lambda done: None,
) -> Evaluation:
    """Score ``samples``.

    ``control``: ``none``; ``other-inputs``: every sample is given another sample's files (of another object where
    possible), in every path; ``shuffle``: for `segment` the expression is another scene's, naming no object of this one;
    for the others the files are permuted without regard to objects (how many stay within one is counted all the same);
    ``other-text``: for `classify` and `regress` each sample keeps its files and is given another sample's text (of another
    object where possible); ``frozen``: the model without infusion.

    ``without``: of each of these inputs the share of the samples that are scored without it; ``shuffled``: inputs of which
    every sample is given another sample's file.

    UserError where a score would be made of numbers that are not finite; ``what`` says of which evaluation.
    """
    if not samples:
        raise DataError(f"{what}: there is no sample to score; give a split that has some")
    if model.task.own_metric:
        user_code.function("task.metric", model.task.own_metric)  # refused before anything is predicted
    shown, inputs, clashes = controlled(samples, model.task.shuffles, control, seed)
    if kept := model.task.keeps:
        inputs = [{**given, kept: sample.inputs[kept]} for given, sample in zip(inputs, samples, strict=True)]
    for name in shuffled:
        inputs = with_others(inputs, name, seed)
    for name, share in without.items():
        inputs = lacking(inputs, name, share, seed)
    kwargs = {"generate": True} if generate or model.task.must_generate(shown) else {}

    order = model.task.order(shown)

    def predict(start: int) -> list[Prediction]:
        part = order[start : start + batch]
        asked, given = [shown[i] for i in part], [inputs[i] for i in part]
        prepared = model.evaluation_batch(asked, given, files, blind=control == "frozen")
        return model.task.predict(prepared, **kwargs)

    made = by_all_ranks(predict, range(0, len(samples), batch), progress)
    predictions = [prediction for _, prediction in sorted(zip(order, made, strict=True), key=lambda pair: pair[0])]
    require_finite([p.id for p in predictions if not p.finite], len(predictions), what)
    metrics = {**model.task.score(samples, predictions), "control": control, **clashes}
    if model.task.own_metric:
        metrics |= user_code.score(model.task.own_metric, samples, predictions, metrics)
    metrics |= {"without": dict(without)} if without else {}
    metrics |= {"shuffled": list(shuffled)} if shuffled else {}
    return Evaluation(metrics, predictions)


def by_all_ranks(
    predict: Callable[[int], list[Prediction]], starts: range, progress: Callable[[int], object]
) -> list[Prediction]:
    """All predictions, on every rank: ranks take the batches in turn, the same batches that one process would make (and
    one of them again while others still have some)."""
    done: dict[int, list[Prediction]] = {}
    for start, own in dist.lockstep(starts[dist.rank() :: dist.world()], 0):
        made = predict(start)
        if own:
            done[start] = made
            progress(len(made))
    parts = {start: part for ranks in dist.gather(done) for start, part in ranks.items()}
    return [prediction for start in sorted(parts) for prediction in parts[start]]


def controlled(
    samples: Sequence[Any], shuffles: str, control: str, seed: int
) -> tuple[list[Any], list[Inputs], dict[str, Any]]:
    """The samples and the inputs to show with each, and what the control could not fulfil.

    ``shuffles``: see `Task`; with ``files`` all samples of a file are given the same other one.
    """
    given = [s.inputs for s in samples]
    # What a second picture beside it shows does not make a scene another one.
    own = [s.inputs.get("image", s.files) if shuffles == "expressions" else s.files for s in samples]
    objects = [s.object or s.id for s in samples]
    if control in ("none", "frozen"):
        return list(samples), given, {}
    if control == "other-text":
        pairing = controls.other_files(texts_of(samples, shuffles), objects, seed=seed, what="text")
        exchanged = [replace(s, text=samples[i].text) for s, i in zip(samples, pairing.index, strict=True)]
        return exchanged, given, {"control_clashes": pairing.clashes}
    if control == "shuffle" and shuffles == "expressions":
        pairing = controls.other_expressions(
            [s.expression for s in samples],
            [s.object for s in samples],
            own,
            {name: s.present for name, s in zip(own, samples, strict=True)},
            seed,
        )
        swapped = [replace(s, expression=samples[i].expression) for s, i in zip(samples, pairing.index, strict=True)]
        return swapped, given, {"control_clashes": pairing.clashes}
    if shuffles == "files":
        named = dict(zip(own, objects, strict=True))
        files, objects = list(named), list(named.values())
    else:
        files = own
    pairing = controls.other_files(files, files if control == "shuffle" else objects, seed=seed)
    first = dict(zip(own, given, strict=True))
    shown = {file: first[files[i]] for file, i in zip(files, pairing.index, strict=True)}
    exchanged = [shown[file] for file in own] if shuffles == "files" else [given[i] for i in pairing.index]
    same = sum(objects[i] == objects[j] for i, j in enumerate(pairing.index))  # of shuffle too, which does not avoid it
    return list(samples), exchanged, {"control_clashes": {"object": same}}


def lacking(inputs: Sequence[Inputs], name: str, share: float, seed: int) -> list[Inputs]:
    """The inputs, those of a ``share`` of the samples without ``name``; a larger share takes more of them."""
    order = random.Random(f"{seed}/{name}").sample(range(len(inputs)), len(inputs))
    gone = set(order[: round(share * len(inputs))])
    return [{k: f for k, f in own.items() if k != name or i not in gone} for i, own in enumerate(inputs)]


def with_others(inputs: Sequence[Inputs], name: str, seed: int) -> list[Inputs]:
    """The inputs, each sample that has ``name`` with another one's; DataError where there are no two different ones."""
    having = [i for i, own in enumerate(inputs) if name in own]
    files = [inputs[i][name] for i in having]
    if len(set(files)) < 2:
        raise DataError(f"no two samples have a different {name!r}: there is nothing to shuffle")
    pairing = controls.other_files(files, files, seed=seed, what=name)
    given = {i: files[j] for i, j in zip(having, pairing.index, strict=True)}
    return [{**own, name: given[i]} if i in given else own for i, own in enumerate(inputs)]


def texts_of(samples: Sequence[Any], shuffles: str) -> list[str]:
    """The samples' own texts; ConfigError where they are none that stand beside other inputs."""
    if shuffles != "samples" or not all(isinstance(getattr(s, "text", None), str) for s in samples):
        raise ConfigError(
            "the control other-text exchanges the texts that `classify` and `regress` read beside other inputs; this task"
            " has none: use shuffle or other-inputs"
        )
    return [s.text for s in samples]
