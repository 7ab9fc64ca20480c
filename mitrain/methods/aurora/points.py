"""Where Aurora's modes are added: the frozen projections of a model's layers, cut into slices of one width.

Shapes: d width of the factors. A matrix (out, in) is cut into ⌈out/d⌉ · ⌈in/d⌉ slices of d × d, row by row; the last of a
row or column may be narrower and takes the leading block. An MLP 768 → 3072 → 768 has four slices and four slices.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from mitrain.methods.aurora.config import PARTS, AuroraConfig, Part
from mitrain.models import layouts
from mitrain.models.layouts import CROSS, PROJECTIONS, Projection


@dataclass(frozen=True)
class Point:
    """The rows ``offset``..``offset + out`` of the frozen projection ``module`` of layer ``layer``, (out, into).

    ``rows`` · ``columns`` slices, whose p_n begin at ``first`` in the table of ``part``.
    """

    part: Part
    layer: int
    kind: Projection
    module: nn.Module
    into: int
    out: int
    offset: int = 0
    first: int = 0
    rows: int = 1
    columns: int = 1

    @property
    def vectors(self) -> slice:
        """Its p_n in the table of ``part``."""
        return slice(self.first, self.first + self.rows * self.columns)


def find_points(model: PreTrainedModel, part: Part, kinds: Sequence[Projection]) -> list[Point]:
    """The projections ``kinds`` of every layer of ``model``; with ``part`` fusion those of its own cross-attention."""
    points: list[Point] = []
    for index, layer in enumerate(layouts.layers_of(model)):
        inside = [point for point in _layer_points(layer, index, part) if point.kind in kinds]
        layouts.require(kinds, {point.kind for point in inside}, model, index, f"adapter.{part}")
        points += sorted(inside, key=lambda point: PROJECTIONS.index(point.kind))
    return points


def has_cross_attention(model: PreTrainedModel) -> bool:
    """Whether every layer has a cross-attention of its own, as BLIP's text encoder."""
    return all(hasattr(layer, CROSS) for layer in layouts.layers_of(model))


def widths_of(points: Sequence[Point], config: AuroraConfig, hidden: Mapping[Part, int]) -> dict[str, int]:
    """The width d of each set of factors in use: the largest hidden width of the parts that share it."""
    used = [part for part in PARTS if any(point.part == part for point in points)]
    return {
        name: max(hidden[part] for part in used if config.set_of(part) == name)
        for name in config.sets
        if any(config.set_of(part) == name for part in used)
    }


def laid_out(points: Sequence[Point], config: AuroraConfig, widths: Mapping[str, int]) -> list[Point]:
    """The points with their slices, and their places in the parts' tables of p_n, in the order given."""
    seen: dict[Part, int] = {}
    placed = []
    for point in points:
        width, first = widths[config.set_of(point.part)], seen.get(point.part, 0)
        rows, columns = math.ceil(point.out / width), math.ceil(point.into / width)
        placed.append(replace(point, first=first, rows=rows, columns=columns))
        seen[point.part] = first + rows * columns
    return placed


def vector_counts(points: Sequence[Point]) -> dict[Part, int]:
    """How many p_n each part in use has."""
    counts: dict[Part, int] = {}
    for point in points:
        counts[point.part] = max(counts.get(point.part, 0), point.vectors.stop)
    return counts


def _layer_points(layer: nn.Module, index: int, part: Part) -> Iterator[Point]:
    for path, module, kinds in layouts.linear_projections(layer):
        across = path.startswith(f"{CROSS}.")
        if across != (part == "fusion") or not hasattr(module, "in_features"):
            continue
        into, out = module.in_features, module.out_features
        if len(kinds) == 1:
            yield Point(part, index, kinds[0], module, into, out)
        elif path.rpartition(".")[2] in layouts.THIRDS and out % 3 == 0:
            for i, kind in enumerate(kinds):
                yield Point(part, index, kind, module, into, out // 3, i * out // 3)
