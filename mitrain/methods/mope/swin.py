"""Running a Swin transformer with prompts: window attention in which each sample's prompts reach exactly its own windows.

Windows lie sample by sample (row b·W + w), so prompts are repeated sample by sample, too; the authors' release repeats
them window by window, which hands sample b the prompts of others.

Shapes: B samples, N = height · width tokens, D width of the stage, n prompts, W windows of a sample, S tokens a window.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, SwinModel
from transformers.models.swin.modeling_swin import window_partition, window_reverse

from mitrain.core.errors import ModelError
from mitrain.methods.mope.encoder import Encoded, Prompter, call

Grid = tuple[int, int]


class SwinEncoder:
    """A SwinModel's blocks, stage by stage.

    Under ``carried`` the first block of a stage takes what left the prompts of the stage before, merged like patches,
    and the very first block takes the entry prompt; under ``prompted`` every block gets its own.
    """

    causal: ClassVar[bool] = False
    has_first: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel, carried: bool):
        self.model: SwinModel = getattr(model, "base_model", model)
        self.carried = carried
        layers = self.model.encoder.layers
        self.depth = len(layers)
        self.stage_widths = tuple(stage.blocks[0].layernorm_before.normalized_shape[0] for stage in layers)
        self.stages = tuple(s for s, stage in enumerate(layers) for _ in stage.blocks[int(carried) :])
        self.widths = tuple(self.stage_widths[s] for s in self.stages)
        self.entry = self.stage_widths[0] if carried else 0

    def run(
        self,
        states: Tensor,
        mask: Tensor | None,
        prompter: Prompter,
        entry: Tensor | None,
        checkpointing: bool,
        unseen: Tensor | None = None,
    ) -> Encoded:
        grid, index = grid_of(self.model, states), 0
        prompts = states[:, :0] if entry is None else entry.to(states.dtype)
        for stage in self.model.encoder.layers:
            for number, block in enumerate(stage.blocks):
                if number or not self.carried:
                    prompts = prompter(index, states, None).to(states.dtype)
                    index += 1
                states, prompts = call(checkpointing, run_block, block, states, prompts, grid)
            if stage.downsample is not None:
                states, prompts = merge_patches(stage.downsample, states, prompts, grid)
                grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
        return Encoded(states, prompts)

    def finish(self, states: Tensor) -> Tensor:
        return self.model.layernorm(states)

    def first(self, states: Tensor) -> Tensor:
        raise ModelError("Swin has no CLS token: the read-out 'first' is for other encoders, take 'mean'")


def is_swin(model: PreTrainedModel) -> bool:
    return isinstance(getattr(model, "base_model", model), SwinModel)


def grid_of(model: SwinModel, states: Tensor) -> Grid:
    """Height and width of the patches: the configuration's, or those of a square picture of another size."""
    grid, count = tuple(model.embeddings.patch_grid), states.shape[1]
    side = math.isqrt(count)
    if grid[0] * grid[1] != count and side * side != count:
        raise ModelError(f"{count} patches are neither Swin's {grid[0]} x {grid[1]} nor a square: give square pictures")
    return grid if grid[0] * grid[1] == count else (side, side)


def run_block(block: nn.Module, states: Tensor, prompts: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """One block on tokens (B, N, D) and prompts (B, n, D).

    Prompts stand in front of the tokens of each of their sample's windows; what attention makes of the copies is
    averaged over those windows. Norms, feed-forward and residuals take prompts and tokens alike.
    """
    block.set_shift_and_window_size(grid)
    seen, new = attend(block, block.layernorm_before(states), block.layernorm_before(prompts), grid)
    joined = torch.cat([prompts + new, states + seen], dim=1)
    joined = joined + block.mlp(block.layernorm_after(joined))
    prompts, states = joined.tensor_split((prompts.shape[1],), dim=1)
    return states, prompts


def attend(block: nn.Module, states: Tensor, prompts: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """(Shifted) window attention of normed tokens (B, N, D) and prompts (B, n, D): what it adds to either."""
    (batch, count, width), side = prompts.shape, block.window_size
    image, _ = block.maybe_pad(states.view(batch, *grid, width), *grid)
    high, wide = image.shape[1:3]
    windows = window_partition(block.cyclic_shift(image), side).view(-1, side * side, width)
    each = len(windows) // batch
    windows = torch.cat([prompts.repeat_interleave(each, dim=0), windows], dim=1)
    mask = block.get_attn_mask(high, wide, dtype=states.dtype, device=states.device)
    with enlarged(block.attention.relative_position_bias, count):
        out, _ = block.attention(windows, None if mask is None else in_front(mask, count))
    new, seen = out.tensor_split((count,), dim=1)
    image = window_reverse(seen.reshape(-1, side, side, width), side, high, wide)
    image = block.cyclic_shift(image, reverse=True)[:, : grid[0], : grid[1]]
    return image.reshape(states.shape), new.view(batch, each, count, width).mean(1)


def in_front(square: Tensor, count: int) -> Tensor:
    """(…, S, S) -> (…, n + S, n + S) with zeros for prompts: they have no place and every query sees them."""
    return F.pad(square, (count, 0, count, 0))


@contextmanager
def enlarged(bias: nn.Module, count: int) -> Iterator[None]:
    """Inside, the frozen relative position bias is as large as windows with ``count`` prompts."""
    hook = bias.register_forward_hook(lambda module, args, out: in_front(out, count))
    try:
        yield
    finally:
        hook.remove()


def merge_patches(merging: nn.Module, states: Tensor, prompts: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Tokens merge by fours; a prompt is its own four neighbours and passes the same norm and projection."""
    return merging(states, grid), merging.reduction(merging.norm(prompts.repeat(1, 1, 4)))
