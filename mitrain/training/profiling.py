"""``mitrain train --profile``: a few steps of a run under torch's profiler, as a Chrome trace and a page that sums it up.

Time goes to the part of the model whose module runs; a backward operator's to the part that made it in the forward pass.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules import module as hooks
from torch.profiler import ProfilerActivity, profile, record_function

from mitrain.core import dist, markdown
from mitrain.core.files import write_atomic
from mitrain.core.provenance import made_with, sentence
from mitrain.models.stream import layers_of
from mitrain.training.build import Model
from mitrain.training.trainer import Trainer

FIRST, STEPS = 2, 3
"""Steps before those that are profiled, which allocate and compile; and how many are."""
MARK = "mitrain: "
PARTS = ("trunk", "changed layers", "adapter", "head", "optimizer", "communication", "input", "other")
TALK = ("gloo:", "nccl:", "c10d::")
BACKWARD = 1  # the profiler's scope of what autograd calls


class Profiled:
    """Watches a trainer's steps; rank 0 writes ``folder``/trace.json and summary.md when it has seen enough."""

    def __init__(self, trainer: Trainer, folder: Path):
        self.folder, self.model, self.calls, self.written = folder, trainer.model, 0, False
        self._inside = ExitStack()
        if dist.is_main():
            trainer.batches.next = ranged("input", trainer.batches.next)
            trainer.batches.of = ranged("input", trainer.batches.of)
            trainer.engine.step = ranged("optimizer", trainer.engine.step)
            self._step, trainer._step = trainer._step, self.step

    def step(self) -> Any:
        if self.calls == FIRST:
            self._begin()
        result = self._step()
        self.calls += 1
        if self.calls == FIRST + STEPS:
            self._end()
        return result

    def _begin(self) -> None:
        on = [ProfilerActivity.CPU]
        on += [ProfilerActivity.CUDA] if self.model.text.device.type == "cuda" else []
        self._profile = self._inside.enter_context(profile(activities=on))
        mark_modules(self.model, self._inside)
        self._start = time.perf_counter()

    def _end(self) -> None:
        seconds = time.perf_counter() - self._start
        self._inside.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self.folder / "trace.json"))
        write_atomic(self.folder / "summary.md", summary(by_part(self._profile.events()), seconds))
        self.written = True

    def told(self) -> str:
        """The summary, or why there is none."""
        if not self.written:
            return f"no profile: the run ended before its step {FIRST + STEPS}"
        return (self.folder / "summary.md").read_text(encoding="utf-8")


def ranged(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def inside(*args: Any, **kwargs: Any) -> Any:
        with record_function(MARK + part):
            return function(*args, **kwargs)

    return inside


def parts_of(model: Model) -> dict[int, str]:
    """The part that each module of the model belongs to, by the module's id."""
    found: dict[int, str] = {}
    first = model.adapter.attachment.first_layers
    speaks = [model.text.model.get_output_embeddings()] if model.text.speaks else []
    for root, part in ((model.adapter, "adapter"), (model.task, "head"), *((head, "head") for head in speaks)):
        found |= {id(module): part for module in root.modules()}
    backbones = {"text": model.text.model}
    if model.encoders:
        backbones["encoder"] = next(iter(model.encoders.values())).model
    for name, backbone in backbones.items():
        for i, layer in enumerate(layers_of(backbone)):
            part = "changed layers" if i >= first.get(name, 1 << 30) else "trunk"
            found |= {id(m): part for m in layer.modules() if id(m) not in found}
        found |= {id(m): "trunk" for m in backbone.modules() if id(m) not in found}
    return found


def mark_modules(model: Model, inside: ExitStack) -> None:
    """Until ``inside`` is closed, a module's forward pass is a range of the name of its part."""
    parts, stack = parts_of(model), []

    def enter(module: nn.Module, _: Any) -> None:
        part = parts.get(id(module))
        stack.append(record_function(MARK + part) if part else None)
        if part:
            stack[-1].__enter__()

    def leave(*_: Any) -> None:
        if (opened := stack.pop()) is not None:
            opened.__exit__(None, None, None)

    inside.callback(hooks.register_module_forward_pre_hook(enter).remove)
    inside.callback(hooks.register_module_forward_hook(leave, always_call=True).remove)


def by_part(events: Iterable[Any]) -> dict[str, tuple[float, float]]:
    """Seconds of the host (forward, backward) by part; each operator counts once, in its innermost range."""
    made: dict[int, str] = {}
    forward, backward = Counter(), Counter()
    events = list(events)
    for event in events:
        part = part_of(event)
        if event.scope != BACKWARD:
            if event.sequence_nr >= 0 and part:
                made[event.sequence_nr] = part
            if part:
                forward[part] += event.self_cpu_time_total / 1e6
    for event in events:
        if not part_of(event) and (root := autograd_root(event)) is not None:
            backward[made.get(root.sequence_nr, "other")] += event.self_cpu_time_total / 1e6
    return {part: (forward[part], backward[part]) for part in PARTS[:-1]} | {"other": (0.0, backward["other"])}


def part_of(event: Any) -> str:
    """That of the innermost range around it; what is sent is communication wherever it happens."""
    while event is not None:
        if event.name.startswith(TALK):
            return "communication"
        if event.name.startswith(MARK):
            return event.name.removeprefix(MARK)
        event = event.cpu_parent
    return ""


def autograd_root(event: Any) -> Any:
    """What autograd called, if the event happened in it."""
    while event is not None and (event.scope != BACKWARD or event.sequence_nr < 0):
        event = event.cpu_parent
    return event


def summary(parts: dict[str, tuple[float, float]], seconds: float) -> str:
    """A page: milliseconds of a step by part, of ``STEPS`` steps that took ``seconds``."""
    rest = max(0.0, seconds - sum(map(sum, parts.values())))
    parts = parts | {"other": (parts["other"][0] + rest, parts["other"][1])}
    rows = [[part, *(f"{1e3 * s / STEPS:,.2f}" for s in both), f"{sum(both) / seconds:.0%}"] for part, both in parts.items()]
    note = f"Milliseconds of the host a step, {STEPS} steps after {FIRST}, profiled: {1e3 * seconds / STEPS:,.0f} ms a step."
    made = sentence({"command": "mitrain train --profile", **made_with(("torch",))})
    return "\n".join([*markdown.table(("part", "forward", "backward", "share"), rows), "", note, made, ""])
