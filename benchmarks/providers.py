"""``mitrain bench step --providers``: a step of MiT beside what else one would train on the same frozen language model.

Each provider is an adapter of `mitrain.methods` (LoRA is PEFT's) with the same head on the mean of the final states, the
same texts of so many tokens and the same pictures, which the frozen encoder has seen before. They take turns, each time in a
fresh process of one thread, so that whatever else the machine does falls on all of them. ``mit-cached`` has the states that
enter the first infused layer from the cache, and holds no weights below it; ``mit-cached-recomputed`` also computes what is
in the infused layers again for the backward pass. ``lora-all-hf-loop`` is ``lora-all`` in the loop of transformers' Trainer.
Bytes are counted on tensors (`mitrain.compare.measures`).
"""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import hf_loop, ranks
from benchmarks.faults import world
from mitrain.compare import measures
from mitrain.core import markdown
from mitrain.core.errors import ConfigError, UserError
from mitrain.core.files import write_json
from mitrain.core.provenance import digest, made_with, sentence
from mitrain.data.hidden_states import TextStates
from mitrain.training import schema
from mitrain.training.trainer import Trainer

LIMIT_S = 3600.0
WARM_UP = 1
FIRST = "lora-all"  # what the ratios are to
ALL = ["q", "k", "v", "o", "mlp"]
PROVIDERS: Mapping[str, Mapping[str, Any]] = {
    FIRST: {"name": "lora", "targets": ALL, "rank": 16, "alpha": 32},
    "lora-all-hf-loop": {"name": "lora", "targets": ALL, "rank": 16, "alpha": 32},
    "lora-qv": {"name": "lora", "targets": ["q", "v"], "rank": 16, "alpha": 32},
    "mit": {"name": "mit", "layers": "last third"},
    "mit-cached": {"name": "mit", "layers": "last third"},
    "mit-cached-recomputed": {"name": "mit", "layers": "last third"},
    "visual-prefix": {"name": "visual-prefix", "tokens": None},
    "visual-prefix-lora": {"name": "visual-prefix", "tokens": None, "lora_rank": 16},
    "full": {"name": "full"},
    "pmf": {"name": "pmf"},
    "mope": {"name": "mope"},
    "aurora": {"name": "aurora"},
}
TRAIN = {"mit-cached-recomputed": {"checkpoint_activations": True}}
MODELS = {
    "llm": "smollm2-135m-instruct",
    "encoder": "dinov2-vits14",
    "size": 224,
    "words": "the of and a in to is was it for",
}
"""The frozen models, and words that are a token each."""
COLUMNS = ("provider", "step ms (least – most)", "of lora-all", "peak MiB", "of lora-all", "GFLOP/sample", "trainable")


class UnequalError(UserError):
    """Two providers did not do the same work."""


def measured(
    names: Sequence[str],
    length: int,
    batch: int,
    rounds: int,
    steps: int,
    command: str,
    say: Callable[[str], object],
    models: Mapping[str, Any] = MODELS,
) -> dict[str, Any]:
    """A row of each provider; ``rounds``: processes of each, ``steps``: those of each that are timed."""
    if strange := [name for name in names if name not in PROVIDERS]:
        raise ConfigError(f"{strange[0]!r} is no provider: choose of {', '.join(PROVIDERS)}")
    taken: dict[str, list[Any]] = {name: [] for name in dict.fromkeys((FIRST, *names))}
    refused: dict[str, str] = {}
    with TemporaryDirectory(prefix="mitrain-step-") as folder:
        made(Path(folder), length, batch, models)
        for _ in range(rounds):
            for name in [name for name in taken if name not in refused]:
                try:
                    taken[name].append(ranks.found(work, (folder, name, steps), 1, LIMIT_S))
                except UserError as error:
                    refused[name] = str(error)
                    say(f"{name}: {error}")
                else:
                    say(f"{name}: {statistics.median(taken[name][-1]['times']):.0f} ms a step")
    rows = [row_of(name, runs) for name, runs in taken.items() if name not in refused]
    require_equal(rows)
    first = rows[0] if rows and rows[0]["provider"] == FIRST else None
    for row in rows if first else ():
        row["ratio_to_lora_all"] = row["step_ms"] / first["step_ms"]
        row["peak_to_lora_all"] = row["peak_bytes"] / first["peak_bytes"]
    shape = {"length": length, "batch": batch, "rounds": rounds, "steps": steps, "llm": Path(models["llm"]).name}
    made_by = {"command": command, **made_with(("torch", "transformers", "peft"))}
    return {"made": made_by, **shape, "rows": rows, "refused": refused}


