"""What of the adapted backbones' states a head reads.

Shapes: B samples, T tokens, D width of the text model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mitrain.core.errors import ConfigError
from mitrain.models import frozen
from mitrain.models.batch import STATES, ModalityInputs, TextBatch, mean_over, moments
from mitrain.tasks.base import Batch, Parts

FIT_SAMPLES = 512
"""How many training samples the statistics are taken from, evenly spread."""
SEEN_SAMPLES = 128
"""The same where a file goes through an encoder for it."""
See = Callable[[Sequence[Any]], Batch]
"""Training samples as a batch with their files, as an evaluation sees them."""


def runs_text(names: Iterable[str]) -> bool:
    """Whether these read-outs run the text model."""
    return bool({*STATES, "joint"} & set(names))


def width_of(parts: Parts, name: str, widths: Mapping[str, int]) -> int:
    """Width of the read-out ``name``; ``widths``: of each modality's feature. ConfigError where there is none."""
    if name in widths:
        changed = parts.adapter.attachment.encoder_width
        return {**widths, **({next(iter(widths)): changed} if changed else {})}[name]
    if name not in (*STATES, "embeddings", "joint"):
        known = ", ".join((*STATES, "embeddings", "joint", *widths))
        raise ConfigError(f"task.readout={name!r} is neither a state nor a modality: choose of {known}")
    if name == "joint" and not parts.adapter.attachment.joint_width:
        raise ConfigError(
            f"task.readout: the method {parts.adapter.traits.name!r} has no joint state: read last, mean, cls or a modality"
        )
    return parts.adapter.attachment.joint_width if name == "joint" else parts.text.width


def read_out(
    parts: Parts, rows: Sequence[Sequence[int]], names: Sequence[str], inputs: ModalityInputs | None
) -> dict[str, Tensor]:
    """Each read-out (B, its width) float32 of ``rows`` of token ids with their samples' other inputs.

    ``last``, ``mean``, ``cls``: of the text model's final states; ``embeddings``: the mean of its input embeddings;
    ``joint``: what the method itself predicts from; the name of a modality: its vector.
    """
    readouts: dict[str, Tensor] = {}
    asked = set(names) - {"embeddings"}
    ids, mask = parts.text.pad(rows)
    if asked:
        texts = TextBatch(ids, mask, parts.states.batch(rows), parts.states.depth) if runs_text(asked) else None
        outputs = parts.adapter.encode(texts, inputs)
        readouts = {name: outputs.read_out(name) for name in asked}
    if "embeddings" in names:
        readouts["embeddings"] = mean_over(parts.text.embeddings(ids).float(), mask)
    return readouts


@torch.no_grad()
def frozen_states(parts: Parts, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """(n, D): the mean over tokens of the frozen language model's final states, of ``rows`` of token ids."""
    found: dict[tuple[int, ...], np.ndarray] = {}
    with parts.adapter.disabled():
        for chunk in chunks(sorted({tuple(row) for row in rows}, key=len)):
            ids, mask = parts.text.pad(chunk)
            states = mean_over(frozen.last_hidden(parts.text.model, TextBatch(ids, mask)).float(), mask)
            found |= zip(chunk, states.cpu().numpy(), strict=True)
    return np.stack([found[tuple(row)] for row in rows])


@torch.no_grad()
def statistics(
    parts: Parts,
    names: Sequence[str],
    widths: Mapping[str, int],
    rows: Sequence[Sequence[int]],
    samples: Sequence[Any] = (),
    see: See | None = None,
    row: Callable[[Any], Sequence[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / std of the read-outs ``names``, concatenated; a constant dimension keeps its scale.

    Those of the text alone are taken over ``rows`` of token ids; ``joint``, and the vector of a modality whose encoder the
    method changes, over ``samples`` with their files; the frozen encoders' features are normalised already.
    """
    alone = [name for name in names if name != "joint" and name not in widths]
    changed = next(iter(widths), None) if parts.adapter.traits.changes_encoder else None
    seen = [name for name in names if name in ("joint", changed)]
    states = [read_out(parts, chunk, alone, None) for chunk in chunks(rows)] if alone else []
    shown = [(chunk, see(chunk).inputs) for chunk in chunks(evenly(samples, SEEN_SAMPLES))] if seen else []
    together = [(read_out(parts, [row(s) for s in chunk], seen, inputs), inputs.lacking) for chunk, inputs in shown]
    moments_of = {name: moments(part[name] for part in states) for name in alone}
    for name in seen:
        rows_of = [part[name] if name == "joint" or gone is None else part[name][~gone] for part, gone in together]
        moments_of[name] = moments(rows_of)
    both = [moments_of.get(name) or (torch.zeros(widths[name]), torch.ones(widths[name])) for name in names]
    return torch.cat([mean.cpu() for mean, _ in both]), torch.cat([scale.cpu() for _, scale in both])


def evenly(items: Sequence[Any], most: int = FIT_SAMPLES) -> Sequence[Any]:
    """At most ``most`` of ``items``, evenly spread."""
    return items[:: max(1, -(-len(items) // most))]


def chunks(items: Sequence[Any], size: int = 32) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
