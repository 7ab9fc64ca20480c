"""The version, which set-up reads without importing the package, and the oldest torch that computes what it should."""

from mitrain.core.errors import UserError

__version__ = "0.1.0"

TORCH = (2, 13)  # as pyproject.toml asks; pip lets another package's older one stand


def require_torch(found: str) -> None:
    """UserError where torch is older: version 2.8 under transformers 5.23 computes other numbers, without an error."""
    if tuple(int(part) for part in found.split(".")[:2]) < TORCH:
        least = ".".join(map(str, TORCH))
        raise UserError(f"torch {found} gives wrong numbers here and says nothing: pip install -U 'torch>={least}'")
