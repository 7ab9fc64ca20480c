"""Contrast within a batch that is spread over ranks.

Shapes: B samples of this rank, N of all ranks, d width of the common space, e width of the file's feature.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mitrain.core import dist
from mitrain.models.batch import ModalityInputs
from mitrain.tasks.base import Batch


class Everyone:
    """The batch over all ranks: own vectors with their gradient, the others' without.

    Each rank computes the whole batch's contrast, and back-propagates through its own vectors alone; summed over the
    ranks that is the gradient of one process. ``keys``: each sample's file and text; ``matching``: the
    inputs themselves are wanted too.
    """

    def __init__(self, files: Tensor, partners: Tensor, batch: Batch, keys: Sequence[tuple[str, str]], matching: bool):
        cpu = torch.device("cpu")
        inputs = batch.inputs.to(cpu) if matching else None
        parts = dist.gather((files.detach().cpu(), partners.detach().cpu(), inputs, keys))
        here = dist.rank()
        self.keys = keys
        self.start = sum(len(part[3]) for part in parts[:here])
        self.count = len(keys)
        self.files = torch.cat([files if r == here else part[0].to(files) for r, part in enumerate(parts)])
        self.partners = torch.cat([partners if r == here else part[1].to(partners) for r, part in enumerate(parts)])
        self.inputs = ModalityInputs.joined([part[2] for part in parts]) if matching else None
        self.texts = [text for part in parts for _, text in part[3]]
        self.similarity = self.files @ self.partners.T
        self.right = self._right([file for part in parts for file, _ in part[3]]).to(files.device)

    def _right(self, files: Sequence[str]) -> Tensor:
        """(N, N) bool: which text is right for which file: the file's own, or the same text."""
        a, b = (torch.from_numpy(np.unique(np.array(v), return_inverse=True)[1]) for v in (files, self.texts))
        return (a[:, None] == a[None]) | (b[:, None] == b[None])

    def contrast(self, sharpness: Tensor) -> Tensor:
        """The mean of both ways' cross-entropies, summed over this rank's rows; of several right partners each is meant
        equally."""
        own = slice(self.start, self.start + self.count)
        through_vectors = self._rows(sharpness.detach() * self.similarity)
        through_sharpness = self._rows(sharpness * self.similarity.detach())[own].sum()
        whole = through_vectors.sum()
        value = through_vectors[own].sum().detach()
        return value + (whole - whole.detach()) + (through_sharpness - through_sharpness.detach())

    def _rows(self, logits: Tensor) -> Tensor:
        """(N,) the mean of the cross-entropies of file → text and of text → file."""
        meant = self.right.to(logits)
        ways = [
            -(side.log_softmax(-1) * meant).sum(-1) / meant.sum(-1) for side in (logits, logits.T)
        ]  # ``right`` is symmetric
        return 0.5 * (ways[0] + ways[1])

    def hardest(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each own sample the wrong text and the wrong file most similar to it (B,), and 1 where there is one."""
        own = slice(self.start, self.start + self.count)
        wrong = self.similarity.detach().masked_fill(self.right, -torch.inf)
        known = (~self.right[own]).any(1)
        return wrong[own].argmax(1), wrong[:, own].argmax(0), known.to(self.similarity)
