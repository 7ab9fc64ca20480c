"""Every case, in the order in which they run."""

from benchmarks.faults import folders, inputs, ranks, stores, training
from benchmarks.faults.suite import CASES

__all__ = ["CASES", "folders", "inputs", "ranks", "stores", "training"]
