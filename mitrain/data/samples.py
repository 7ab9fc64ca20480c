"""What every sample has, whatever its task: a name, and the files of its modalities."""

from collections.abc import Mapping
from dataclasses import dataclass


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
