"""What updates the trainable weights: ``Engine`` is what the trainer knows.

``LocalEngine`` is plain torch, alone or on several ranks that each hold all weights; ``mitrain.training.engine.zero`` is
DeepSpeed, the only file that imports it.
"""

from mitrain.training.engine.base import FP16_SCALE, Group, OptimizerConfig, StepResult, Sums, cut_group, regularised
from mitrain.training.engine.deepspeed_config import ZeroConfig
from mitrain.training.engine.local import LocalEngine

Engine = LocalEngine
"""ZeRO's engine is one, too."""
