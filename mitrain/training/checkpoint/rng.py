"""The random generators' states, of one process and of every rank of a run."""

import base64
import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mitrain.core import dist
from mitrain.core.errors import CheckpointError
from mitrain.training.checkpoint.manifest import OTHER


def rng_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators (every CUDA device's too) as JSON."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": {"version": version, "words": encode(np.array(words, np.uint32)), "gauss": gauss},
        "numpy": {**numpy, "state": {"key": encode(numpy["state"]["key"]), "pos": int(numpy["state"]["pos"])}},
        "torch": encode(torch.get_rng_state().numpy()),
        "cuda": [encode(state.numpy()) for state in cuda],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Take over what ``rng_state`` gave. CUDA states beyond the devices of this machine are left out."""
    try:
        python, numpy = state["python"], dict(state["numpy"])
        numpy["state"] = {"key": decode(numpy["state"]["key"], np.uint32), "pos": numpy["state"]["pos"]}
        words = tuple(map(int, decode(python["words"], np.uint32)))
        random.setstate((python["version"], words, python["gauss"]))
        np.random.set_state(numpy)
        torch.set_rng_state(torch.from_numpy(decode(state["torch"], np.uint8)))
        for device, encoded in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(torch.from_numpy(decode(encoded, np.uint8)), device)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"the saved random state cannot be read ({str(error)[:80]}): {OTHER}") from None


def rng_of_ranks() -> list[dict[str, Any]]:
    """Every rank's ``rng_state``, in the order of the ranks; all ranks call it together."""
    return dist.gather(rng_state())


def resume_rng(saved: Any, seed: int, step: int) -> bool:
    """Continue every rank's generators from ``saved``, what ``rng_of_ranks`` gave.

    Where as many ranks run now, each takes over its own state and True is returned; otherwise each starts anew from
    (``seed``, ``step``, its rank), the same on every resume of that step, and False is returned.
    """
    if not isinstance(saved, list) or not saved:
        raise CheckpointError(f"the saved random state is a {type(saved).__name__}, not a list by rank: {OTHER}")
    if len(saved) == dist.world():
        set_rng_state(saved[dist.rank()])
        return True
    seed_rank(seed, step, dist.rank())
    return False


def seed_rank(seed: int, step: int, rank: int) -> None:
    """Seed Python's, NumPy's and torch's generators; no two of (``seed``, ``step``, ``rank``) give the same numbers."""
    drawn = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    random.seed(drawn)
    np.random.seed(np.frombuffer(drawn, np.uint32))
    torch.manual_seed(int.from_bytes(drawn[:8], "little"))


def encode(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def decode(text: str, dtype: type) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype).copy()
