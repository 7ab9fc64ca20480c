"""Decoders for referring segmentation: encoder patch tokens plus one text vector in, mask logits out.

Three decoders share one call, ``decoder(levels, condition, grid)``:

* `FilmDecoder`, a small transformer over several encoder levels in the manner of CLIPSeg (Lüddecke & Ecker, CVPR 2022);
  the text enters by FiLM (Perez et al., AAAI 2018). MiT (arXiv 2403.05060) publishes its numbers with this one.
* `UnetDecoder`, convolutions that grow the map while the encoder levels are concatenated: MiT's alternative.
* `GroundDecoder`, which first finds the patches that are meant and then draws the mask: better on things never seen.

Shape suffixes: B batch, N tokens (prefix tokens first, then gh·gw patches row by row), c channels of one level,
C classes, gh × gw patch grid, h × w logit map.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mitrain.core.errors import ConfigError, ModelError

NORM_EPS = 1e-6
FILM_PLACES = ("first", "every")


class Film(nn.Module):
    """Feature-wise affine map, ``x ⊙ (z W_mul + b_mul) + (z W_add + b_add)``, one per sample for all tokens."""

    def __init__(self, condition_width: int, dim: int):
        super().__init__()
        self.multiply = nn.Linear(condition_width, dim)
        self.add = nn.Linear(condition_width, dim)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        return tokens * self.multiply(condition)[:, None] + self.add(condition)[:, None]


class FilmDecoder(nn.Module):
    """Transformer decoder over encoder levels, conditioned on a text vector z by FiLM.

        o_0 = Layer_0(FiLM(R_0 h_0, z))
        o_i = Layer_i(R_i h_i + o_{i-1})          with film="every": Layer_i(FiLM_i(R_i h_i + o_{i-1}, z))

    where h_i is level i (B, N, level_widths[i]), deepest first, R_i an affine reduction to ``dim`` and Layer_i a
    post-norm transformer layer (ReLU, no dropout). The prefix tokens take part and are dropped before
    conv 3×3 → ReLU → transposed conv → ReLU → transposed conv, each of kernel = stride = max(1, patch // 4).

    Args:
        level_widths: channels of every level, in the order in which they are passed.
        condition_width: width of z; several read-outs of a text are concatenated by the caller.
        film: "first" (published) or "every" level.
        classes: 2 (background, foreground; published) or 1 (a foreground score).
        patch: pixels per patch side of the encoder; sets how far the map is enlarged.
        prefix_tokens: tokens before the patches (CLS, registers).
        coords: add a learned linear map of each patch's position in [-1, 1]², so that "left" and "top" can be
            learned from encoders whose tokens hold little of it. Not in the paper.

    The defaults are the published setting: 1,620,642 parameters with three levels of 1024 and a condition of 4096.
    The release's head count of 6 does not divide 64 and can't run: it is 4 here.
    """

    def __init__(
        self,
        level_widths: Sequence[int],
        condition_width: int,
        *,
        dim: int = 64,
        heads: int = 4,
        ffn: int = 2048,
        film: str = "first",
        classes: int = 2,
        patch: int = 14,
        prefix_tokens: int = 1,
        coords: bool = False,
    ):
        super().__init__()
        check_shape(level_widths, classes)
        if film not in FILM_PLACES:
            raise ConfigError(f"film={film!r} is not known: choose one of {', '.join(FILM_PLACES)}")
        if dim % 2 or dim % heads:
            raise ConfigError(f"decoder dim={dim} must be even and a multiple of heads={heads}: 64 goes with 4 or 8")
        self.prefix_tokens = prefix_tokens
        self.reduce = nn.ModuleList(nn.Linear(width, dim) for width in level_widths)
        conditioned = len(level_widths) if film == "every" else 1
        self.film = nn.ModuleList(Film(condition_width, dim) for _ in range(conditioned))
        self.layers = nn.ModuleList(transformer_layer(dim, heads, ffn) for _ in level_widths)
        self.position = nn.Linear(2, dim, bias=False) if coords else None
        self.enlarge = enlarging_head(dim, classes, stride=max(1, patch // 4))

    def forward(self, levels: Sequence[Tensor], condition: Tensor, grid: tuple[int, int]) -> Tensor:
        """Logits (B, C, gh·s², gw·s²) with s = max(1, patch // 4); inputs are cast to the decoder's dtype and device.

        The levels are (B, N, c), N = prefix_tokens + gh·gw, and the condition z.
        """
        check_levels(levels, len(self.reduce), self.prefix_tokens, grid)
        condition = condition.to(self.reduce[0].weight)
        position = self.position(patch_coordinates(grid, self.prefix_tokens).to(condition)) if self.position else 0
        tokens = 0
        for i, level in enumerate(levels):
            tokens = tokens + self.reduce[i](level.to(condition)) + position
            if i < len(self.film):
                tokens = self.film[i](tokens, condition)
            tokens = self.layers[i](tokens)
        return self.enlarge(to_map(tokens, self.prefix_tokens, grid))


class UnetDecoder(nn.Module):
    """Convolutional decoder: z is tiled over the patch grid and concatenated with the deepest level.

        x_0 = Pair_0([tile(z) ; h_0])             at the grid itself, say 24²
        x_i = Pair_i([up(x_{i-1}) ; up(h_i)])     at 8/3 of the grid (64²), then doubled at each level (128²)
        logits = conv 1×1 (x_last)

    where Pair is twice conv 3×3 → batch norm → ReLU of ``width`` channels and up is bilinear with aligned corners.
    Arguments and errors as in `FilmDecoder`; the published width is 512.
    """

    def __init__(
        self,
        level_widths: Sequence[int],
        condition_width: int,
        *,
        width: int = 512,
        classes: int = 2,
        prefix_tokens: int = 1,
    ):
        super().__init__()
        check_shape(level_widths, classes)
        self.prefix_tokens = prefix_tokens
        before = [condition_width] + [width] * (len(level_widths) - 1)
        self.pairs = nn.ModuleList(conv_pair(b + level, width) for b, level in zip(before, level_widths, strict=True))
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, levels: Sequence[Tensor], condition: Tensor, grid: tuple[int, int]) -> Tensor:
        """Logits (B, C, h, w), h × w being the last of `unet_sizes`; arguments as in `FilmDecoder.forward`."""
        check_levels(levels, len(self.pairs), self.prefix_tokens, grid)
        condition = condition.to(self.classify.weight)
        x = condition[:, :, None, None].expand(-1, -1, *grid)
        for pair, level, size in zip(self.pairs, levels, unet_sizes(grid, len(levels)), strict=True):
            skip = to_map(level.to(condition), self.prefix_tokens, grid)
            x = pair(torch.cat([resize(x, size), resize(skip, size)], dim=1))
        return self.classify(x)


class GroundDecoder(nn.Module):
    """Finds what is meant among the patches, then draws it: all that the mask knows of the text is where it points.

        h   = [norm(h_0) ; norm(h_1) ; …]             the levels side by side, each normalised by itself
        x   = Layers(R h + P (x, y))                  two transformer layers: patches beside their neighbours and copies
        c_p = cos(Q z, K [h_p ; x_p])                 grounding: τ c_p, trained by `grounding_loss`
        o   = Layers(R' h + P' (x, y) + S [c, c - max c, c - mean c])

    and the head of `FilmDecoder`. No gradient of the mask reaches the grounding, so that a mask is drawn of whatever the
    text points at, a thing never seen in training included. Not in the paper. Arguments, errors as in `FilmDecoder`.
    """

    start = 10.0  # τ

    def __init__(
        self,
        level_widths: Sequence[int],
        condition_width: int,
        *,
        dim: int = 64,
        heads: int = 4,
        ffn: int = 256,
        classes: int = 1,
        patch: int = 14,
        prefix_tokens: int = 1,
    ):
        super().__init__()
        check_shape(level_widths, classes)
        if dim % heads or dim % 2:
            raise ConfigError(f"decoder dim={dim} must be even and a multiple of heads={heads}: 64 goes with 4 or 8")
        self.prefix_tokens, self.levels, width = prefix_tokens, len(level_widths), sum(level_widths)
        self.look, self.reduce = nn.Linear(width, dim), nn.Linear(width, dim)
        self.places = nn.ModuleList(nn.Linear(2, dim, bias=False) for _ in range(2))
        self.context = nn.ModuleList(transformer_layer(dim, heads, ffn) for _ in range(2))
        self.layers = nn.ModuleList(transformer_layer(dim, heads, ffn) for _ in range(2))
        self.query, self.key = nn.Linear(condition_width, 2 * dim), nn.Linear(width + dim, 2 * dim)
        self.sharpness = nn.Parameter(torch.tensor(self.start).log())
        self.pointed = nn.Linear(3, dim)
        self.enlarge = enlarging_head(dim, classes, stride=max(1, patch // 4))

    def forward(self, levels: Sequence[Tensor], condition: Tensor, grid: tuple[int, int]) -> Tensor:
        """Logits (B, C, gh·s², gw·s²); arguments as in `FilmDecoder.forward`."""
        return self.grounded(levels, condition, grid)[0]

    def grounded(self, levels: Sequence[Tensor], condition: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The logits, and τ c (B, gh, gw): how much each patch is meant."""
        check_levels(levels, self.levels, self.prefix_tokens, grid)
        weight = self.reduce.weight
        seen = torch.cat([F.layer_norm(level.to(weight), level.shape[-1:]) for level in levels], -1)
        centres = patch_coordinates(grid, self.prefix_tokens).to(weight)
        tokens = self.look(seen) + self.places[0](centres)
        for layer in self.context:
            tokens = layer(tokens)
        keys = F.normalize(self.key(torch.cat([seen, tokens], -1)), dim=-1)
        meant = (keys @ F.normalize(self.query(condition.to(weight)), dim=-1)[:, :, None])[..., 0]
        drawn = self.reduce(seen) + self.places[1](centres) + self.pointed(self._peaks(meant.detach()))
        for layer in self.layers:
            drawn = layer(drawn)
        meant = self.sharpness.exp() * meant[:, self.prefix_tokens :].unflatten(1, grid)
        return self.enlarge(to_map(drawn, self.prefix_tokens, grid)), meant

    def _peaks(self, meant: Tensor) -> Tensor:
        """(B, N, 3): the cosines, and how far they are below their largest and from their mean, of the patches."""
        patches = meant[:, self.prefix_tokens :]
        return torch.stack([meant, meant - patches.amax(1, True), meant - patches.mean(1, True)], -1)


def grounding_loss(meant: Tensor, target: Tensor) -> Tensor:
    """(B,) cross-entropy of a softmax over the patches ``meant`` (B, gh, gw) and the share of the target that each holds.

    ``target``: (B, h, w), bool or in [0, 1]; a sample without a target counts 0.
    """
    shares = F.adaptive_avg_pool2d(target.to(meant)[:, None], meant.shape[-2:]).flatten(1)
    shares = shares / shares.sum(1, keepdim=True).clamp_min(1e-6)
    return -(shares * F.log_softmax(meant.flatten(1), 1)).sum(1)


def transformer_layer(dim: int, heads: int, ffn: int) -> nn.Module:
    return nn.TransformerEncoderLayer(dim, heads, ffn, dropout=0.0, layer_norm_eps=NORM_EPS, batch_first=True)


def enlarging_head(dim: int, classes: int, stride: int) -> nn.Module:
    """(B, dim, gh, gw) → (B, classes, gh·stride², gw·stride²)."""
    return nn.Sequential(
        nn.Conv2d(dim, dim, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(dim, dim // 2, stride, stride),
        nn.ReLU(),
        nn.ConvTranspose2d(dim // 2, classes, stride, stride),
    )


def conv_pair(channels: int, width: int) -> nn.Module:
    """Twice conv 3×3 → batch norm → ReLU; the norm's shift makes a convolution bias superfluous."""
    first = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    second = [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*first, *second)


def unet_sizes(grid: tuple[int, int], levels: int) -> list[tuple[int, int]]:
    """Map size at every level: the grid, 8/3 of it, then doubled: 24², 64², 128² for CLIP ViT-L/14 at 336 px."""
    sizes = [grid, (round(grid[0] * 8 / 3), round(grid[1] * 8 / 3))]
    while len(sizes) < levels:
        sizes.append((2 * sizes[-1][0], 2 * sizes[-1][1]))
    return sizes[:levels]


def patch_coordinates(grid: tuple[int, int], prefix_tokens: int) -> Tensor:
    """(N, 2) float64 patch centres as (x, y) in [-1, 1], left to right and top to bottom; (0, 0) for prefix tokens."""
    y, x = (torch.linspace(1 / n - 1, 1 - 1 / n, n, dtype=torch.float64) for n in grid)
    centres = torch.stack([x.repeat(grid[0]), y.repeat_interleave(grid[1])], dim=-1)
    return torch.cat([centres.new_zeros(prefix_tokens, 2), centres])


def to_map(tokens: Tensor, prefix_tokens: int, grid: tuple[int, int]) -> Tensor:
    """(B, N, c) tokens → (B, c, gh, gw) map without the prefix tokens."""
    return tokens[:, prefix_tokens:].transpose(1, 2).unflatten(2, grid)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with aligned corners, (B, c, h, w) → (B, c, *size): the published choice everywhere."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def check_shape(level_widths: Sequence[int], classes: int) -> None:
    if not level_widths:
        raise ConfigError("a decoder needs at least one encoder level: name some, deepest first")
    if classes not in (1, 2):
        raise ConfigError(f"decoder classes={classes} is not possible: choose 2 (background, foreground) or 1")


def check_levels(levels: Sequence[Tensor], expected: int, prefix_tokens: int, grid: tuple[int, int]) -> None:
    if len(levels) != expected:
        raise ModelError(f"the decoder was built for {expected} encoder levels and got {len(levels)}: pass {expected}")
    tokens = prefix_tokens + grid[0] * grid[1]
    for i, level in enumerate(levels):
        if level.shape[1] != tokens:
            raise ModelError(
                f"encoder level {i} has {level.shape[1]} tokens where a grid of {grid[0]}x{grid[1]} with "
                f"{prefix_tokens} prefix tokens makes {tokens}: set prefix_tokens and the grid to match the encoder"
            )
