"""``mitrain bench plan``: what `mitrain plan` says beside what is measured, and its tables for models that do not fit here.

memory   the most that a short run (two steps, an evaluation, a checkpoint) held, by the system's count, beside the plan
gathers  bytes that DeepSpeed gathered on two ranks (of `mitrain bench parity`, as committed), beside the plan
scale    LLaMA-2-7B and a Llama of 70 B on 1 to 1,024 GPUs: estimates
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ranks
from mitrain.core import markdown
from mitrain.core.errors import UserError
from mitrain.core.files import cache_home, write_json
from mitrain.core.provenance import made_with, sentence
from mitrain.training import schema
from mitrain.training.plan import PlanRequest, machine_of, plan
from mitrain.training.plan.plan import measured as step_of

Row = dict[str, Any]
LIMIT_S = 3600.0
PARITY = Path("docs/results/parity/results.json")
SHORT = (
    "train.steps=2",
    "train.schedule.warmup=1",
    "train.eval_every=2",
    "train.save_every=2",
    "train.eval_samples=32",
)
PRECISIONS = ("fp32", "bf16", "int8", "nf4")
LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128_256, "tie_word_embeddings": False,
}  # fmt: skip
SIZES = {"7 B": {}, "70 B": {"llm_shape": LLAMA_70B}}
GPUS = (1, 8, 64, 256, 1024)
SHARE = 8  # samples of a rank


def measured(
    configs: Sequence[str], quick: bool, command: str, say: Callable[[str], object], memory_alone: bool = False
) -> dict[str, Any]:
    """``configs``: each may have overrides behind its name, as ``quickstart train.batch=8``."""
    rows: dict[str, list[Row]] = {"memory": [], "gathers": [], "scale": []}
    for config in configs:
        both = (ranks.found(work, (config,), 1, LIMIT_S) for work in (planned, held))
        rows["memory"].append({"config": config, **next(both), **next(both)})
        say(f"{config}: {rows['memory'][-1]}")
    for precision in () if memory_alone else PRECISIONS[:1] if quick else PRECISIONS:
        rows["gathers"].append(gathers(precision))
        say(f"{precision}: {rows['gathers'][-1]}")
    for size in () if memory_alone else SIZES:
        rows["scale"] += scale(size)
        say(f"{size}: {len(GPUS)} sizes")
    return {"made": {"command": command, **made_with(("torch", "transformers", "deepspeed"))}, **rows}


def planned(config: str, out: Path) -> None:
    found = json.loads(called("plan", config, "--json").stdout)
    write_json(out, {"planned": found["total_bytes"], "moments": found["moments"]})


def held(config: str, out: Path) -> None:
    """The short run, with an empty cache of features: encoding is a moment of the plan."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "cache")
        home.mkdir()
        for part in cache_home().iterdir():
            if part.name != "features":
                (home / part.name).symlink_to(part)
        called("train", config, "--runs", f"{folder}/runs", MITRAIN_CACHE=str(home))
    write_json(out, {"measured": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss})


def called(verb: str, config: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a user would call, of the short run: in a process of its own that holds nothing else."""
    words = [sys.executable, "-m", "mitrain", verb, *config.split(), *SHORT, *options]
    done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1])
    return done


def gathers(precision: str) -> Row:
    """The quickstart at stage 3 on two ranks, every layer run in every step."""
    setting = f"model.quantize={precision}" if precision in ("int8", "nf4") else f"model.dtype={precision}"
    config = schema.load("quickstart", ["cache=false", "train.batch=4", "zero.stage=3", setting])
    found = plan(config, PlanRequest(machine_of("h100-80g"), 2), remedies=False)
    rows = json.loads(PARITY.read_text(encoding="utf-8"))["rows"]
    wanted = {"who": "ours", "precision": precision, "zero": 3, "ranks": 2, "accumulate": 1, "order": 0}
    counted = next(row["gathered_bytes_per_step"] for row in rows if wanted.items() <= row.items())
    return {"precision": precision, "planned": found.communication["gathers"], "measured": counted}


def scale(size: str) -> list[Row]:
    """One step is counted, and spread over more and more ranks of `SHARE` samples each."""
    rows, found = [], None
    for stage in (0, 3):
        for gpus in GPUS:
            values = schema.load("mit-7b-snli-ve", [f"train.batch={SHARE * gpus}", f"zero.stage={stage}"]).to_dict()
            config = schema.from_dict({**values, "model": {**values["model"], **SIZES[size]}})
            asked = PlanRequest(machine_of("h100-80g"), gpus, max(1, gpus // 8), samples=529_527)
            found = found or step_of(config, asked)
            rows.append(
                {
                    "model": size,
                    "stage": stage,
                    "gpus": gpus,
                    **plan(config, asked, remedies=False, found=found).to_dict(),
                }
            )
    return rows


def table(found: dict[str, Any]) -> str:
    mib = lambda size: f"{size / 2**20:,.1f}"  # noqa: E731
    beside = lambda row: [mib(row["planned"]), mib(row["measured"]), f"{row['planned'] / row['measured']:.3f}"]  # noqa: E731
    made = sentence(found["made"])
    lines = []
    for kind, title in (("memory", "configuration"), ("gathers", "weights")):
        rows = [[markdown.code(row.get("config") or row["precision"]), *beside(row)] for row in found[kind]]
        lines += [*markdown.table((title, "planned MiB", "measured MiB", "ratio"), rows), ""] if rows else []
    shown = [*scale_lines(found["scale"]), made, ""] if found["scale"] else []
    return "\n".join([*lines, made, "", *shown])


def scale_lines(rows: Sequence[Row]) -> list[str]:
    columns = (
        "model",
        "ZeRO",
        "GPUs",
        "GiB/rank",
        "fits",
        "largest batch",
        "GiB gathered, reduced",
        "step ms",
        "hours/epoch",
    )
    shown = [
        [
            row["model"],
            str(row["stage"]),
            f"{row['gpus']:,}",
            f"{row['total_bytes'] / 2**30:,.1f}",
            "yes" if row["fits"] else "no",
            f"{row['largest_batch']:,}",
            f"{row['communication_bytes_step'] / 2**30:,.2f}",
            "–".join(f"{ms:,.0f}" for ms in row["step_ms_range"]),
            "–".join(f"{hours:.3g}" for hours in row["epoch"]["hours"]),
        ]
        for row in rows
    ]
    note = (
        "Estimates, no GPU was used: H100 80 GB, MiT of `mit-7b-snli-ve`; a step is two micro-batches of 8 samples of 64"
        " tokens a rank. States below the first changed layer (13) are cached, so that only the layers from there on run:"
        " with ZeRO 3 each micro-batch gathers them forward, and again backward unless they run again within an"
        " eighth of the frozen elements, 10⁹ at most."
    )
    return [*markdown.table(columns, shown), "", note]
