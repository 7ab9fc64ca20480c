"""mitrain plan of every shipped configuration: a plan, or one line that says what is not there."""

import json
from pathlib import Path

import pytest

from mitrain.cli import main
from mitrain.training import schema

CONFIGS = sorted(path for folder in ("configs", "configs/reference") for path in Path(folder).glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_is_planned(path, tmp_path, monkeypatch, capsys):
    """Without any data or weights: what brings its models' shapes along has a plan."""
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path))
    model = schema.load(path).model
    shaped = model.llm_shape and all(encoder.shape for encoder in model.encoders.values())
    code = main(["plan", str(path), "--gpu", "h100-80g", "--memory", "1000", "train.batch=2", "--json"])
    captured = capsys.readouterr()
    assert code == 0 or (not shaped and code == 2 and captured.err.count("\n") == 1), captured.err
    if code == 0:
        found = json.loads(captured.out)
        assert found["fits"] and 2 <= found["largest_batch"] < 10**8 and found["per_rank_bytes"]["activations"] > 0
        assert found["flops_step"] >= 4 * found["macs_forward"] > 0
