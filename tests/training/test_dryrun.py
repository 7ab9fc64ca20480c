"""--dry-run: what it counts."""

import pytest
import torch
from source_tree import ROOT

from mitrain.core.errors import ConfigError
from mitrain.training import schema
from mitrain.training.dryrun import dry_run, stage_bytes

CONFIG = ROOT / "configs" / "mit-llama2-7b-refcoco.yaml"
LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128_256, "tie_word_embeddings": False,
}  # fmt: skip


def plan_of_70b(ranks=8, **model):
    values = schema.load(CONFIG).to_dict()
    shape = {"llm_shape": LLAMA_70B, "dtype": "bf16", "quantize": "none", "quantize_embedding": False, **model}
    return dry_run(schema.from_dict({**values, "model": {**values["model"], **shape}}), ranks)


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


@pytest.mark.parametrize("method", ["pmf", "none"])
def test_what_a_method_of_two_encoders_trains_is_counted(method):
    config = schema.load(ROOT / "configs" / "pmf-food101.yaml", [f"adapter={{name: {method}}}"])
    pmf = 2 * (6 * 4 * 768 + 2 * (2 * 768 * 384 + 384 + 768))
    assert dry_run(config).trainable_parameters == (method == "pmf") * pmf + 101 * (2 * 768 + 1)


def test_the_optimizers_bytes_are_those_of_torchs_adamw():
    weight = torch.nn.Parameter(torch.ones(1000))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    moments = sum(s.nbytes for s in optimizer.state[weight].values() if s.numel() > 1)
    assert stage_bytes(1000, 11, 3)["0"] == weight.nbytes + weight.grad.nbytes + moments + 11


def test_ranks_must_be_positive():
    with pytest.raises(ConfigError, match="--ranks 0"):
        dry_run(schema.load(CONFIG), 0)
