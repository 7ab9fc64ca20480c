"""Every method, from its configuration to its predictions, through the command line on folders as users have them."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from clips import sound_file, tone
from fifth_method import Gated
from folders import llm_folder, own_cache, whisper_folder
from methods_world import configured, has_joint, make_world, untrained
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    SwinConfig,
    SwinModel,
)

import mitrain
from mitrain.cli import main
from mitrain.compare.counts import count
from mitrain.core.errors import ModelError
from mitrain.data.audio import read_audio
from mitrain.data.texts import read_text
from mitrain.methods import METHODS
from mitrain.models.batch import TextBatch
from mitrain.models.encoders import encoder_of
from mitrain.training import runs, schema


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with own_cache(make_world(tmp_path_factory.mktemp("methods"))) as path:
        yield path


def said(capsys, *arguments):
    code = main([*map(str, arguments), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def trained(capsys, world, method, task):
    path = configured(world, method, task)
    plan = said(capsys, "train", path, "--dry-run")
    run = said(capsys, "train", path, "--runs", world / "runs")["run"]
    saved = [load_file(file) for file in sorted((world / run).rglob("adapter.safetensors"))]
    sizes = {sum(t.numel() for t in tensors.values()) for tensors in saved}
    fixed = sum(buffer.numel() for buffer in untrained(world, method).buffers())
    assert sizes == {plan["infusion_parameters"] + fixed}
    assert sizes == {0} or any(not torch.equal(saved[0][n], saved[-1][n]) for n in saved[0])
    return run


def publishes(capsys, world, method):
    """The method trains, scores, predicts, and predicts the same when it is exported and opened again."""
    run = trained(capsys, world, method, "classify")
    own = said(capsys, "eval", run, "--split", "test")
    other = said(capsys, "eval", run, "--split", "test", "--control", "other-inputs")
    assert own["samples"] == other["samples"] > 0 and 0 <= own["accuracy"] <= 1
    image = next((world / "data").rglob("*.png"))
    found = said(capsys, "predict", run, "--image", image, "--text", "this thing is")
    assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    exported = said(capsys, "export", run, "--out", world / f"export-{method}")["folder"]
    again = said(capsys, "predict", exported, "--image", image, "--text", "this thing is")
    assert again["probabilities"] == pytest.approx(found["probabilities"], abs=2e-6)
    return exported


def retrieves(capsys, world, method):
    """It finds pictures and texts, and orders the best anew where it has a state of both."""
    run = trained(capsys, world, method, "retrieve")
    found = said(capsys, "eval", run, "--split", "test")
    assert 1 <= found["t2i_median_rank"] <= 4 and ("before_reranking" in found) == has_joint(world, method)
    image = next((world / "data").rglob("*.png"))
    ranked = said(capsys, "predict", run, "--image", image, "--text", "a red square", "--candidates", "a blue square")
    assert len(ranked["scores"]) == 2


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_scores_predicts_and_is_published(capsys, world, method):
    publishes(capsys, world, method)


def test_a_language_model_that_is_trained_whole_is_published(capsys, world):
    """Its head is its embedding's, so nothing of it stays frozen."""
    llm = AutoModelForCausalLM.from_pretrained(world / "llm", tie_word_embeddings=True)
    llm.save_pretrained(world / "tied")
    AutoTokenizer.from_pretrained(world / "llm").save_pretrained(world / "tied")
    path = configured(world, "full", "classify", model={"llm": str(world / "tied")}, adapter={"where": "text"})
    run = said(capsys, "train", path, "--runs", world / "runs")["run"]
    exported = Path(said(capsys, "export", run, "--out", world / "export-whole")["folder"])
    assert "none of it is frozen" in (exported / "README.md").read_text()
    asked = ("--image", next((world / "data").rglob("*.png")), "--text", "this thing is")
    one, two = (said(capsys, "predict", folder, *asked)["probabilities"] for folder in (run, exported))
    assert two == pytest.approx(one, abs=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_finds_pictures_and_texts(capsys, world, method):
    retrieves(capsys, world, method)


def test_a_fifth_method_needs_its_own_file_and_an_entry(capsys, world, monkeypatch):
    """Written in fifth_method.py, which imports of mitrain what any method may; the package knows nothing of it."""
    monkeypatch.setitem(METHODS, "gated", Gated)
    plan = said(capsys, "train", configured(world, "gated", "classify"), "--dry-run")
    assert plan["infusion_parameters"] == 2 * 32 * 8 + 2 * 24 * 8 + 1 and plan["infused_layers"] == []
    exported = publishes(capsys, world, "gated")
    retrieves(capsys, world, "gated")
    task = {"label": {"config": str(configured(world, "gated", "classify")), "metric": "accuracy"}}
    widths = {"keys": ["adapter.width"], "values": [4], "methods": ["gated"]}
    study = {"name": "fifth", "tasks": task, "methods": {"gated": {}}, "axes": {"width": widths}, "seeds": [0]}
    (world / "fifth.yaml").write_text(yaml.safe_dump(study))
    cells = said(capsys, "compare", world / "fifth.yaml", "--list")["cells"]
    assert [cell["cell"] for cell in cells] == ["label-gated-seed0", "label-gated-width-4-seed0"]
    assert count(schema.load(task["label"]["config"]), {})["adapter_parameters"] == 897
    assert "load_adapter" not in (Path(exported) / "README.md").read_text()
    with pytest.raises(ModelError, match=r"gated attaches to the first encoder too.*from_pretrained"):
        mitrain.load_adapter(AutoModelForCausalLM.from_pretrained(world / "llm"), exported)


def test_each_encoder_can_be_a_modality_of_its_own(capsys, world):
    """Two encoders of other widths: their maps are apart, and one missing at use leaves the other's infusion."""
    poolings = {"coarse": "cls", "fine": "cls+mean"}
    of_pictures = {"name": str(world / "vision"), "takes": "image", "input": "image"}
    encoders = {name: {**of_pictures, "pool": pool} for name, pool in poolings.items()}
    adapter = {"modalities": {"coarse": 24, "fine": 48}}
    readout = {"readout": ["last", "coarse", "fine"]}
    path = configured(world, "mit", "classify", model={"encoders": encoders}, adapter=adapter, task=readout)
    run = said(capsys, "train", path, "--runs", world / "runs")["run"]
    saved = load_file(max((world / run).rglob("adapter.safetensors")))
    assert {name.split(".")[3]: t.shape[1] for name, t in saved.items() if "v_add.weight" in name} == {
        "coarse": 24,
        "fine": 48,
    }
    asked = ("--image", next((world / "data").rglob("*.png")), "--text", "this thing is")
    exported = said(capsys, "export", run, "--out", world / "export-two")["folder"]
    one, two = (said(capsys, "predict", folder, *asked)["probabilities"] for folder in (run, exported))
    assert two == pytest.approx(one, abs=2e-6)
    llm = AutoModelForCausalLM.from_pretrained(world / "llm")
    adapter, normalize = mitrain.load_adapter(llm, exported)
    ids, features = torch.arange(4)[None], torch.randn(1, 72)
    features[:, :24] *= 9
    parts = adapter.modalities_of(normalize(features))
    assert [(name, x.shape[1]) for name, x in parts.items()] == [("coarse", 24), ("fine", 48)]
    with torch.no_grad():
        outs = [llm(ids, infused=shown).logits for shown in (parts, {**parts, "fine": None}, {**parts, "coarse": None}, {})]
    assert all((a - b).abs().max() > 1e-6 for i, a in enumerate(outs) for b in outs[:i])
    with pytest.raises(ModelError, match="70 wide, but the adapter's modalities are"):
        adapter.modalities_of(features[:, 2:])


@pytest.mark.parametrize("widths", [{"a": 48, "b": 24}, {"a": 24, "b": 48, "c": 1}, {"a": 72}])
def test_modalities_that_no_encoder_makes_are_refused(capsys, world, widths):
    poolings = {"a": "cls", "b": "cls+mean"}
    of_pictures = {"name": str(world / "vision"), "takes": "image", "input": "image"}
    encoders = {name: {**of_pictures, "pool": pool} for name, pool in poolings.items()}
    path = configured(
        world,
        "mit",
        "classify",
        model={"encoders": encoders},
        adapter={"modalities": widths},
        task={"readout": ["last"]},
    )
    assert main(["train", str(path), "--dry-run"]) == 2
    assert "leave adapter.modalities out, or name the modalities of model.encoders" in capsys.readouterr().err


def test_a_momentum_queue_is_saved_for_training_and_not_published(capsys, world):
    path = configured(world, "pmf", "retrieve", task={"queue": 8})
    run = said(capsys, "train", path, "--runs", world / "runs")["run"]
    heads = [load_file(file) for file in sorted((world / run).rglob("head.safetensors"))]
    assert heads and all("slow.images" in head and head["slow.pushed"] > 0 for head in heads)
    exported = said(capsys, "export", run, "--out", world / "export-queue")["folder"]
    published = load_file(f"{exported}/mitrain.safetensors")
    assert any(n.startswith("head.") for n in published) and not any("slow" in n for n in published)
    asked = (
        "--image",
        next((world / "data").rglob("*.png")),
        "--text",
        "a red square",
        "--candidates",
        "a blue square",
    )
    one, two = (said(capsys, "predict", folder, *asked)["scores"] for folder in (run, exported))
    assert two == pytest.approx(one, abs=2e-6)


@pytest.mark.parametrize("method", ["lora", "ia3", "full"])
def test_a_merged_method_is_in_plain_models(capsys, world, method):
    run = trained(capsys, world, method, "classify")
    made = said(capsys, "export", run, "--merge", "--out", world / f"merged-{method}")
    opened = runs.open_run(run)
    model, adapter = opened.model, opened.model.adapter
    ids, mask = model.text.pad([model.text.tokens("this thing is red")])
    plain = AutoModelForCausalLM.from_pretrained(world / f"merged-{method}" / "text").base_model
    with torch.no_grad():
        expected = adapter.encode(TextBatch(ids, mask), None).text
        frozen = AutoModelForCausalLM.from_pretrained(world / "llm").base_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(plain(input_ids=ids).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, frozen, atol=1e-4)
    assert ("image" in made["files"]) == (method != "ia3")
    if method != "ia3":
        image = AutoModel.from_pretrained(world / f"merged-{method}" / "image")
        pixels = torch.rand(1, 3, model.encoders["image"].preprocess.size, model.encoders["image"].preprocess.size)
        with torch.no_grad():
            torch.testing.assert_close(
                image(pixel_values=pixels).pooler_output,
                model.encoders["image"].model(pixel_values=pixels).pooler_output,
            )


@pytest.mark.parametrize(("name", "takes", "suffix"), [("speech", "audio", "wav"), ("note", "text", "txt")])
def test_a_merged_encoder_of_sound_or_text_is_a_plain_model_with_its_reader(capsys, world, name, takes, suffix):
    """It hears and reads as the run's did with the adapter on it, and not as the frozen one."""
    frozen = whisper_folder(world / name) if takes == "audio" else llm_folder(world / name, width=32, layers=2)
    for number, hertz in enumerate((300, 900)):
        sound_file(world / "data" / f"{number}.wav", tone(0.4, hertz=hertz))
        (world / "data" / f"{number}.txt").write_text(("a red square", "this is blue")[number])
    rows = [{name: f"{i % 2}.{suffix}", "text": "this thing is", "label": ("low", "high")[i % 2]} for i in range(8)]
    table = world / "data" / f"{name}.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = yaml.safe_load(configured(world, "lora", "classify").read_text())
    config["model"]["encoders"] = {name: {"name": str(frozen), "takes": takes}}
    config |= {"features": {}, "task": {"name": "classify", "readout": ["last", name]}, "name": f"lora-{name}"}
    config["data"]["splits"] = dict.fromkeys(("train", "val", "test"), table.name)
    (world / f"{name}.yaml").write_text(yaml.safe_dump(config))
    run, out = said(capsys, "train", world / f"{name}.yaml", "--runs", world / "runs")["run"], world / f"merged-{name}"
    made = said(capsys, "export", run, "--merge", "--out", out)
    assert made["files"] == sorted(["text", name, "head.safetensors", "merged.json"])
    adapted = runs.open_run(run).model.encoders[name]
    merged, before = (encoder_of(adapted.config.model_copy(update={"name": str(at)}), at) for at in (out / name, frozen))
    item = (read_audio if takes == "audio" else read_text)(world / "data", f"1.{suffix}")
    found, expected, old = (e.encode([e.preprocess(item)])["pooled"] for e in (merged, adapted, before))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(old, expected, atol=1e-4)


def test_what_does_not_merge_says_so_and_writes_nothing(capsys, world):
    run = trained(capsys, world, "pmf", "classify")
    assert main(["export", run, "--merge", "--out", str(world / "never")]) == 2
    assert "cannot be merged" in capsys.readouterr().err and not (world / "never").exists()


def test_aurora_tunes_a_blip_checkpoint(capsys, world):
    """One folder is both encoders; the fusion is BLIP's own cross-attention."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = AutoTokenizer.from_pretrained(world / "llm")
    special = {
        "bos_token_id": len(words),  # [DEC], and [ENC] behind it
        "eos_token_id": words.eos_token_id,
        "pad_token_id": 0,
        "sep_token_id": words.eos_token_id,
    }
    text = {**small, **special, "vocab_size": len(words) + 2, "encoder_hidden_size": 32, "max_position_embeddings": 64}
    shape = BlipConfig(text_config=text, vision_config={**small, "image_size": 28, "patch_size": 14})
    BlipForImageTextRetrieval(shape).save_pretrained(world / "blip")
    words.save_pretrained(world / "blip")
    path = configured(world, "aurora", "retrieve")
    values = yaml.safe_load(path.read_text())
    values["model"] = {"llm": str(world / "blip"), "encoders": {"image": {"name": str(world / "blip")}}}
    path.write_text(yaml.safe_dump(values))
    run = said(capsys, "train", path, "--runs", world / "runs")["run"]
    opened = runs.open_run(run)
    assert opened.model.adapter.fusion.composed is False
    assert type(opened.model.text.model).__name__ == "BlipTextModel"
    found = said(capsys, "eval", run, "--split", "test")
    assert 1 <= found["t2i_median_rank"] <= 4
    assert main(["train", str(path), "model.quantize=int8", "--runs", str(world / "runs")]) == 2
    assert "BLIP's encoders are held whole" in capsys.readouterr().err


def test_mope_prompts_the_windows_of_a_swin(capsys, world):
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2]}
    SwinModel(SwinConfig(**shape)).save_pretrained(world / "swin")
    path = configured(world, "mope", "classify")
    values = yaml.safe_load(path.read_text())
    values["model"]["encoders"] = {"image": {"name": str(world / "swin"), "size": 32}}
    path.write_text(yaml.safe_dump(values))
    run = said(capsys, "train", path, "--runs", world / "runs")["run"]
    found = said(capsys, "eval", run, "--split", "test")
    assert found["samples"] > 0
    adapter = runs.open_run(run).model.adapter
    assert type(adapter._encoders["encoder"]).__name__ == "SwinEncoder"
    assert all(part.mean.any() for part in (adapter.standard, *(layer.standard for layer in adapter.prompts)))


@pytest.mark.parametrize(
    ("method", "task", "changes"),
    [("pmf", "retrieve", {"matching": 0}), ("mit", "classify", {"readout": ["image"]})],
)
def test_a_method_that_the_task_does_not_read_is_refused(capsys, world, method, task, changes):
    """It would train the head alone, under the method's name; the refused run leaves no folder."""
    path = configured(world, method, task, task=changes)
    assert main(["train", str(path), "--runs", str(world / "refused")]) == 2
    assert f"reads nothing that the method {method!r} changes" in capsys.readouterr().err
    assert not any((world / "refused").iterdir())


def test_what_gets_no_gradient_is_named(capsys, caplog, world):
    """Prompts that depend on the other modality are not used where each is read by itself."""
    said(capsys, "train", configured(world, "mope", "retrieve", task={"matching": 0}), "--runs", world / "runs")
    assert "adapter's" in caplog.text and "tensors get no gradient: adapter.prompts.0." in caplog.text
