"""``mitrain bench step --providers`` and ``bench memory``: a step of MiT beside what else one would train on the same frozen
language model, by the texts' length, the batch, MiT's layers, the precision and the number of ranks.

Each provider is an adapter of `mitrain.methods` (LoRA is PEFT's) with the same head on the mean of the final states, the
same texts of so many tokens and the same pictures, which the frozen encoder has seen before. They take turns, each time in a
fresh process of one thread, so that whatever else the machine does falls on all of them. ``mit-cached`` has the states that
enter the first infused layer from the cache, and holds no weights below it; ``mit-cached-recomputed`` also computes what is
in the infused layers again for the backward pass. ``mit-released`` is the authors' code: its gate over all of the text, in
plain operators. ``lora-all-hf-loop`` is ``lora-all`` in the loop of transformers' Trainer.
Bytes are counted on tensors (`mitrain.compare.measures`); ``start_bytes`` and ``process_bytes`` are the most that a process
held, beyond what it held when everything was imported, until its first step and in its steps, by the system's count.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import hf_loop, ranks
from benchmarks.faults import world
from mitrain.compare import measures
from mitrain.core import dist, markdown
from mitrain.core.errors import ConfigError, UserError
from mitrain.core.files import write_json
from mitrain.core.provenance import digest, made_with, sentence
from mitrain.data.hidden_states import TextStates
from mitrain.training import schema
from mitrain.training.trainer import Trainer

LIMIT_S = 3600.0
WARM_UP = 1
RATIOS = {"ratio_to_lora_all": "step_ms", "peak_to_lora_all": "peak_bytes", "process_to_lora_all": "process_bytes"}
FIRST = "lora-all"  # what the ratios are to
ALL = ["q", "k", "v", "o", "mlp"]
PROVIDERS: Mapping[str, Mapping[str, Any]] = {
    FIRST: {"name": "lora", "targets": ALL, "rank": 16, "alpha": 32},
    "lora-all-hf-loop": {"name": "lora", "targets": ALL, "rank": 16, "alpha": 32},
    "lora-qv": {"name": "lora", "targets": ["q", "v"], "rank": 16, "alpha": 32},
    "mit": {"name": "mit"},
    "mit-released": {"name": "mit", "preset": "released"},
    "mit-cached": {"name": "mit"},
    "mit-cached-recomputed": {"name": "mit"},
    "visual-prefix": {"name": "visual-prefix", "tokens": None},
    "visual-prefix-lora": {"name": "visual-prefix", "tokens": None, "lora_rank": 16},
    "full": {"name": "full"},
    "pmf": {"name": "pmf"},
    "mope": {"name": "mope"},
    "aurora": {"name": "aurora"},
}
TRAIN = {"mit-cached-recomputed": {"checkpoint_activations": True}}
KERNELS = {"mit-released": {"backend": "reference"}}
UNCACHED = ("mit", "mit-released")
MODELS = {
    "llm": "smollm2-135m-instruct",
    "encoder": "dinov2-vits14",
    "size": 224,
    "words": "the of and a in to is was it for",
}
"""The frozen models, and words that are a token each."""
COLUMNS = ("provider", "step ms (least – most)", "of lora-all", "peak MiB", "of lora-all", "GFLOP/sample", "trainable")
MEMORY = (
    "provider",
    "peak MiB",
    "of lora-all",
    "weights MiB",
    "for backward MiB",
    "process MiB",
    "of lora-all",
    "until step 1 MiB",
)


@dataclass(frozen=True)
class Shape:
    """What a comparison is made at: words of a text, texts of a step (of all ranks), MiT's layers, the models' precision,
    how many modalities, each with an encoder of its own (of the same pictures), and the stage of ZeRO."""

    length: int = 128
    batch: int = 8
    layers: str = "last third"
    dtype: str = "fp32"
    ranks: int = 1
    modalities: int = 1
    zero: int = 0

    @property
    def text(self) -> str:
        several = [f", {n} {what}" for n, what in ((self.ranks, "ranks"), (self.modalities, "modalities")) if n > 1]
        several += [f", ZeRO {self.zero}"] if self.zero or self.ranks > 1 else []
        what = f"{self.batch} texts of {self.length} words a step, {self.dtype}"
        return f"{what}, MiT in layers: {self.layers}{''.join(several)}"


class UnequalError(UserError):
    """Two providers did not do the same work."""


def measured(
    names: Sequence[str],
    shapes: Sequence[Shape],
    rounds: int,
    steps: int,
    command: str,
    say: Callable[[str], object],
    models: Mapping[str, Any] = MODELS,
) -> dict[str, Any]:
    """A row of each provider at each shape; ``rounds``: processes of each, ``steps``: those of each that are timed."""
    if strange := [name for name in names if name not in PROVIDERS]:
        raise ConfigError(f"{strange[0]!r} is no provider: choose of {', '.join(PROVIDERS)}")
    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    for shape in shapes:
        with TemporaryDirectory(prefix="mitrain-step-") as folder:
            made(Path(folder), shape, models)
            rows += compared(folder, list(dict.fromkeys((FIRST, *names))), shape, rounds, steps, refused, say)
    found = {"rounds": rounds, "steps": steps, "llm": Path(models["llm"]).name, "rows": rows, "refused": refused}
    return {"made": {"command": command, **made_with(("torch", "transformers", "peft"))}, **found}


def compared(
    folder: str,
    names: Sequence[str],
    shape: Shape,
    rounds: int,
    steps: int,
    refused: dict[str, str],
    say: Callable[[str], object],
) -> list[dict[str, Any]]:
    """The rows of one shape, in turns; who cannot be goes into ``refused``, with its reason."""
    taken: dict[str, list[Any]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in [name for name in taken if name not in refused]:
            try:
                taken[name].append(ranks.found(work, (folder, name, steps), shape.ranks, LIMIT_S))
            except UserError as error:
                refused[name] = str(error)
                say(f"{name}: {error}")
            else:
                say(f"{shape.text}: {name}: {statistics.median(taken[name][-1]['times']):.0f} ms a step")
    rows = [row_of(name, runs) | asdict(shape) for name, runs in taken.items() if len(runs) == rounds]
    require_equal(rows)
    first = rows[0] if rows and rows[0]["provider"] == FIRST else None
    for row in rows if first else ():
        for ratio, of in RATIOS.items():
            row[ratio] = row[of] / first[of]
    return rows


def made(folder: Path, shape: Shape, models: Mapping[str, Any]) -> None:
    """Pictures, two batches of texts of one length, and a configuration."""
    (folder / "data").mkdir()
    words = models["words"].split()
    for number in range(8):
        world.picture(list(world.COLOURS)[number % 4], number).save(folder / "data" / f"{number}.png")
    for split, count in {"train": 2 * shape.batch, "val": 8}.items():
        rows = [
            {"image": f"{n % 8}.png", "label": f"kind {n % 2}",
             "text": " ".join(words[(n * 7 + k * k) % len(words)] for k in range(shape.length))} for n in range(count)
        ]  # fmt: skip
        (folder / "data" / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    values = {
        "model": {
            "llm": models["llm"],
            "encoders": {
                name: {"name": models["encoder"], "size": models["size"], "takes": "image", "input": "image"}
                for name in ["image", *(f"image{n}" for n in range(2, shape.modalities + 1))]
            },
            "dtype": shape.dtype,
        },
        "layers": shape.layers,
        "zero": {"stage": shape.zero},
        "task": {"name": "classify", "readout": ["mean"], "max_tokens": shape.length + 8},
        "data": {"name": "labelled", "root": str(folder / "data"), "classes": ["kind 0", "kind 1"]},
        "train": {"steps": 100, "batch": shape.batch, "check_largest": "off", "schedule": {"name": "constant"}},
    }
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")


def work(folder: str, name: str, steps: int, out: Path) -> None:
    """Steps of one provider, in this process and those of its other ranks."""
    torch.set_num_threads(1)
    values = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    layers, adapter = {"layers": values.pop("layers")}, PROVIDERS[name]
    adapter = {**layers, **adapter} if adapter["name"] == "mit" else dict(adapter)
    values |= {"adapter": adapter, "train": {**values["train"], **TRAIN.get(name, {})}, "kernels": KERNELS.get(name, {})}
    held = Held()
    with dist.process_group(), uncached_texts() if name in UNCACHED else nullcontext():
        trainer = Trainer(schema.from_dict(values), Path(), quiet=True)
        start = held.most()
        taken, tokens = taken_by(trainer, name, steps, folder)
        process = held.most()
        rows = trainer.model.texts(trainer.train, False)
        found = {
            "times": [1e3 * seconds for _, seconds in taken[WARM_UP:]],
            "tokens": tokens,
            "texts": digest(rows),
            "files": digest(trainer.fingerprint[f"data.train.{part}"] for part in ("image.content", "labels")),
            "losses": [loss for loss, _ in taken],
            "start_bytes": start,
            "process_bytes": process,
        }
        counted = measures.parameters(trainer.model) | measures.of_step(trainer)
        dist.from_main(lambda: write_json(out, found | counted))


class Held:
    """The most bytes that this process holds, beyond those at first, since it was last asked (Linux counts a peak anew)."""

    def __init__(self) -> None:
        self.before = 0
        self.most()
        self.before = self._status("VmRSS")

    def most(self) -> int:
        most = self._status("VmHWM") - self.before
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return most

    def _status(self, name: str) -> int:
        return 1024 * int(Path("/proc/self/status").read_text(encoding="ascii").split(f"{name}:")[1].split()[0])


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
    row = {"provider": name} | {key: runs[0][key] for key in (*kept, "trainable_parameters")}
    row |= {key: statistics.median(run[key] for run in runs) for key in ("start_bytes", "process_bytes")}
    return row | {"step_ms": statistics.median(times), "least_ms": min(times), "most_ms": max(times)}


def require_equal(rows: Sequence[Mapping[str, Any]]) -> None:
    """UnequalError where a provider's step has other samples, texts or files than the first one's."""
    for row in rows:
        for fact in ("tokens", "batch", "texts", "files"):
            if row[fact] != rows[0][fact]:
                who, what = f"{row['provider']} and {rows[0]['provider']}", f"{fact} {row[fact]} and {rows[0][fact]}"
                raise UnequalError(f"{who} do not do the same work: {what}")


def table(found: dict[str, Any]) -> str:
    return "\n".join([*of_shapes(found, COLUMNS, time_row), note(found), ""])


def memory_table(found: dict[str, Any]) -> str:
    return "\n".join([*of_shapes(found, MEMORY, memory_row), note(found), ""])


def of_shapes(
    found: dict[str, Any], columns: Sequence[str], shown: Callable[[Mapping[str, Any]], list[str]]
) -> Iterator[str]:
    """A table of each shape, under the line that says it."""
    parts: dict[Shape, list[list[str]]] = {}
    for row in found["rows"]:
        parts.setdefault(Shape(**{f.name: row[f.name] for f in fields(Shape)}), []).append(shown(row))
    for shape, rows in parts.items():
        yield from (f"{shape.text}:", "", *markdown.table(columns, rows), "")
    for name, why in found["refused"].items():
        yield from (f"{name} is not here: {why}", "")


def time_row(row: Mapping[str, Any]) -> list[str]:
    return [
        row["provider"],
        f"{row['step_ms']:,.0f} ({row['least_ms']:,.0f} – {row['most_ms']:,.0f})",
        f"{row['ratio_to_lora_all']:.2f}",
        f"{row['peak_bytes'] / 2**20:,.0f}",
        f"{row['peak_to_lora_all']:.2f}",
        f"{row['flops_per_sample'] / 1e9:.3g}",
        f"{row['trainable_parameters']:,}",
    ]


def memory_row(row: Mapping[str, Any]) -> list[str]:
    mib = lambda size: f"{size / 2**20:,.0f}"  # noqa: E731
    return [
        row["provider"],
        mib(row["peak_bytes"]),
        f"{row['peak_to_lora_all']:.2f}",
        mib(row["bytes"]["weights"]),
        mib(row["saved_bytes"]),
        mib(row["process_bytes"]),
        f"{row['process_to_lora_all']:.2f}",
        mib(row["start_bytes"]),
    ]


def note(found: dict[str, Any]) -> str:
    return (
        f"On {found['llm']}, one thread a rank; medians of {found['rounds']} processes of {found['steps']} steps each, in"
        f" turns; at each shape all had the same tokens, files and labels. {sentence(found['made'])}"
    )
