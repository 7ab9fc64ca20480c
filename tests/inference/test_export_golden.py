"""One golden export for every format there has been: today's code opens all of them, and they say what they said."""

import golden
import pytest
from exported import PROMPT, make_world

from mitrain.inference.export import from_pretrained
from mitrain.methods import export_format

KEPT = golden.GOLDEN / "exports"
VERSIONS = range(1, export_format.FORMAT + 1)
SAID = {"blue": 0.36542, "red": 0.356036, "green": 0.278544}
"""By the code that wrote format 1."""


def test_there_is_one_for_every_format():
    assert sorted(path.name for path in KEPT.iterdir()) == [f"format-{version}" for version in VERSIONS]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_golden_export_says_what_it_said(tmp_path, version):
    world = make_world(tmp_path)
    models = {"base": world / "llm", "encoders": [world / "vision"]}
    found = from_pretrained(KEPT / f"format-{version}", **models, allow_changes=True)
    assert found.run.config.model.encoders["image"].input == "image"
    said = found.predict(world / "data" / "images" / "0.png", PROMPT, list(SAID))
    assert said["probabilities"] == pytest.approx(SAID, abs=1e-5)
