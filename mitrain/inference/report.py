"""Tables and figures of finished runs: made from the runs' own checkpoints, never typed.

Runs of the same name are seeds of one experiment and are averaged; a run's rows carry its controls. The first run given
is the one whose predictions are drawn.
"""

import shutil
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from mitrain.core import markdown
from mitrain.core.errors import ConfigError
from mitrain.core.files import as_json, remedy, write_atomic
from mitrain.core.markdown import plain
from mitrain.core.provenance import made_with, sentence
from mitrain.data import figures
from mitrain.data.features import Features
from mitrain.data.images import to_size
from mitrain.inference import webpage
from mitrain.inference.scoring import masked_input, score_split, split_of
from mitrain.training import runs
from mitrain.training.baselines import baselines_of
from mitrain.training.evaluate import Evaluation
from mitrain.training.runs import Run

LABELS = {
    "none": "{name}",
    "other-inputs": "{name}, another sample's {inputs}",
    "shuffle": "{name}, another scene's expression",
    "frozen": "{name}, infusion left out",
}
PANELS = 16


def report(
    folders: Sequence[str], out: Path, splits: Sequence[str], samples: int | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Score every run on every split under its controls; write results.json, table.md, a figure per split and one HTML page
    to ``out``. The page is of the first run, with the scores of all."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    pictures: dict[str, bytes] = {}
    task: tuple[Any, str] | None = None
    shown: list[str] = []
    for position, folder in enumerate(folders):
        run = runs.open_run(folder)
        own_task = (run.model.task.columns, run.model.task.metric)
        if task not in (None, own_task):
            raise ConfigError(f"{folder} is a run of another task than {folders[0]}: report them separately")
        task = own_task
        for split in splits:
            own = score_with_controls(run, split, samples)
            if position == 0:
                files, chosen, plain_scores = own.pop("figure")
                pictures[f"{run.config.name}-{split}.png"] = figure(run, files, chosen, plain_scores, PANELS)
                shown += about(run, split, files, chosen, plain_scores)
            own.pop("figure", None)
            for label, values in own.items():
                rows[split, label].append({**values, "run": Path(folder).name, "seed": run.config.seed})
    limited = f" --samples {samples}" if samples else ""
    command = f"mitrain report {' '.join(Path(f).name for f in folders)} --splits {','.join(splits)}{limited}"
    results = {
        "columns": task[0],
        "metric": task[1],
        "made": {"command": command, **made_with(("torch", "transformers"))},
        "rows": [row(s, label, metrics) for name in splits for (s, label), metrics in rows.items() if s == name],
    }
    results["markdown"] = table(results)
    document = as_json({k: v for k, v in results.items() if k != "markdown"})
    own = {i for i, r in enumerate(results["rows"]) if r["label"] == results["rows"][0]["label"]}
    scores = webpage.section("Scores, and what they are read beside", webpage.table(*rows_of(results), own))
    html, _ = webpage.page(Path(folders[0]), [scores, *of_kinds(results), *shown])
    write(out, {**pictures, "results.json": document, "table.md": results["markdown"], webpage.NAME: html})
    return results


def about(run: Run, split: str, files: Features, samples: Sequence[Any], found: Evaluation) -> list[str]:
    """The page's sections on one split: classes, and samples that went right and wrong, spread evenly over either."""
    panels = []
    for right in (False, True, None):
        own = [i for i, p in enumerate(found.predictions) if p.values.get("correct") is right]
        for i in own[:: max(1, len(own) // PANELS)][:PANELS]:
            picture = picture_of(samples[i], files)
            panels.append(run.model.task.panel(samples[i], found.predictions[i], picture))
    sheet = webpage.section(f"Samples of {split}, the wrong ones first", webpage.sheet(panels))
    return [*webpage.of_classes(run.model.task.details(samples, found.predictions), split), sheet]


def of_kinds(results: dict[str, Any]) -> list[str]:
    """A section for each split whose samples are of several kinds: the metric of each kind, under every label."""
    return [
        webpage.section(f"{results['metric']} of {split}, kind by kind", webpage.table(head, cells) if cells else "")
        for split, head, cells in kind_by_kind(results)
    ]


def kind_by_kind(results: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Each split with the head and the rows, one a kind, of a table of the metric; no rows where there is one kind."""
    start = f"{results['metric']}/"
    for split in dict.fromkeys(r["split"] for r in results["rows"]):
        own = [r for r in results["rows"] if r["split"] == split]
        keys = [key for key in own[0]["mean"] if key.startswith(start)]
        cells = [[key.removeprefix(start), *(cell(r, key) for r in own)] for key in keys]
        yield split, ["kind", *(r["label"] for r in own)], cells


def write(out: Path, files: dict[str, bytes | str]) -> None:
    """Write ``files`` to the folder ``out``; a folder that was not there is gone again where that fails."""
    made = not out.exists()
    try:
        for name, content in files.items():
            write_atomic(out / name, content)
    except OSError as error:
        if made:
            shutil.rmtree(out, ignore_errors=True)
        raise ConfigError(
            f"cannot write the report to {str(out)!r} ({error.strerror or error}): {remedy(error)} or give another --out"
        ) from None


def score_with_controls(run: Run, split: str, samples: int | None) -> dict[str, Any]:
    """Metrics by row label; the plain evaluation with its samples under "figure"."""
    chosen, files = split_of(run, split, samples)
    name = run.config.name
    plain = score_split(run, chosen, files, "none", generate=run.model.task.speaks, seed=run.config.seed)
    scores: dict[str, Any] = {name: plain.metrics, "figure": (files, chosen, plain)}
    shown = " and ".join(each for each in run.config.data.inputs if each != run.model.task.keeps)
    blind = not run.model.adapter.traits.text_depends_on_input
    for control in run.model.task.controls if shown else ():
        if not (blind and control == "frozen"):
            scores[LABELS[control].format(name=name, inputs=shown)] = score_split(
                run, chosen, files, control, seed=run.config.seed
            ).metrics
    for other in run.config.data.inputs if run.model.task.decodes else ():
        if other != masked_input(run):  # what the decoder sees stays
            label = LABELS["other-inputs"].format(name=name, inputs=other)
            scores[label] = score_split(run, chosen, files, "none", seed=run.config.seed, shuffled=[other]).metrics
    return scores | baselines_of(run, split, chosen, files)


def row(split: str, label: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row: mean and spread over the seeds of every number."""
    flat = [flatten(values) for values in runs]
    means = {k: statistics.fmean(f[k] for f in flat) for k in flat[0] if all(k in f for f in flat)}
    spread = {k: statistics.stdev(f[k] for f in flat) if len(flat) > 1 else 0.0 for k in means}
    return {
        "split": split,
        "label": label,
        "seeds": len(runs),
        "mean": means,
        "spread": spread,
        "runs": [run["run"] for run in runs],
    }


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    out: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{key}@")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "seed":
            out[prefix + key] = float(value)
    return out


def table(results: dict[str, Any]) -> str:
    """The Markdown table: one row per label and split; and of each split with several kinds of samples one row per kind."""
    tables = [rows_of(results), *(([f"{split}, {h[0]}", *h[1:]], rows) for split, h, rows in kind_by_kind(results) if rows)]
    lines = [[*markdown.table(list(map(plain, head)), [list(map(plain, row)) for row in rows]), ""] for head, rows in tables]
    return "\n".join([*chain.from_iterable(lines), sentence(results["made"]), ""])


def rows_of(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table's head and rows, as text."""
    columns = [(title, key) for title, key in results["columns"] if any(key in r["mean"] for r in results["rows"])]
    head = ["split", "", *(title for title, _ in columns), "samples", "seeds"]
    return head, [
        [r["split"], r["label"], *(cell(r, key) for _, key in columns), f"{r['mean']['samples']:.0f}", str(r["seeds"])]
        for r in results["rows"]
    ]


def cell(r: dict[str, Any], key: str) -> str:
    if key not in r["mean"]:
        return "–"
    spread = f" ± {r['spread'][key]:.3f}" if r["seeds"] > 1 else ""
    return f"{r['mean'][key]:.3f}{spread}"


def figure(run: Run, files: Features, samples: Sequence[Any], evaluation: Evaluation, count: int) -> bytes:
    """A PNG of the predictions of ``count`` samples spread evenly over each kind of ``samples``: not picked.

    DataError where a picture was replaced since it was scored.
    """
    pairs = spread(list(zip(samples, evaluation.predictions, strict=True)), count)
    panels = [run.model.task.panel(sample, prediction, picture_of(sample, files)) for sample, prediction in pairs]
    with BytesIO() as buffer:
        figures.sheet(panels).save(buffer, format="PNG")
        return buffer.getvalue()


def spread(pairs: list[tuple[Any, Any]], count: int) -> list[tuple[Any, Any]]:
    """About ``count`` samples with their predictions, kind by kind, as many of each.

    In files kinds often take turns, so that one step through all of them would meet the same kind again and again. Each
    begins elsewhere, or all would show the first picture.
    """
    kinds: dict[str, list[tuple[Any, Any]]] = {}
    for pair in pairs:
        kinds.setdefault(getattr(pair[0], "kind", None) or "", []).append(pair)
    share, found = max(1, count // len(kinds)) if kinds else 0, []
    for number, own in enumerate(kinds.values()):
        step = max(1, len(own) // share)
        step -= step > 3 and step % 2 == 0  # an odd one, as yes and no take turns, too
        found += own[step * number // len(kinds) :: step][:share]
    return found[:count]


def picture_of(sample: Any, files: Features) -> Image.Image:
    """What stands for the sample in a figure: its picture, as its annotation was made on it, or the name of its files."""
    for source, group in sorted(files.groups, key=lambda each: each[0] != "image"):  # not the picture that it refers to
        if source in sample.inputs and group.shows:
            picture = group.content(sample.inputs[source])
            return to_size(picture, sample.size) if hasattr(sample, "size") else picture
    return figures.card([f"{name}: {file}" for name, file in sample.inputs.items()])
