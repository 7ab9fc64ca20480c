"""What updates the trainable weights: ``Engine`` is the interface that the trainer knows.

``LocalEngine`` is plain torch, alone or on several ranks that each hold all weights; ``mitrain.training.engine.zero`` is
DeepSpeed, the only file that imports it.
"""

from mitrain.training.engine.base import FP16_SCALE, Engine, Group, OptimizerConfig, StepResult, Sums, cut_group, regularised
from mitrain.training.engine.deepspeed_config import ZeroConfig
from mitrain.training.engine.local import LocalEngine

__all__ = [
    "FP16_SCALE",
    "Engine",
    "Group",
    "LocalEngine",
    "OptimizerConfig",
    "StepResult",
    "Sums",
    "ZeroConfig",
    "cut_group",
    "regularised",
]