def made(folder: Path, length: int, batch: int, models: Mapping[str, Any]) -> None:
    """Pictures, two batches of texts of one length, and a configuration."""
    (folder / "data").mkdir()
    words = models["words"].split()
    for number in range(8):
        world.picture(list(world.COLOURS)[number % 4], number).save(folder / "data" / f"{number}.png")
    for split, count in {"train": 2 * batch, "val": 8}.items():
        rows = [
            {"image": f"{n % 8}.png", "label": f"kind {n % 2}",
             "text": " ".join(words[(n * 7 + k * k) % len(words)] for k in range(length))} for n in range(count)
        ]  # fmt: skip
        (folder / "data" / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    values = {
        "model": {"llm": models["llm"], "encoders": {"image": {"name": models["encoder"], "size": models["size"]}}},
        "task": {"name": "classify", "readout": ["mean"], "max_tokens": length + 8},
        "data": {"name": "labelled", "root": str(folder / "data"), "classes": ["kind 0", "kind 1"]},
        "train": {"steps": 100, "batch": batch, "check_largest": "off", "schedule": {"name": "constant"}},
    }
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")


def work(folder: str, name: str, steps: int, out: Path) -> None:
    """Steps of one provider, in this process."""
    torch.set_num_threads(1)
    values = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    values |= {"adapter": dict(PROVIDERS[name]), "train": {**values["train"], **TRAIN.get(name, {})}}
    with uncached_texts() if name == "mit" else nullcontext():
        trainer = Trainer(schema.from_dict(values), Path(), quiet=True)
        taken, tokens = taken_by(trainer, name, steps, folder)
        rows = trainer.model.texts(trainer.train, False)
        found = {
            "times": [1e3 * seconds for _, seconds in taken[WARM_UP:]],
            "tokens": tokens,
            "texts": digest(rows),
            "files": digest(trainer.fingerprint[f"data.train.{part}"] for part in ("image.content", "labels")),
            "losses": [loss for loss, _ in taken],
        }
        write_json(out, found | measures.parameters(trainer.model) | measures.of_step(trainer))


def taken_by(trainer: Trainer, name: str, steps: int, folder: str) -> tuple[list[tuple[float, float]], int]:
    """Loss and seconds of each step, and the tokens of one."""
    if name == "lora-all-hf-loop":
        tokens = sum(trainer.model.task.tokens([sample]) for sample in trainer.train[: trainer.config.train.batch])
        return hf_loop.steps(trainer, WARM_UP + steps, folder), tokens
    taken = [(result.loss, seconds) for result, seconds in (trainer._step() for _ in range(WARM_UP + steps))]
    return taken, trainer.tokens


@contextmanager
def uncached_texts() -> Iterator[None]:
    """Inside, runs are made whose texts run through all layers in every step."""
    before, TextStates.cached = TextStates.__dict__["cached"], False
    try:
        yield
    finally:
        TextStates.cached = before


def row_of(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    times = [time for run in runs for time in run["times"]]
    kept = ("tokens", "batch", "texts", "files", "losses", "peak_bytes", "saved_bytes", "bytes", "flops_per_sample")
    row = {
        "provider": name,
        **{key: runs[0][key] for key in kept},
        "trainable_parameters": runs[0]["trainable_parameters"],
    }
    return row | {"step_ms": statistics.median(times), "least_ms": min(times), "most_ms": max(times)}


def require_equal(rows: Sequence[Mapping[str, Any]]) -> None:
    """UnequalError where a provider's step has other samples, texts or files than the first one's."""
    for row in rows:
        for fact in ("tokens", "batch", "texts", "files"):
            if row[fact] != rows[0][fact]:
                who, what = f"{row['provider']} and {rows[0]['provider']}", f"{fact} {row[fact]} and {rows[0][fact]}"
                raise UnequalError(f"{who} do not do the same work: {what}")


def table(found: dict[str, Any]) -> str:
    rows = [
        [
            row["provider"],
            f"{row['step_ms']:,.0f} ({row['least_ms']:,.0f} – {row['most_ms']:,.0f})",
            f"{row['ratio_to_lora_all']:.2f}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
            f"{row['peak_to_lora_all']:.2f}",
            f"{row['flops_per_sample'] / 1e9:.3g}",
            f"{row['trainable_parameters']:,}",
        ]
        for row in found["rows"]
    ]
    lines = [f"{name} is not here: {why}" for name, why in found["refused"].items()]
    note = (
        f"On {found['llm']}, {found['batch']} texts of {found['length']} words a step, one thread; medians of"
        f" {found['rounds']} processes of {found['steps']} steps each, in turns; all had the same tokens, files and labels."
        f" {sentence(found['made'])}"
    )
    return "\n".join([*markdown.table(COLUMNS, rows), "", *lines, *([""] if lines else []), note, ""])
