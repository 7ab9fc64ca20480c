"""What ψ is read from follows what a text model's folder says of how a sentence's vector is made."""

import json

import pytest

from mitrain.methods.mope.config import MoPEConfig
from mitrain.models.encoders.text import pooling


@pytest.mark.parametrize(("mode", "read"), [("cls_token", "first"), ("mean_tokens", "mean"), ("lasttoken", "last")])
def test_auto_is_written_out_as_the_folder_says(tmp_path, mode, read):
    (tmp_path / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{name}": name == mode for name in ("cls_token", "mean_tokens", "lasttoken", "max_tokens")}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    resolved = MoPEConfig().with_pooling(lambda: pooling(tmp_path))
    assert resolved.condition == read
    assert MoPEConfig(condition="first").with_pooling(lambda: pooling(tmp_path)).condition == "first"
    assert MoPEConfig(main="text").with_pooling(lambda: pooling(tmp_path)).condition == "auto"


def test_a_folder_that_says_nothing_leaves_auto(tmp_path):
    assert pooling(tmp_path) is None
    assert MoPEConfig().with_pooling(lambda: pooling(tmp_path)).condition == "auto"
