"""Mode approximation (Aurora, arXiv 2305.08381): the updates of all tuned matrices as one tensor of low rank.

Shapes: d width of a set of factors, R rank, N tuned slices of d × d.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mitrain.core.errors import ModelError
from mitrain.methods.aurora.config import AuroraConfig
from mitrain.methods.aurora.points import Point, vector_counts


class Modes(nn.Module):
    """ΔW_n = V M_nᵀ U for every slice n of every tuned matrix:

        CP (the paper)       M_n = diag(λ ⊙ p_n)               ΔW = Σ_r λ_r v_r ∘ u_r ∘ p_r
        dense (the release)  M_n = Σ_c C[:, :, c] p_n[c]       Tucker; CP where C is superdiagonal with entries λ

    where:
        U = ``down[set]`` (R, d), V = ``up[set]`` (d, R): shared by all parts, or a set for each
        λ = ``core[set]`` (R,), or C = ``core[set]`` (R, R, R)
        p_n = ``vectors[part]`` (N_part, R): in the order of layers, then q, k, v, o, mlp, then slices row by row
    A narrower matrix is the leading block of its slices. ``forward`` is V M_nᵀ dropout(U x), in U's type.
    """

    def __init__(self, config: AuroraConfig, points: Sequence[Point], widths: Mapping[str, int], like: Tensor):
        super().__init__()
        self.config, self.widths = config, dict(widths)
        self.dropout = nn.Dropout(config.dropout)
        r = config.rank

        def table(shapes: Mapping[str, tuple[int, ...]]) -> nn.ParameterDict:
            return nn.ParameterDict({name: nn.Parameter(like.new_empty(shape)) for name, shape in shapes.items()})

        self.down = table({name: (r, d) for name, d in widths.items()})
        self.up = table({name: (d, r) for name, d in widths.items()})
        self.core = table(dict.fromkeys(widths, (r,) if config.core == "cp" else (r, r, r)))
        self.vectors = table({part: (count, r) for part, count in vector_counts(points).items()})
        self._start(points)

    @torch.no_grad()
    def _start(self, points: Sequence[Point]) -> None:
        """V = 0, so that every ΔW is 0; the rest as in the release. λ = 1: the dense core's Xavier-uniform entries
        have spread 1/R, so that with the same p_n both cores give U x the same variance."""
        for name, d in self.widths.items():
            self.down[name].uniform_(-1 / math.sqrt(d), 1 / math.sqrt(d))
            self.up[name].zero_()
            if self.config.core == "cp":
                self.core[name].fill_(1.0)
            else:
                nn.init.xavier_uniform_(self.core[name])
        for point in points:
            bound = math.sqrt(6 / (self.config.rank + started_together(point, self.config)))
            self.vectors[point.part][point.vectors].uniform_(-bound, bound)

    def forward(self, point: Point, x: Tensor) -> Tensor:
        """Δ(x) (..., out) of ``x`` (..., in)."""
        down, up, core, vectors = (tensor.to(x.device) for tensor in self._of(point))
        x = x.to(down.dtype)
        if point.columns == 1:
            low = F.linear(x, down[:, : point.into]).unsqueeze(-2)
        else:
            x = F.pad(x, (0, point.columns * down.shape[1] - point.into))
            low = F.linear(x.unflatten(-1, (point.columns, -1)), down)
        low = self.dropout(low)
        if self.config.core == "cp":
            mixed = torch.einsum("...kr,bkr->...br", low, core * vectors)
        else:
            mixed = torch.einsum("...kx,bkxy->...by", low, mixing(core, vectors))
        return F.linear(mixed, up).flatten(-2)[..., : point.out]

    @torch.no_grad()
    def delta(self, point: Point) -> Tensor:
        """ΔW (out, in) of the whole matrix, in U's type."""
        down, up, core, vectors = self._of(point)
        mix = torch.diag_embed(core * vectors) if self.config.core == "cp" else mixing(core, vectors)
        slices = up @ mix.mT @ down  # (rows, columns, d, d)
        whole = slices.transpose(1, 2).flatten(2).flatten(0, 1)
        return whole[: point.out, : point.into]

    def _of(self, point: Point) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """U, V, the core and the p_n of the slices (rows, columns, R)."""
        name = self.config.set_of(point.part)
        vectors = self.vectors[point.part][point.vectors].view(point.rows, point.columns, -1)
        return self.down[name], self.up[name], self.core[name], vectors

    def check(self, points: Sequence[Point], widths: Mapping[str, int]) -> None:
        """ModelError unless the parameters were made for these projections."""
        if widths != self.widths or vector_counts(points) != {part: len(p) for part, p in self.vectors.items()}:
            raise ModelError("this Aurora was made for models of other widths or depth: make a new one")


def mixing(core: Tensor, vectors: Tensor) -> Tensor:
    """M = Σ_c C[:, :, c] p[c] for every slice: (rows, columns, R, R)."""
    return torch.einsum("xyc,bkc->bkxy", core, vectors)


def started_together(point: Point, config: AuroraConfig) -> int:
    """m of the bound √(6 / (R + m)): how many p_n the release draws as one R × m matrix. It holds an encoder layer's
    attention (4) and its MLP (8) together, and the text model's projections apart."""
    if point.kind == "mlp":
        return 2 * point.rows * point.columns
    return sum(kind != "mlp" for kind in config.encoder) if point.part == "encoder" else 1
