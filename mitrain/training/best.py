"""The best score on val: which step had it, and how long ago that is."""

import math
from collections.abc import Mapping
from typing import Any


class Best:
    """The best ``value`` so far and its ``step`` (0: there is none yet), the lowest where the task ``minimises``.

    ``waited``: evaluations since then. At ``patience`` of them, if it is given, the run has `ended`.
    """

    def __init__(self, minimises: bool, patience: int | None = None):
        self.minimises, self.patience = minimises, patience
        self.value, self.step, self.waited = -math.inf, 0, 0

    def take(self, value: float, step: int) -> bool:
        """Whether ``value`` is the best so far; of equal ones the first is."""
        if self.step and (value >= self.value if self.minimises else value <= self.value):
            self.waited += 1
            return False
        self.value, self.step, self.waited = value, step, 0
        return True

    @property
    def ended(self) -> str | None:
        """Why the run is over before its last step, or None."""
        if self.patience is None or self.waited < self.patience:
            return None
        return f"{self.waited} evaluations without a better val (train.patience={self.patience})"

    def state_dict(self) -> dict[str, Any]:
        # JSON has no infinity; a best step of 0 says that there is no score yet.
        return {"best": self.value if self.step else -1.0, "best_step": self.step, "waited": self.waited}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over ``state_dict()``; ValueError where it is none."""
        value, step, waited = state["best"], state["best_step"], state["waited"]
        counts = all(type(number) is int and number >= 0 for number in (step, waited))
        if type(value) not in (int, float) or not math.isfinite(value) or not counts:
            raise ValueError(
                f"no score has best={str(value)[:20]}, best_step={str(step)[:20]} and waited={str(waited)[:20]}"
            )
        self.value, self.step, self.waited = float(value), step, waited
