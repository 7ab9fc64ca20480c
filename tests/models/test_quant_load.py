"""Loading in low bits: layer by layer, and from checkpoints that transformers wrote through bitsandbytes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tracked import Tracked
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mitrain.core.errors import ConfigError, ModelError
from mitrain.data.hidden_states import TextStates
from mitrain.models import TextBackbone, loading, quant, stream
from mitrain.models.quant import convert, formats

LOW = quant.PRECISIONS[1:]
IDS = torch.tensor([[3, 4, 5, 6, 7]])


def by_hand(folder, precision, embedding=False):
    model = loading.load(AutoModelForCausalLM, folder, "model", dtype=torch.float32)
    loading.freeze(model)
    return quant.quantise(model, precision, embedding=embedding)


def same(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("tied", [False, True])
def test_streamed_equals_quantised_after_loading(folder, tmp_path, precision, tied):
    if tied:
        folder = shutil.copytree(folder, tmp_path / "tied")
        LlamaForCausalLM(LlamaConfig.from_pretrained(folder, tie_word_embeddings=True)).save_pretrained(folder)
    text = TextBackbone.load(folder, torch.float32, quantize=precision, quantize_embedding=tied)
    expected = by_hand(folder, precision, tied)
    assert same(text.model, expected)
    assert text.quantize == precision and text.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(text.model(IDS).logits, expected(IDS).logits)
    head, table = text.model.get_output_embeddings(), text.model.get_input_embeddings()
    assert not tied or head.qweight is table.qweight
    assert text.model.generation_config.eos_token_id == expected.generation_config.eos_token_id


def test_other_names_are_loaded_whole(folder, tmp_path):
    """A checkpoint of the inner model lacks the prefix: transformers puts it right, and then it is quantised."""
    other = shutil.copytree(folder, tmp_path / "inner")
    tensors = load_file(other / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, other / "model.safetensors", metadata={"format": "pt"})
    assert same(TextBackbone.load(other, torch.float32, quantize="int8").model, by_hand(folder, "int8"))


def test_shards_are_read(folder, tmp_path):
    model = loading.load(AutoModelForCausalLM, folder, "model", dtype=torch.float32)
    sharded = shutil.copytree(folder, tmp_path / "shards", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(sharded, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert same(TextBackbone.load(sharded, torch.float32, quantize="nf4").model, by_hand(folder, "nf4"))


def test_one_layer_is_in_full_precision_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "PIECE", 4096)
    config = LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=512, num_hidden_layers=8,
                         num_attention_heads=4, tie_word_embeddings=True)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="1MB")
    order = []
    with Tracked() as found:
        model = stream.load(
            AutoModelForCausalLM, tmp_path, torch.float32, "int8", after=lambda name, layer: order.append(name)
        )
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    layer = 4 * sum(m.in_features * m.out_features for m in model.model.layers[0].modules() if hasattr(m, "qweight"))
    assert found.peak <= 1.2 * (held + layer) < 4 * sum(t.numel() for t in load_all(tmp_path))
    assert [n for n in order if "layers" in n] == [f"model.layers.{i}" for i in range(8)]
    assert not any(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())


def load_all(folder):
    return [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file).values()]


def test_states_of_another_precision_are_not_reused(folder, tmp_path):
    addresses = set()
    for precision in quant.PRECISIONS:
        text = TextBackbone.load(folder, torch.float32, quantize=precision)
        states = TextStates(text, 2, tmp_path)
        assert states.prepare([text.tokens("the picture shows a square")]) == 1
        addresses.add(states.store.folder)
    assert len(addresses) == 4


def bitsandbytes_folder(folder, target, kind):
    """The checkpoint as transformers writes it after loading with ``load_in_8bit`` or ``load_in_4bit``."""
    bnb = pytest.importorskip("bitsandbytes", reason="the extra [quant] is not installed")
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    tensors, out = load_file(target / "model.safetensors"), {}
    for name, tensor in tensors.items():
        prefix = name.removesuffix(".weight")
        if "layers" not in name or tensor.ndim != 2:
            out[name] = tensor
        elif kind == "int8":
            packed, largest, _ = bnb.functional.int8_vectorwise_quant(tensor.half())
            out |= {
                name: packed,
                f"{prefix}.SCB": largest,
                f"{prefix}.weight_format": torch.tensor(0, dtype=torch.uint8),
            }
        else:
            packed, state = bnb.functional.quantize_4bit(tensor, quant_type="nf4", compress_statistics=kind == "nested")
            out |= {name: packed, **{f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}}
    eight = kind == "int8"
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_8bit": eight, "load_in_4bit": not eight, "bnb_4bit_quant_type": "nf4",
        "_load_in_8bit": eight, "_load_in_4bit": not eight,
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in out.items()}, target / "model.safetensors", metadata={"format": "pt"})
    return target


def nested_scales(tensors, name):
    """Doubly quantised scales of the matrix ``name`` in float64: QLoRA's equation 6 read backwards."""
    part, state = lambda end: tensors[f"{name}.{end}"], tensors[f"{name}.quant_state.bitsandbytes__nf4"]
    state = json.loads(bytes(state.tolist()))
    outer = part("nested_absmax").double().repeat_interleave(state["nested_blocksize"])
    codes = part("nested_quant_map").double()[part("absmax").long()]
    return codes * outer[: len(codes)] + state["nested_offset"]


