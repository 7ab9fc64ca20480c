"""A small study, and numbers that its cells could have measured."""

BASE = {
    "name": "base",
    "model": {"llm": "nowhere", "encoders": {"image": "nothing"}},
    "adapter": {"name": "mit", "layers": "1-2"},
    "task": {"name": "classify"},
    "data": {"name": "labelled", "root": "data"},
    "train": {"steps": 5},
}

STUDY = {
    "name": "tiny",
    "tasks": {"label": {"config": "base.yaml", "metric": "accuracy"}},
    "methods": {"mit": {}, "none": {"adapter": {"name": "none"}}, "plain": ["adapter.gate=none"]},
    "seeds": [0, 1],
}

NUMBERS = {
    "metric": "accuracy", "value": 0.5, "metrics": {"accuracy": 0.5}, "controls": {"other-inputs": 0.2},
    "trainable_parameters": 10, "frozen_parameters": 990, "share": 0.01, "peak_bytes": 4000, "saved_bytes": 100,
    "step_ms": 1.0, "flops_per_sample": 1e6, "adapter_bytes": 40,
}  # fmt: skip
