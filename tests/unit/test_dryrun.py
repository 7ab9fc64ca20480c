"""--dry-run: what its estimate is made of."""

import pytest
from source_tree import ROOT

from mitrain import costs, schema
from mitrain.dryrun import dry_run

CONFIG = ROOT / "configs" / "mit-llama2-7b-refcoco.yaml"
LEVELS, CONDITION, GRID = [1024] * 3, 4096, (24, 24)


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [
        ("film", costs.film_decoder_activations(LEVELS, CONDITION, grid=GRID)),
        ("unet", costs.unet_decoder_activations(LEVELS, CONDITION, sizes=[(24, 24), (64, 64), (128, 128)])),
    ],
)
def test_the_decoders_activations_are_counted(decoder, expected):
    """At no tokens of text, only the decoder and the loss over 352 x 352 pixels are left."""
    config = schema.load(CONFIG, [f"task.decoder={decoder}", "task.loss_size=352", "task.loss=ce"])
    plan = dry_run(config, memory_gb=24, ranks=1, tokens=0)
    assert plan.activation_bytes_per_sample == expected + costs.mask_loss_activations("ce", 352**2)
    more = dry_run(config, memory_gb=24, ranks=1, tokens=64)
    assert more.activation_bytes_per_sample > plan.activation_bytes_per_sample
