"""A golden export: today's code opens it, and it says what it said."""

import golden
import pytest
from exported import PROMPT, make_world

from mitrain.inference.export import from_pretrained
from mitrain.methods import export_format

KEPT = golden.GOLDEN / "exports"
SAID = {"blue": 0.36542, "red": 0.356036, "green": 0.278544}
"""By the code that wrote it."""


def test_the_golden_export_says_what_it_said(tmp_path):
    world = make_world(tmp_path)
    models = {"base": world / "llm", "encoders": [world / "vision"]}
    found = from_pretrained(KEPT / f"format-{export_format.FORMAT}", **models, allow_changes=True)
    assert found.run.config.model.encoders["image"].input == "image"
    said = found.predict(world / "data" / "images" / "0.png", PROMPT, list(SAID))
    assert said["probabilities"] == pytest.approx(SAID, abs=1e-5)
