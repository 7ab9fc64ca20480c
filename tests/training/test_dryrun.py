"""--dry-run: what its estimate is made of."""

import pytest
from source_tree import ROOT

from mitrain.models import costs
from mitrain.training import schema
from mitrain.training.dryrun import dry_run

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


LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128_256, "tie_word_embeddings": False,
}  # fmt: skip


def plan_of_70b(ranks=8, **model):
    values = schema.load(CONFIG).to_dict()
    shape = {"llm_shape": LLAMA_70B, "dtype": "bf16", "quantize": "none", "quantize_embedding": False, **model}
    return dry_run(schema.from_dict({**values, "model": {**values["model"], **shape}}), memory_gb=80, ranks=ranks)


def test_bytes_by_precision_of_a_model_of_70b():
    """By hand: 80 layers of (q, o) 8192², (k, v) 8192 · 1024 and three of 8192 · 28672 weights, the rest in bf16."""
    linear = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    rows = 80 * (2 * 8192 + 2 * 1024 + 2 * 28672 + 8192)
    plan = plan_of_70b()
    rest, trained = 2 * (plan.frozen_parameters - linear), plan.trainable_parameters
    frozen = {
        "fp32": 4 * plan.frozen_parameters,
        "bf16": 2 * linear + rest,
        "int8": linear + 4 * rows + rest,
        "nf4": linear // 2 + 4 * linear // 64 + rest,
    }
    assert list(plan.bytes_by_precision) == list(frozen) and plan.precision == "bf16"
    for name, size in frozen.items():
        assert plan.bytes_by_precision[name]["0"] == size + 16 * trained
        assert plan.bytes_by_precision[name]["3"] == pytest.approx((size + 12 * trained) / 8 + 8 * trained, abs=4)
    assert plan.bytes_per_rank == plan.bytes_by_precision["bf16"]
    assert "* bf16" in plan.text() and "  nf4" in plan.text()


def test_a_quantised_embedding_is_counted_in_int8():
    table = LLAMA_70B["vocab_size"] * LLAMA_70B["hidden_size"]
    plain, small = (plan_of_70b(quantize="nf4", quantize_embedding=q).bytes_per_rank["0"] for q in (False, True))
    assert plain - small == table - 4 * LLAMA_70B["vocab_size"]  # 2 bytes a weight become 1, and a step per row


def test_activations_of_a_changed_image_encoder_are_counted():
    """PMF runs its two upper layers of both encoders twice: 196 patches and the class token beside the words."""
    config = schema.load(ROOT / "configs" / "pmf-food101.yaml")
    plan = dry_run(config, memory_gb=24, ranks=1, tokens=64)
    assert plan.trainable_parameters == 2 * (6 * 4 * 768 + 2 * (2 * 768 * 384 + 384 + 768)) + 101 * (2 * 768 + 1)
    shape = costs.LlmShape(768, 12, 12, 12, 64, 3072, vocab=0, tied=True, gated=False)
    layers = sum(costs.activation_bytes(shape, tokens, 2, 0) for tokens in (64, 197))
    head = 4 * 2 * (2 * 768 + 101)
    assert plan.activation_bytes_per_sample == 2 * layers + head
    frozen = dry_run(schema.load(ROOT / "configs" / "pmf-food101.yaml", ["adapter={name: none}"]), memory_gb=24, ranks=1)
    assert frozen.activation_bytes_per_sample == head


def test_a_swin_has_no_one_shape():
    assert costs.encoder_shape({"hidden_size": 1024, "num_hidden_layers": 4, "num_heads": [4, 8]}) is None
    found = costs.encoder_shape({"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "mlp_ratio": 4})
    assert (found.ffn, found.head_dim) == (1536, 64)