def defined(tensors, name, shape):
    """The matrix ``name`` of a checkpoint of bitsandbytes in float64, by the formats' definitions.

    bitsandbytes' own way back is no oracle: its answer depends on the CPU (with AVX-512, 0.50.2 takes other scales
    where the columns are no multiple of the block).
    """
    if f"{name.removesuffix('.weight')}.SCB" in tensors:
        return tensors[name].double() * tensors[f"{name.removesuffix('.weight')}.SCB"].double()[:, None] / 127
    packed = tensors[name].reshape(-1).long()
    codes = torch.stack([packed // 16, packed % 16], dim=1).reshape(-1)
    absmax = tensors[f"{name}.absmax"]
    steps = nested_scales(tensors, name) if absmax.dtype == torch.uint8 else absmax.double()
    table = tensors[f"{name}.quant_map"].double()
    return (table[codes] * steps.repeat_interleave(64)[: len(codes)]).view(shape)


@pytest.mark.parametrize("kind", ["int8", "nf4", "nested"])
def test_checkpoints_of_bitsandbytes_are_taken_over(folder, tmp_path, kind):
    """Each matrix is what the formats define, and within a step of the floats it was made of."""
    target = bitsandbytes_folder(folder, tmp_path / kind, kind)
    text = TextBackbone.load(target, torch.float32)
    assert text.quantize == ("int8" if kind == "int8" else "nf4")
    source, stored = load_file(folder / "model.safetensors"), load_file(target / "model.safetensors")
    layers = {f"{n}.weight": m for n, m in text.model.named_modules() if isinstance(m, quant.FrozenLinear)}
    assert layers.keys() == {n for n, t in source.items() if "layers" in n and t.ndim == 2}
    assert {m.in_features % 64 for m in layers.values()} == {0, 32}  # rows of whole blocks, and of half ones
    for name, module in layers.items():
        expected = defined(stored, name, module.dense().shape)
        torch.testing.assert_close(module.dense().double(), expected, rtol=1e-6, atol=1e-7)
        error, largest = (expected - source[name]).abs().max(), source[name].abs().max()
        assert error <= largest * (1 / 127 if kind == "int8" else 0.16)  # nf4's widest gap is .304 of the scale
    assert text.model(IDS).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_transformers_reads_the_same_checkpoint(folder, tmp_path, kind):
    """Its modules hold the tensors that ours take over; with their matrices by definition the logits are equal."""
    bnb = pytest.importorskip("bitsandbytes", reason="the extra [quant] is not installed")
    target = bitsandbytes_folder(folder, tmp_path / kind, kind)
    theirs = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    found = {n: m for n, m in theirs.named_modules() if isinstance(m, (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit))}
    assert len(found) == 3 * 7
    for name, module in found.items():
        plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
        plain.weight.data = defined(state, f"{name}.weight", plain.weight.shape).float()
        theirs.set_submodule(name, plain)
    ours = TextBackbone.load(target, torch.float32).model
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "does not read"),
    ],
)
def test_other_methods_are_refused(folder, changes, message):
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = changes
    with pytest.raises(ModelError, match=message):
        stream.stored_precision(config, folder)


def test_contradictions_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="needs low-bit layers"):
        TextBackbone.load(folder, torch.float32, quantize_embedding=True)
    target = bitsandbytes_folder(folder, tmp_path / "int8", "int8")
    with pytest.raises(ConfigError, match="holds int8 weights, not nf4"):
        TextBackbone.load(target, torch.float32, quantize="nf4")
    assert TextBackbone.load(target, torch.float32, quantize="int8-activations").quantize == "int8-activations"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t | {"weight": t["weight"].float()}, "its int8 weight is torch.float32"),
        (lambda t: t | {"SCB": t["SCB"][1:]}, "other scales"),
        (lambda t: t | {"weight_format": torch.tensor(2)}, "another order"),
    ],
)
def test_broken_int8_tensors_are_refused(damage, message):
    layer = quant.FrozenInt8Linear(8, 4)
    tensors = {"weight": torch.ones(4, 8, dtype=torch.int8), "SCB": torch.ones(4)}
    with pytest.raises(ModelError, match=message):
        convert.fill_int8(layer, damage(tensors), "layer")
    convert.fill_int8(layer, tensors, "layer")
    torch.testing.assert_close(layer.dense(), torch.full((4, 8), 1 / 127))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if "state" not in n}, "not nf4"),
        (lambda t: t | {f"{convert.STATE}nf4": torch.tensor([1, 2], dtype=torch.uint8)}, "cannot be read"),
        (lambda t: t | {"weight": t["weight"][1:]}, "its nf4 matrix"),
        (lambda t: t | {"weight.absmax": torch.ones(3)}, "3 scales"),
        (lambda t: t | {"weight.quant_map": torch.linspace(-1, 1, 16)}, "code table"),
    ],
)
def test_broken_nf4_tensors_are_refused(damage, message):
    layer = quant.FrozenNF4Linear(8, 16)
    state = json.dumps({"shape": [16, 8], "blocksize": 64, "quant_type": "nf4", "dtype": "float32"})
    tensors = {"weight": torch.zeros(64, 1, dtype=torch.uint8), "weight.absmax": torch.ones(2),
               f"{convert.STATE}nf4": torch.tensor(list(state.encode()), dtype=torch.uint8)}  # fmt: skip
    with pytest.raises(ModelError, match=message):
        convert.fill_nf4(layer, damage(tensors), "layer")
    convert.fill_nf4(layer, tensors, "layer")
    assert torch.equal(layer.dense(), torch.full((16, 8), -1.0))
