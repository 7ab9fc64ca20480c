"""``mitrain bench generate``: tokens per second of generation and of evaluation, beside the plain model's.

MiT is attached to one copy of a frozen language model, another copy stays as transformers loads it. In each round both do
the same work, one after the other, in one process of one thread, so that whatever else the machine does falls on both.
Generation says so many tokens behind each prompt, with a KV cache; evaluation asks for the likelihood of so many tokens
behind each prompt in one pass, through all layers and from the cached states of the layers below the first infused one.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks import ranks
from mitrain import methods
from mitrain.core import markdown
from mitrain.core.errors import ConfigError
from mitrain.core.files import write_json
from mitrain.core.provenance import made_with, sentence
from mitrain.data.hidden_states import TextStates
from mitrain.methods.mit.config import MiTConfig
from mitrain.models import TextBackbone
from mitrain.models.batch import ModalityInputs
from mitrain.models.layouts import layers_of
from mitrain.tasks.base import Parts
from mitrain.tasks.generation import decoding, generated
from mitrain.training.build import resolve_model

LIMIT_S = 3600.0
GOAL = 0.95
WIDTH = 384  # of the feature that is infused
WORK = ("generation", "evaluation", "evaluation, cached states")
COLUMNS = ("work", "plain tokens/s", "MiT tokens/s", "ratio (least – most)")


def measured(
    llm: str, batch: int, prompt: int, tokens: int, rounds: int, command: str, say: Callable[[str], object]
) -> dict[str, Any]:
    """A row for each of `WORK`; ``prompt``, ``tokens``: of each of ``batch`` texts."""
    with TemporaryDirectory(prefix="mitrain-generate-") as folder:
        took = ranks.found(work, (llm, batch, prompt, tokens, rounds, folder), 1, LIMIT_S)
    rows = [row_of(name, took[name], batch * tokens) for name in WORK]
    for row in rows:
        say(f"{row['work']}: {row['ratio']:.2f} of the plain model's tokens per second")
    shape = {"llm": Path(llm).name, "batch": batch, "prompt": prompt, "tokens": tokens, "rounds": rounds}
    return {"made": {"command": command, **made_with(("torch", "transformers"))}, **shape, "goal": GOAL, "rows": rows}


def row_of(name: str, rounds: list[tuple[float, float]], tokens: int) -> dict[str, Any]:
    """``rounds``: seconds of the plain model and of MiT; a ratio is that of one round, so that both had the same machine."""
    ratios = [plain / own for plain, own in rounds]
    plain, own = (tokens / statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    spread = {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return {"work": name, "plain_tokens_s": plain, "tokens_s": own, **spread}


@torch.no_grad()
def work(llm: str, batch: int, prompt: int, tokens: int, rounds: int, folder: str, out: Path) -> None:
    """Seconds of each work in each round, of the plain model and of MiT, in this process."""
    torch.set_num_threads(1)
    source = resolve_model(llm)
    plain = TextBackbone.load(source, torch.float32)
    parts, inputs = attached(source, batch, Path(folder))
    numbers = torch.Generator().manual_seed(0)
    ids = torch.randint(3, plain.vocabulary, (batch, prompt + tokens), generator=numbers)
    own = {"generation": decoding(parts)}
    spoken = [lambda: speak(Parts(plain, None, None), ids[:, :prompt], tokens, {}),
              lambda: speak(parts, ids[:, :prompt], tokens, own["generation"])]  # fmt: skip
    parts.states.prepare(ids.tolist())
    states = parts.states.batch(ids.tolist())
    scored = lambda text, *below: score(text, ids, prompt, *below)  # noqa: E731
    pairs: Mapping[str, list[Callable[[], Any]]] = {
        "generation": spoken,
        "evaluation": [lambda: scored(plain), lambda: scored(parts.text)],
        "evaluation, cached states": [lambda: scored(plain), lambda: scored(parts.text, states, parts.states.depth)],
    }
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    for number in range(rounds + 1):  # the first allocates
        for name, (first, second) in pairs.items():
            with_mit = lambda second=second: conditioned(parts, inputs, second)  # noqa: E731
            # In turns: what runs second finds warm caches.
            order = (first, with_mit) if number % 2 else (with_mit, first)
            seconds = {call: timed(call) for call in order}
            if number:
                took[name].append((seconds[first], seconds[with_mit]))
    write_json(out, took)


def attached(source: Any, batch: int, cache: Path) -> tuple[Parts, ModalityInputs]:
    """MiT on the last third of a copy of the model, and features for a batch."""
    text = TextBackbone.load(source, torch.float32)
    adapter = methods.build(MiTConfig(layers="last third"), {"image": WIDTH})
    adapter.attach({"text": text.model})
    depth = adapter.attachment.first_layers["text"]
    if not 0 < depth < len(layers_of(text.model)):
        raise ConfigError(f"{str(source)!r} has no layer below the infused ones: take a deeper language model")
    features = torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(1))
    parts = Parts(text, adapter, TextStates(text, depth, cache, False, adapter.disabled))
    return parts, ModalityInputs({"image": features})


def speak(parts: Parts, ids: Tensor, tokens: int, options: Mapping[str, Any]) -> None:
    generated(parts, ids, torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, **options)


def score(text: TextBackbone, ids: Tensor, prompt: int, states: Tensor | None = None, depth: int = 0) -> None:
    rows, positions = (grid.flatten() for grid in torch.meshgrid(*map(torch.arange, ids.shape), indexing="ij"))
    asked = (positions >= prompt - 1) & (positions < ids.shape[1] - 1)
    rows, positions = rows[asked], positions[asked]
    text.log_likelihood(ids, torch.ones_like(ids), rows, positions, ids[rows, positions + 1], states, depth)


def conditioned(parts: Parts, inputs: ModalityInputs, call: Callable[[], Any]) -> None:
    with parts.adapter.conditioned(inputs):
        call()


def timed(call: Callable[[], Any]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def table(found: dict[str, Any]) -> str:
    rows = [
        [
            row["work"],
            f"{row['plain_tokens_s']:,.1f}",
            f"{row['tokens_s']:,.1f}",
            f"{row['ratio']:.2f} ({row['least']:.2f} – {row['most']:.2f})",
        ]
        for row in found["rows"]
    ]
    note = (
        f"On {found['llm']}, {found['batch']} prompts of {found['prompt']} tokens and {found['tokens']} tokens behind each,"
        f" one thread, processor time; medians of {found['rounds']} rounds in turns; the goal is {found['goal']}."
        f" {sentence(found['made'])}"
    )
    return "\n".join([*markdown.table(COLUMNS, rows), "", note, ""])
