"""The model card: what a published adapter is, what it was made of, how it scores, and how it is loaded."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from mitrain.core.hub import PREFIX
from mitrain.core.markdown import code, plain, table
from mitrain.methods.export_format.contents import Contents, RunPart
from mitrain.methods.export_format.hub import HUB_NAME

BY_PEFT = {
    "adapter_config.json": 'peft.PeftModel.from_pretrained(model, "THIS_FOLDER")',
    "llm/adapter_config.json": 'peft.PeftModel.from_pretrained(model, "THIS_FOLDER/llm")',
    "encoder/adapter_config.json": 'peft.PeftModel.from_pretrained(encoder, "THIS_FOLDER/encoder")',
}
UNKNOWN = "not known to mitrain"
LEFT_OUT = ("model", "adapter", "data", "telemetry", "wandb")


def model_card(contents: Contents, licences: Mapping[str, str] | None = None, alone: bool = True) -> str:
    """Markdown; ``licences`` of models and data by the names that the configuration gives them.

    ``alone``: the adapter can also be attached to a language model by itself.
    """
    licences = licences or {}
    run, settings = contents.run, [[plain(key), code(json.dumps(value))] for key, value in contents.adapter.items()]
    blocks = [
        front_matter(contents),
        f"# {plain(title(contents))}",
        f"A {plain(contents.adapter['name'])} adapter trained with mitrain {plain(contents.mitrain_version)}. The frozen"
        " weights are not in this folder.",
        "\n".join(["## Base", "", *base_lines(contents, licences)]),
        "\n".join(["## Method", "", *table(["setting", "value"], settings), "", parameter_line(contents)]),
    ]
    if run:
        blocks += [
            "\n".join(["## Encoders", "", *encoder_lines(run, licences)]),
            "\n".join(["## Data", "", *data_lines(run, licences)]),
            "\n".join(["## Metrics", "", metric_line(run), "", *metric_table(run)]),
            "\n".join(["## Training", "", "```json", training(run), "```"]),
        ]
    blocks.append("\n".join(["## Loading", "", *loading_lines(contents, alone)]))
    return "\n\n".join(blocks) + "\n"


def shown(name: str) -> str:
    """A model's or data set's name; of a folder its last part alone."""
    return Path(name).name if Path(name).is_absolute() or name.startswith(("~", ".")) else name


def title(contents: Contents) -> str:
    name = contents.run.config.get("name", "adapter") if contents.run else f"{contents.adapter['name']} adapter"
    return f"{name} on {shown(contents.base_model_name_or_path)}"


def front_matter(contents: Contents) -> str:
    base, run = contents.base_model_name_or_path, contents.run
    results = list(model_index(run)) if run else []
    data = ModelCardData(
        library_name="mitrain",
        tags=["mitrain", "adapter", word(contents.adapter["name"])],
        base_model=base if HUB_NAME.fullmatch(base) and not os.path.exists(base) else None,
        datasets=[known] if run and (known := hub_dataset(run.config["data"].get("source") or "")) else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        eval_results=results or None,
        model_name=word(title(contents)),
    )
    return f"---\n{data.to_yaml()}\n---"


def hub_dataset(source: str) -> str | None:
    """The id of a data set on the Hub that ``data.source`` names; None for a folder and for what mitrain prepared."""
    name = source.removeprefix(PREFIX).partition(":")[0]
    there = source.startswith(PREFIX) and not os.path.exists(os.path.expanduser(name))
    return name if there and re.fullmatch(rf"{HUB_NAME.pattern}|[\w][\w.-]*", name, re.ASCII) else None


def word(name: Any) -> str:
    """A name without what is markup to anyone who shows the metadata."""
    return re.sub(r"[^\w@+./ -]", "_", str(name))[:200]


def model_index(run: RunPart) -> Iterator[EvalResult]:
    """The scores as the Hub lists them, of each split: fractions, without how many samples there were."""
    data = run.config["data"]
    source = data.get("source") or ""
    known = hub_dataset(source) if source.startswith(PREFIX) else source  # not a folder of somebody's
    name = word(known or data.get("dataset") or "own data")
    for split, metrics in run.metrics.items():
        for metric, value in flattened(metrics):
            if isinstance(value, float):
                task, kind = word(run.config["task"]["name"]), word(data["name"])
                yield EvalResult(task, kind, name, word(metric), value, dataset_split=word(split))


def base_lines(contents: Contents, licences: Mapping[str, str]) -> list[str]:
    base, name = contents.base, contents.base_model_name_or_path
    return [
        f"Language model: {code(shown(name))}, licence: {licences.get(name, UNKNOWN)}.",
        "",
        *table(["", ""], [[key.replace("_", " "), plain(value)] for key, value in base.to_dict().items()]),
    ]


def parameter_line(contents: Contents) -> str:
    count = contents.parameters
    if not count.frozen:
        return f"Trainable parameters: {count.trainable:,}, the language model's own among them: none of it is frozen."
    share = 100 * count.trainable / count.frozen
    return (
        f"Trainable parameters: {count.trainable:,}, {share:.3g} % of the {count.frozen:,} frozen ones of the language"
        " model."
    )


def encoder_lines(run: RunPart, licences: Mapping[str, str]) -> list[str]:
    settings = list(run.config["model"]["encoders"].values())
    rows = []
    for setting, part in zip(settings, run.encoders, strict=True):
        own = {key: value for key, value in setting.items() if key != "name" and value not in (None, [], "", "auto")}
        how = f"{part.preprocess.size} px, {part.preprocess.resize}" if part.preprocess else ""
        name, licence = shown(setting["name"]), licences.get(setting["name"], UNKNOWN)
        rows.append([code(name), str(part.shape.width), how, code(json.dumps(own)), licence])
    return table(["encoder", "feature width", "pictures", "settings", "licence"], rows)


def data_lines(run: RunPart, licences: Mapping[str, str]) -> list[str]:
    data = run.config["data"]
    name = data.get("source") or ""
    known = hub_dataset(name)
    what = (
        f"{code(known)} on the Hugging Face Hub"
        if known
        else f"{code(name)}, prepared by mitrain"
        if name and not name.startswith(PREFIX)
        else plain(data.get("dataset") or "A data set of the user's own")
    )
    line = f"{what}. Licence: {licences.get(name, UNKNOWN)}."
    answers = (
        f"Training prompts whose answers are in `mitrain.json`: {len(run.answers)}; for others give candidates."
        if run.answers
        else ""
    )
    return [line, *(["", answers] if answers else [])]


def metric_line(run: RunPart) -> str:
    chosen = "the best on val" if run.best else "not the best on val"
    return f"Of the checkpoint at step {run.step} ({chosen}), which is the one in this folder."


def metric_table(run: RunPart) -> list[str]:
    rows = [
        [plain(split), str(run.step), plain(name), f"{value:.4f}" if isinstance(value, float) else plain(value)]
        for split, metrics in run.metrics.items()
        for name, value in flattened(metrics)
    ]
    return table(["split", "step", "metric", "value"], rows) if rows else ["None were recorded at this step."]


def flattened(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def training(run: RunPart) -> str:
    kept = {key: value for key, value in run.config.items() if key not in LEFT_OUT}
    text = json.dumps(kept, indent=2, ensure_ascii=False)
    return re.sub("[<>&`]", lambda match: f"\\u{ord(match[0]):04x}", text)  # inside strings alone; JSON still


def loading_lines(contents: Contents, alone: bool) -> list[str]:
    infuses = contents.adapter["name"] == "mit"  # others are given features by `conditioned`, or none
    name = shown(contents.base_model_name_or_path)
    whole = [
        'predictor = mitrain.from_pretrained("THIS_FOLDER")  # or base="path/to/the/language/model", quantize="int8"',
        'predictor.predict("photo.jpg", "the prompt or the expression")',
    ]
    attached = [
        'adapter, normalize = mitrain.load_adapter(model, "THIS_FOLDER")  # model: a transformers model in memory',
        *(["model(input_ids=ids, infused=adapter.modalities_of(normalize(features)))"] if contents.run and infuses else []),
    ]
    lines = ["import mitrain", *(whole if contents.run else []), *(attached if alone else [])]
    lines += [f"{line}  # by PEFT without mitrain" for name, line in BY_PEFT.items() if name in (contents.peft or {})]
    shape = f"The frozen language model ({code(name)}) must have the shape above."
    return [f"{shape} {by_peft(contents)}", "", "```python", *lines, "```"]


def by_peft(contents: Contents) -> str:
    """What PEFT makes of the folder, and what is then left out of what was scored."""
    if contents.peft is None:
        return "PEFT cannot hold this adapter and finds none in this folder: mitrain loads it."
    what = "language model" if "adapter_config.json" in contents.peft else "models that it changes, each by itself,"
    left = " The task head and the statistics of features are in `mitrain.safetensors` alone." if contents.run else ""
    return f"PEFT loads the adapter of the {what} and nothing else.{left}"
