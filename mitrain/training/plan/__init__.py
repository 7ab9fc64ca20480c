"""What a configuration takes, before anything is trained: memory, arithmetic, communication and time of a step.

``tracing`` runs one training step on tensors without storage and counts; ``batch`` makes its batch; ``traffic`` says what
the ranks send one another; ``machines`` holds what GPUs and links are said to do; ``plan`` puts it together, and
``report`` into words.
"""

from mitrain.training.plan.machines import GPUS, Machine, machine_of
from mitrain.training.plan.plan import Plan, PlanRequest, plan

__all__ = ["GPUS", "Machine", "Plan", "PlanRequest", "machine_of", "plan"]
