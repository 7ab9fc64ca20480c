"""Every case, in the order in which they run."""

from mitrain.bench.faults import folders, inputs, ranks, stores, training
from mitrain.bench.faults.suite import CASES

__all__ = ["CASES", "folders", "inputs", "ranks", "stores", "training"]
