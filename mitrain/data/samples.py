"""What every sample has, whatever its task: a name, and the files of its modalities; and how many may be bad."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from mitrain.core.errors import DataError

NAMED = 5  # bad samples that the final message names; the log names all
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """``inputs``: the paths of its files below the data's folder by their names, as image or speech; one that is not there
    is missing."""

    id: str
    inputs: Mapping[str, str]

    @property
    def files(self) -> str:
        """All its files as one name, which tells samples of the same files."""
        return named(self.inputs)

    def fault(self) -> str:
        """What is wrong with the sample beside its files: nothing, or it would not have been read."""
        return ""


def named(inputs: Mapping[str, str]) -> str:
    """The files of a sample as one name: the path of a single one."""
    return next(iter(inputs.values())) if len(inputs) == 1 else "\0".join(f"{n}={p}" for n, p in sorted(inputs.items()))


class BadSamples:
    """Counts distinct bad samples, and stops the run with DataError when there are too many.

    Too many: more than ``budget`` of the run's, or more than ``share`` of the samples of a split.
    """

    def __init__(self, budget: int, share: float = 0.1):
        self.budget, self.share = budget, share
        self.reasons: dict[str, str] = {}  # name of the sample → what is wrong with it

    def __len__(self) -> int:
        return len(self.reasons)

    def skip(self, name: str, reason: str) -> None:
        """Note a bad sample; the same one may come again in every epoch and counts once."""
        if name in self.reasons:
            return
        self.reasons[name] = reason
        log.warning("skipped %s (%d of at most %d): %s", name, len(self), self.budget, reason)
        if len(self) > self.budget:
            raise DataError(
                f"{len(self)} bad samples, more than data.bad_samples={self.budget}: {self.summary()} "
                "- mend or remove them, or raise the budget"
            )

    def check_share(self, lost: int, samples: int) -> None:
        """Raise DataError where too many of a split's ``samples`` are ``lost``."""
        if lost > self.share * samples:
            raise DataError(
                f"{lost} of {samples} samples cannot be used, more than the share data.bad_share={self.share:g}: "
                f"{self.summary()} - mend or remove them, or raise data.bad_share"
            )

    def summary(self) -> str:
        first = [f"{name} ({reason})" for name, reason in list(self.reasons.items())[:NAMED]]
        more = len(self) - len(first)
        return "; ".join(first) + (f"; and {more} more" if more else "")
