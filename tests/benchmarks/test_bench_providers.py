"""MiT beside others on one frozen model: ratios, equal work, and who refuses."""

import pytest

from benchmarks import providers, ranks
from benchmarks.faults import world
from mitrain.core.errors import ConfigError, UserError
from mitrain.models import loading


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Models of 3 layers; a provider's work is done in this process."""
    with loading.quiet():
        world.language_model(tmp_path / "llm")
        world.image_encoder(tmp_path / "vision")
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path / "cache"))
    written = []
    monkeypatch.setattr(providers, "write_json", lambda out, found: written.append(found))
    monkeypatch.setattr(ranks, "found", lambda work, given, count, limit: (work(*given, tmp_path), written.pop())[1])
    return {
        "llm": str(tmp_path / "llm"),
        "encoder": str(tmp_path / "vision"),
        "size": 28,
        "words": "the red green blue",
    }


def test_rows_have_ratios_and_the_same_work(tiny):
    found = providers.measured(
        ["mit", "mit-cached", "mit-cached-recomputed"], [providers.Shape(12, 4)], 1, 1, "command", print, tiny
    )
    first, full, cached, again = found["rows"]
    assert [row["provider"] for row in found["rows"]] == [
        "lora-all",
        "mit",
        "mit-cached",
        "mit-cached-recomputed",
    ] and not found["refused"]
    assert first["ratio_to_lora_all"] == first["peak_to_lora_all"] == 1 and first["tokens"] == 4 * 12
    assert cached["flops_per_sample"] < full["flops_per_sample"] < first["flops_per_sample"] * 1.2
    assert cached["bytes"]["weights"] < full["bytes"]["weights"] and again["saved_bytes"] < cached["saved_bytes"]
    assert cached["losses"] == pytest.approx(full["losses"], rel=1e-5) and again["losses"] == cached["losses"]
    assert providers.table(found).count("| mit") == providers.memory_table(found).count("| mit") == 3
    assert all(isinstance(row[key], int) for row in found["rows"] for key in ("process_bytes", "start_bytes"))


def test_each_shape_has_rows_and_a_first_one_of_its_own(tiny):
    shapes = [providers.Shape(6, 2, "2"), providers.Shape(12, 4, "1-2", "bf16", modalities=2)]
    found = providers.measured(["mit-cached"], shapes, 1, 1, "command", print, tiny)
    small, large = found["rows"][1::2]
    assert [row["ratio_to_lora_all"] for row in found["rows"][::2]] == [1, 1] and found["rows"][0] != found["rows"][2]
    assert (small["tokens"], large["tokens"]) == (2 * 6, 4 * 12) and small["dtype"] == "fp32" != large["dtype"]
    assert large["trainable_parameters"] > 2.5 * small["trainable_parameters"]  # two layers of two modalities
    text = providers.table(found)
    assert (
        "\n4 texts of 12 words a step, bf16, MiT in layers: 1-2, 2 modalities:\n" in text and text.count("| lora-all") == 2
    )


def test_texts_run_through_all_layers_while_steps_are_timed(tiny, monkeypatch):
    cached, taken_by = {}, providers.taken_by

    def noted(trainer, name, *given):
        found = taken_by(trainer, name, *given)
        cached[name] = trainer.model.states.cached
        return found

    monkeypatch.setattr(providers, "taken_by", noted)
    three = ["mit", "mit-released", "mit-cached"]
    found = providers.measured(three, [providers.Shape(6, 2)], 1, 1, "command", print, tiny)
    assert not cached["mit"] and not cached["mit-released"] and cached["mit-cached"]
    ours, theirs = (row["saved_bytes"] for row in found["rows"][1:3])
    assert ours < theirs  # the release's scores and gates are kept for the backward pass


def test_a_provider_that_cannot_be_is_named_with_its_reason(tiny, monkeypatch):
    monkeypatch.setattr(providers, "PROVIDERS", {**providers.PROVIDERS, "mit": {"name": "mit", "layers": [7]}})
    found = providers.measured(["mit"], [providers.Shape(6, 2)], 1, 1, "command", print, tiny)
    assert list(found["refused"]) == ["mit"] and "mit is not here: " in providers.table(found)
    with pytest.raises(ConfigError, match="'lora' is no provider: choose of lora-all, "):
        providers.measured(["lora"], [providers.Shape(6, 2)], 1, 1, "command", print, tiny)


def test_unequal_work_is_refused():
    rows = [{"provider": name, "tokens": 4, "batch": 2, "texts": "a", "files": name} for name in "xy"]
    with pytest.raises(UserError, match="^y and x do not do the same work: files y and x$"):
        providers.require_equal(rows)


def test_the_loop_of_transformers_takes_the_same_steps(tiny):
    found = providers.measured(["lora-all-hf-loop"], [providers.Shape(12, 4)], 1, 3, "command", print, tiny)
    own, theirs = found["rows"]
    assert theirs["provider"] == "lora-all-hf-loop" and theirs["losses"] == pytest.approx(own["losses"], rel=1e-5)
    assert theirs["losses"][-1] != theirs["losses"][0] and theirs["bytes"] == own["bytes"]
