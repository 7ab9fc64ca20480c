"""The cells of the parity matrix: which runs are made, and which of them say how far rounding alone moves a loss."""

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from mitrain.core.config import digest

WHO = OURS, BITSANDBYTES, PEFT = "ours", "bitsandbytes", "peft"
STAGES = (0, 1, 2, 3)
RANKS = (1, 2)
PRECISIONS = {
    "fp32": ("model.dtype=fp32", "model.quantize=none"),
    "bf16": ("model.dtype=bf16", "model.quantize=none"),
    "int8": ("model.dtype=fp32", "model.quantize=int8"),
    "nf4": ("model.dtype=fp32", "model.quantize=nf4"),
    "int8-activations": ("model.dtype=fp32", "model.quantize=int8-activations"),
}
MATRIX = ("fp32", "bf16", "int8", "nf4")
ORDERS = {"bf16": (1, 2, 3, 4, 5, 6, 7, 8, 12, 13), "int8-activations": (1, 2, 3, 4, 5)}
"""Permutations of a batch that are run unsharded for the noisy precisions, besides other micro-batches."""
SHARDED_ORDERS = (1, 6, 7, 12)
"""Permutations that bf16 runs in shards too, since one run of a stage does not tell a bias from rounding: of a batch of 4
each gives two ranks other samples, or the same in another order."""
NOISY = tuple(ORDERS)
"""Precisions whose rounding depends on the order of sums; the others are compared to `EXACT`."""
EXACT = 1e-5
SPARE = 1.25
"""Samples read for each one that is trained on, for pictures that cannot be read."""


@dataclass(frozen=True)
class Cell:
    """One run. ``accumulate``: into how many micro-batches each step's samples are cut on every rank. ``order``: number of
    the permutation in which a batch's samples stand; 0 leaves them."""

    who: str
    precision: str
    zero: int
    ranks: int
    accumulate: int = 1
    order: int = 0

    @property
    def name(self) -> str:
        cut = f"accumulate{self.accumulate}" if self.accumulate > 1 else ""
        order = f"order{self.order}" if self.order else ""
        return "-".join(filter(None, [self.who, self.precision, f"zero{self.zero}", f"ranks{self.ranks}", cut, order]))

    @property
    def reference(self) -> "Cell":
        """The single-process, unsharded run of the same precision."""
        return Cell(self.who, self.precision, 0, 1)

    @property
    def unsharded(self) -> bool:
        return self.zero == 0


@dataclass(frozen=True)
class Plan:
    """What all cells have in common: the configuration's file, ``steps`` updates of ``batch`` samples."""

    config: str
    steps: int = 20
    batch: int = 4

    @property
    def samples(self) -> int:
        """How many samples are read: those of the steps and of one more, of which the loss is reported."""
        return round(SPARE * (self.steps + 1) * self.batch)

    def overrides(self, cell: Cell) -> list[str]:
        """The settings of a cell on top of the configuration's file."""
        return [
            *PRECISIONS[cell.precision],
            f"zero.stage={cell.zero}",
            f"train.steps={self.steps + 1}",
            f"train.batch={self.batch // cell.accumulate}",
            f"train.accumulate={cell.accumulate}",
            f"train.schedule.warmup={self.steps}",
            "train.eval_samples=4",
            "model.device=cpu",
        ]

    def identity(self, cell: Cell) -> str:
        """What a kept result must have been measured for to be taken over."""
        named = {key: value for key, value in asdict(cell).items() if key != "order" or value}
        return digest({**asdict(self), **named})


def full(batch: int = 4, only: Collection[str] = ()) -> list[Cell]:
    """The whole matrix, the runs that give the noisy precisions their tolerance, and the peers.

    Left out are runs whose micro-batches would be less than a sample a rank. ``only``: the beginnings of names.
    """
    cells = [Cell(OURS, p, zero, ranks) for p in MATRIX for ranks in RANKS for zero in STAGES]
    cells += [Cell(OURS, "int8-activations", zero, ranks) for zero, ranks in ((0, 1), (0, 2), (3, 2))]
    cells += [Cell(OURS, p, 0, ranks, accumulate) for p in NOISY for ranks, accumulate in ((1, 2), (1, 4), (2, 2))]
    cells += [Cell(OURS, p, 0, 1, order=order) for p in NOISY for order in ORDERS[p]]
    cells += [Cell(OURS, "bf16", zero, 2, order=order) for zero in (1, 3) for order in SHARDED_ORDERS]
    cells = [cell for cell in cells + peers() if batch % (cell.ranks * cell.accumulate) == 0]
    return ordered(cell for cell in cells if not only or cell.name.startswith(tuple(only)))


def peers() -> list[Cell]:
    kinds = ((BITSANDBYTES, "int8-activations"), (PEFT, "fp32"), (PEFT, "int8-activations"))
    return [Cell(who, precision, zero, ranks) for who, precision in kinds for zero, ranks in ((0, 1), (3, 2))]


def quick() -> list[Cell]:
    """The corners of the matrix, without peers."""
    return ordered(Cell(OURS, p, zero, ranks) for p in ("fp32", "int8") for ranks in RANKS for zero in (0, 3))


def ordered(cells: Iterable[Cell]) -> list[Cell]:
    """As the table has them: ours before the peers, by precision, the references first."""
    names = list(PRECISIONS)
    place = lambda c: (WHO.index(c.who), names.index(c.precision), c.ranks, c.zero, c.accumulate, c.order)  # noqa: E731
    return sorted(cells, key=place)


def urgent_first(cells: Iterable[Cell]) -> list[Cell]:
    """As they are measured: the slow bf16 last, before it stages 1 and 2, so that an interrupted matrix tells most."""
    return sorted(cells, key=lambda c: (c.precision == "bf16", c.zero in (1, 2)))


def from_dict(values: dict[str, Any]) -> Cell:
    names = ("who", "precision", "zero", "ranks", "accumulate", "order")
    return Cell(**{key: values[key] for key in names if key in values})
