"""What of the (infused) language model's states a head reads.

Shapes: B samples, T tokens, D hidden width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mitrain.tasks.base import Parts

STATES = ("last", "mean")  # read-outs that run the language model


def read_out(
    parts: Parts, rows: Sequence[Sequence[int]], names: Sequence[str], features: Tensor | None
) -> dict[str, Tensor]:
    """Each read-out (B, D) of ``rows`` of token ids under infused ``features`` (B, e).

    ``last``: the last token's final state; ``mean``: the final states' mean; ``embeddings``: the input embeddings' mean.
    """
    ids, mask = parts.text.pad(rows)
    found: dict[str, Tensor] = {}
    if set(names) & set(STATES):
        below = parts.states.batch(rows)
        with parts.adapter.bind({"image": features}):
            hidden = parts.text.hidden(ids, mask, below, parts.states.depth).float()
        found["last"] = hidden[torch.arange(len(rows)), mask.sum(1) - 1]
        found["mean"] = mean_over(hidden, mask)
    if "embeddings" in names:
        found["embeddings"] = mean_over(parts.text.embeddings(ids).float(), mask)
    return found


def mean_over(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, T, D) over the tokens that ``mask`` (B, T) admits."""
    weight = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weight).sum(1) / weight.sum(1)
