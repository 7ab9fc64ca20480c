"""What a model's folder lacks is never made up: one line names it, through every way a frozen model is loaded."""

import json
import logging
import shutil

import pytest
import torch
from folders import llm_folder, vision_folder
from safetensors.torch import load_file, save_file
from tiny_mope import tiny_swin
from tiny_pair import blip
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from mitrain.core.errors import ModelError
from mitrain.models import ImageConfig, ImageEncoder, TextBackbone, loading
from mitrain.models.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel

PRECISIONS = ("none", "int8", "int8-activations", "nf4", "sharded")


def tiny_vit():
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTModel(ViTConfig(**shape, image_size=28, patch_size=14))


def tiny_efficientnet():
    torch.manual_seed(0)
    stages = ((1, 3, 1, 1, 16), (1, 3, 2, 6, 24))
    return EfficientNetLiteModel(EfficientNetLiteConfig(image_size=28, hidden_size=32, stages=stages))


ENCODERS = {  # name: (the model, a tensor that is not read twice)
    "vit": (tiny_vit, "layernorm.weight"),
    "swin": (lambda: tiny_swin(torch.float32), "encoder.layers.1.blocks.0.layernorm_before.weight"),
    "efficientnet": (tiny_efficientnet, "blocks.1.depthwise.norm.running_var"),
    "blip": (lambda: blip(torch.float32), "vision_model.encoder.layers.1.layer_norm1.weight"),
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return llm_folder(tmp_path_factory.mktemp("loading") / "llm")


def edited(folder, target, change, **settings):
    """A copy of ``folder`` with tensors as ``change`` returns them and other ``settings`` in its config.json."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file({n: t.contiguous() for n, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **settings}))
    return target


def text(folder, precision="none"):
    if precision == "sharded":  # as under ZeRO-3, with a shard function that keeps everything
        return TextBackbone.load(folder, torch.float32, shard=lambda unit: None)
    return TextBackbone.load(folder, torch.float32, quantize=precision)


def encoder(folder, **settings):
    return ImageEncoder(ImageConfig(name=str(folder), **{"size": 28, **settings}), folder)


def without(*parts):
    return lambda tensors: {n: t for n, t in tensors.items() if not any(part in n for part in parts)}


def prefixed(prefix):
    return lambda tensors: {prefix + n: t for n, t in tensors.items()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (without("layers.1.self_attn"), {}, r"lacks 4 tensors \(model\.layers\.1\.self_attn\.k_proj\.weight"),
        (without("embed_tokens"), {}, r"lacks 1 tensor \(model\.embed_tokens\.weight\)"),
        (prefixed("base_model.model."), {}, r"lacks 30 tensors .* 30 tensors \(base_model.* has no place for"),
        (lambda t: t, {"num_hidden_layers": 5}, r"lacks 18 tensors \(model\.layers\.3\."),
    ],
    ids=["block", "embeddings", "names of PEFT", "more layers"],
)
def test_a_language_model_that_lacks_tensors_is_refused(llm, tmp_path, precision, change, settings, words):
    folder = edited(llm, tmp_path / "damaged", change, **settings)
    with pytest.raises(ModelError, match=words):
        text(folder, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensors_of_another_shape_are_refused(llm, tmp_path, precision):
    folder = edited(llm, tmp_path / "other", lambda t: t, intermediate_size=48)
    with pytest.raises(ModelError, match=r"\(model.layers.0.mlp.\w+_proj.weight is \(.*64.*\), not \(.*48.*of other shapes"):
        text(folder, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["layers.2.mlp.down_proj", "layers.0.input_layernorm", "embed_tokens", "lm_head"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(llm, tmp_path, precision, name, value):
    def spoil(tensors):
        next(t for n, t in tensors.items() if name in n).view(-1)[5] = value

    with pytest.raises(ModelError, match=rf"not finite \(the first in .*{name}"):
        text(edited(llm, tmp_path / "nan", spoil), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensors_without_a_place_are_reported_and_change_nothing(llm, tmp_path, precision, caplog):
    folder = edited(llm, tmp_path / "more", lambda t: t | {"score.weight": torch.ones(2), "v.weight": torch.ones(1)})
    with caplog.at_level(logging.WARNING):
        found = text(folder, precision)
    told = [r.getMessage() for r in caplog.records if "no place for" in r.getMessage()]
    assert len(told) == 1 and "2 tensors (score.weight, v.weight)" in told[0]
    whole = text(llm, precision).model.state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in found.model.state_dict().items())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tied_weights_are_no_lack(tmp_path, precision, caplog):
    config = LlamaConfig(vocab_size=23, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         tie_word_embeddings=True)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llm_folder(tmp_path / "for its tokenizer")).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        model = text(tmp_path, precision).model
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight) and not caplog.records


@pytest.mark.parametrize("precision", PRECISIONS[:2])
def test_without_its_head_a_language_model_reads_and_does_not_speak(llm, tmp_path, precision, caplog):
    with caplog.at_level(logging.WARNING):
        found = text(edited(llm, tmp_path / "headless", without("lm_head")), precision)
    assert not found.speaks and "no language head (lm_head.weight)" in caplog.text
    ids, mask = torch.tensor([[3, 4, 5]]), torch.ones(1, 3, dtype=torch.long)
    assert torch.equal(found.hidden(ids, mask), text(llm, precision).hidden(ids, mask))


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_that_lacks_a_tensor_is_refused(kind, tmp_path):
    make, name = ENCODERS[kind]
    make().save_pretrained(tmp_path / "whole")
    side = 32 if kind == "swin" else 8 if kind == "blip" else 28
    side = {"size": side if side > 14 else None}
    encoder(tmp_path / "whole", **side)
    with pytest.raises(ModelError, match=rf"lacks 1 tensor \({name}\)"):
        encoder(edited(tmp_path / "whole", tmp_path / "less", without(name)), **side)

    def spoil(tensors):
        tensors[name][0] = torch.nan

    with pytest.raises(ModelError, match=rf"not finite \(the first in {name.split('.', 1)[-1]}|not finite .*{name}"):
        encoder(edited(tmp_path / "whole", tmp_path / "nan", spoil), **side)
    with pytest.raises(ModelError, match=r"lacks \d+ tensors .* has no place for"):
        encoder(edited(tmp_path / "whole", tmp_path / "ddp", prefixed("module.")), **side)


def test_a_pooler_counts_where_it_is_read(tmp_path):
    tiny_vit().save_pretrained(tmp_path / "whole")
    folder = edited(tmp_path / "whole", tmp_path / "less", without("pooler"))
    with pytest.raises(ModelError, match=r"lacks 2 tensors \(pooler\.dense\.bias, pooler\.dense\.weight\)"):
        encoder(folder)
    for settings in ({"pool": "cls"}, {"pool": "mean"}, {"layer": 1}):
        one, two = encoder(folder, **settings), encoder(folder, **settings)
        assert one.identity() == two.identity()  # nothing in it is drawn by chance


def test_the_pooler_of_a_text_encoder_is_not_read(llm, tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    BertModel(BertConfig(**shape, vocab_size=40)).save_pretrained(tmp_path / "bert")
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.save_pretrained(tmp_path / "bert")
    folder = edited(tmp_path / "bert", tmp_path / "less", without("pooler"))
    ids, mask = torch.tensor([[3, 4, 5]]), torch.ones(1, 3, dtype=torch.long)
    assert torch.equal(text(folder).hidden(ids, mask), text(tmp_path / "bert").hidden(ids, mask))


def test_an_adapter_beside_the_base_is_refused_with_and_without_peft(llm, tmp_path):
    (shutil.copytree(llm, tmp_path / "mixed") / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (shutil.copytree(vision_folder(tmp_path / "dino"), tmp_path / "both") / "adapter_config.json").write_text("{}")
    for precision in PRECISIONS:
        with pytest.raises(ModelError, match="has an adapter beside it"):
            text(tmp_path / "mixed", precision)
    with pytest.raises(ModelError, match="has an adapter beside it"):
        encoder(tmp_path / "both")


@pytest.mark.parametrize(
    "settings",
    [
        {"_attn_implementation": "owner/kernel"},
        {"attn_implementation": "owner/kernel@main:attend"},
        {"_attn_implementation": {"": "paged|owner/kernel"}},
        {"_experts_implementation": "owner/kernel"},
        {"vision_config": {"_attn_implementation": "owner/kernel"}},
    ],
)
def test_a_configuration_that_names_a_kernel_is_refused(llm, tmp_path, settings, monkeypatch):
    fetched = []
    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", lambda *a, **k: fetched.append(a))
    bad = edited(llm, tmp_path / "llm", lambda t: t, **settings)
    for precision in PRECISIONS:
        with pytest.raises(ModelError, match="names code to be fetched and run .*owner/kernel"):
            text(bad, precision)
    with pytest.raises(ModelError, match="names code to be fetched and run .*owner/kernel"):
        encoder(edited(vision_folder(tmp_path / "dino"), tmp_path / "bad", lambda t: t, **settings))
    assert not fetched


def test_which_attention_runs_is_never_the_folders_to_say(llm, tmp_path):
    """flash_attention_2 would be fetched, too, where the package kernels is installed."""
    wish = {"_attn_implementation": "flash_attention_2"}
    assert text(edited(llm, tmp_path / "llm", lambda t: t, **wish)).model.config._attn_implementation == "sdpa"
    folder = edited(vision_folder(tmp_path / "dino"), tmp_path / "wish", lambda t: t, **wish)
    assert encoder(folder).model.config._attn_implementation == "sdpa"


def test_a_quantised_encoder_is_refused(tmp_path):
    folder = edited(
        vision_folder(tmp_path / "dino"), tmp_path / "q", lambda t: t, quantization_config={"quant_method": "fp8"}
    )
    with pytest.raises(ModelError, match="is quantised: give its weights in floats"):
        encoder(folder)


def test_a_list_of_names_is_short():
    assert loading.counted(["a"]) == "1 tensor (a)" and loading.counted(list("abcd")) == "4 tensors (a, b, c, …)"
