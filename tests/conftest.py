"""What every test shares: no model hub, no account, one thread (the tensors are tiny, and runs stay comparable)."""

import gc
import os
from collections.abc import Iterator

import pytest
from ranks import Forge

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """What was imported stays, and the collector need not walk it again: 0.5 s a time, and benchmarks ask for it often."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def forge() -> Iterator[Forge]:
    """Starts ranks as forks of one process that has imported everything."""
    forge = Forge()
    yield forge
    forge.close()
