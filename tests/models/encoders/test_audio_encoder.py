"""Frozen encoders of sound: features are the model's own, the same alone and in any batch; refusals are one line."""

import copy
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import tone
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    ClapAudioConfig,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapTextConfig,
    HubertConfig,
    HubertModel,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from mitrain.core.errors import ConfigError, ModelError
from mitrain.data.audio import Sound
from mitrain.models.encoders.audio import AudioConfig, AudioEncoder

LAYERS = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
CONVOLUTIONS = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (80, 2), "num_conv_pos_embeddings": 6}
RAW = {**LAYERS, **CONVOLUTIONS, "num_conv_pos_embedding_groups": 2, "initializer_range": 0.3}
WHISPER = WhisperConfig(
    vocab_size=20, d_model=24, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1,
    decoder_attention_heads=2, decoder_ffn_dim=8, num_mel_bins=10, max_source_positions=100, init_std=0.3,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
AST = ASTConfig(**LAYERS, num_mel_bins=16, max_length=64, patch_size=8, frequency_stride=8, time_stride=8)
CLAP = ClapConfig(
    audio_config=ClapAudioConfig(
        num_mel_bins=8, spec_size=32, patch_size=4, patch_stride=(4, 4), window_size=4, patch_embeds_hidden_size=8,
        hidden_size=16, depths=[1, 1], num_attention_heads=[2, 2], projection_dim=6, enable_fusion=False,
    ).to_dict(),
    text_config=ClapTextConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, projection_dim=6
    ).to_dict(),
)  # fmt: skip
LENGTHS = (0.31, 0.9, 0.31, 0.45, 0.9001)  # seconds


def made(name: str) -> tuple[PreTrainedModel, object]:
    """A model of that family with random weights, and its feature extractor."""
    torch.manual_seed(0)
    kinds = {
        "whisper": (WhisperForConditionalGeneration, WHISPER, WhisperFeatureExtractor(10, chunk_length=2)),
        "wav2vec2": (Wav2Vec2Model, Wav2Vec2Config(**RAW), Wav2Vec2FeatureExtractor(do_normalize=True)),
        "wav2vec2-layer-norm": (
            Wav2Vec2Model,
            Wav2Vec2Config(**RAW, feat_extract_norm="layer", do_stable_layer_norm=True),
            Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True),
        ),
        "hubert": (HubertModel, HubertConfig(**RAW), Wav2Vec2FeatureExtractor(do_normalize=False)),
        "wavlm": (WavLMModel, WavLMConfig(**RAW), Wav2Vec2FeatureExtractor(do_normalize=False)),
        "ast": (ASTModel, AST, ASTFeatureExtractor(num_mel_bins=16, max_length=64)),
        "clap": (ClapModel, CLAP, ClapFeatureExtractor(8, max_length_s=1, truncation="rand_trunc")),
    }
    model, config, extractor = kinds[name]
    model = model(copy.deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval(), extractor


NAMES = ("whisper", "wav2vec2", "wav2vec2-layer-norm", "hubert", "wavlm", "ast", "clap")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {}

    def folder(name: str) -> Path:
        if name not in folders:
            model, extractor = made(name)
            folders[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(folders[name])
            extractor.save_pretrained(folders[name])
        return folders[name]

    return folder


def encoder(folder, **settings) -> AudioEncoder:
    return AudioEncoder(AudioConfig(name=str(folder), **settings), folder)


def clip(seconds: float, rate: int = 16_000, seed: int = 0) -> Sound:
    noise = np.random.default_rng([seed, round(1000 * seconds)]).standard_normal(round(seconds * rate))
    samples = tone(seconds, rate) + 0.1 * noise.astype(np.float32)
    return Sound(digest="", stored_size=(1, 1), where="'a.wav'", samples=samples, rate=rate)


def features(found: AudioEncoder, clips: list[Sound]) -> torch.Tensor:
    return found.encode([found.preprocess(sound) for sound in clips])["pooled"]


def plain(name: str, folder: Path, sound: Sound) -> torch.Tensor:
    """What transformers makes of a clip alone: states (T, D), or the pooled vector (D,)."""
    model, extractor = made(name)
    inputs = extractor(sound.at(extractor.sampling_rate), sampling_rate=extractor.sampling_rate, return_tensors="pt")
    with torch.no_grad():
        if name == "ast":
            return model(**inputs).pooler_output[0]
        if name == "clap":
            return model.audio_projection(model.audio_model(inputs["input_features"].float()).pooler_output)[0]
        return model(inputs["input_values"]).last_hidden_state[0]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "whisper"])
def test_features_are_what_transformers_gives_of_the_clip_alone(saved, name):
    found = encoder(saved(name))
    sound = clip(0.45, found.rate)
    expected = plain(name, saved(name), sound)
    expected = expected.mean(0) if expected.ndim == 2 else expected
    assert found.width == len(expected)
    torch.testing.assert_close(features(found, [sound])[0], expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_feature_is_the_same_alone_and_in_any_batch(saved, name):
    found = encoder(saved(name))
    clips = [clip(seconds, seed=i) for i, seconds in enumerate(LENGTHS)]
    alone = torch.cat([features(found, [sound]) for sound in clips])
    rounding = 16 * torch.finfo(torch.float32).eps * float(alone.abs().max())  # of sums in another order
    torch.testing.assert_close(features(found, clips), alone, atol=rounding, rtol=0)
    torch.testing.assert_close(features(found, clips[::-1]), alone.flip(0), atol=rounding, rtol=0)
    assert (alone[0] - alone[2]).abs().max() > 1e-4 and alone.isfinite().all()


def test_whisper_reads_a_clip_of_its_whole_context_as_transformers_does(saved):
    found, sound = encoder(saved("whisper"), pool="mean+std"), clip(2)
    model, extractor = made("whisper")
    with torch.no_grad():
        inputs = extractor(sound.samples, sampling_rate=16_000, return_tensors="pt")["input_features"]
        states = model.model.encoder(inputs).last_hidden_state[0]
    expected = torch.cat([states.mean(0), states.std(0, correction=0)])
    torch.testing.assert_close(features(found, [sound])[0], expected, atol=2e-6, rtol=1e-5)
    assert found.width == 48


def test_whisper_reads_a_short_clip_in_a_short_context(saved):
    """The first positions alone, as many as the clip's length rounded up; its padding is not averaged."""
    found, sound = encoder(saved("whisper")), clip(0.71)
    model, extractor = made("whisper")
    model.config.max_source_positions = 50  # 1 s
    listener = model.model.encoder
    listener.embed_positions = torch.nn.Embedding.from_pretrained(listener.embed_positions.weight[:50])
    with torch.no_grad():
        inputs = extractor(sound.samples, sampling_rate=16_000, max_length=16_000, return_tensors="pt")
        states = listener(inputs["input_features"]).last_hidden_state[0]
    torch.testing.assert_close(features(found, [sound])[0], states[:36].mean(0), atol=2e-6, rtol=1e-5)
    assert found.model.config.max_source_positions == found.model.embed_positions.num_embeddings == 100


def test_whisper_runs_as_few_frames_as_a_clip_has(saved):
    found, lengths = encoder(saved("whisper")), []
    found.model.layers[0].register_forward_pre_hook(lambda _, inputs: lengths.append(tuple(inputs[0].shape[:2])))
    features(found, [clip(seconds) for seconds in (0.2, 0.5, 0.51, 1.9)])
    assert sorted(lengths) == [(1, 50), (1, 100), (2, 25)]


def test_the_decoder_is_not_read(saved, tmp_path, caplog):
    model, extractor = made("whisper")
    model.model.encoder.save_pretrained(tmp_path / "unused")
    found = encoder(saved("whisper"))
    assert not caplog.records and sum(p.numel() for p in found.parameters()) == sum(
        p.numel() for p in model.model.encoder.parameters()
    )
    assert encoder(saved("clap")).model.audio_projection is not None and not caplog.records
    del model.model.encoder.layer_norm.weight
    model.save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"audio encoder .* lacks 1 tensor .encoder.layer_norm.weight."):
        encoder(tmp_path)


@pytest.mark.parametrize("name", ["whisper", "wav2vec2", "wav2vec2-layer-norm", "hubert", "wavlm", "ast"])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_an_inner_layer_is_read_before_the_last_norm(saved, name, layer):
    found, sound = encoder(saved(name), layer=layer), clip(2 if name == "whisper" else 0.45)
    model, extractor = made(name)
    inner = model.model.encoder if name == "whisper" else model
    layers, seen = (inner if name == "whisper" else inner.encoder).layers if name != "ast" else inner.layers, []
    layers[layer - 1].register_forward_hook(lambda _, inputs, out: seen.append(out[0] if isinstance(out, tuple) else out))
    inputs = extractor(sound.at(16_000), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        inner(inputs[extractor.model_input_names[0]])
    expected = seen[0][0, :2].mean(0) if name == "ast" else seen[0][0].mean(0)
    torch.testing.assert_close(features(found, [sound])[0], expected, atol=2e-6, rtol=1e-5)
    assert found.depth == 3 and found.identity()["layer"] == layer


def test_a_layer_as_deep_as_there_are_convolutions(saved):
    """Of the lists of so many modules, the transformer layers are meant."""
    found = encoder(saved("wav2vec2"), layer=2)
    assert len(found.model.encoder.layers) == 2 and len(found.model.feature_extractor.conv_layers) == 2


def test_clips_of_another_rate_are_resampled(saved):
    found = encoder(saved("hubert"))
    low = Sound(digest="", stored_size=(1, 1), where="", samples=tone(0.5, 8000), rate=8000)
    high = Sound(digest="", stored_size=(1, 1), where="", samples=tone(0.5), rate=16_000)
    torch.testing.assert_close(features(found, [low]), features(found, [high]), atol=0.02, rtol=0.02)


def test_of_a_long_clip_the_beginning_is_read_which_is_said_once(saved, caplog):
    found, long = encoder(saved("wav2vec2"), seconds=0.5), clip(0.9)
    start = Sound(digest="", stored_size=(1, 1), where="", samples=long.samples[:8000], rate=16_000)
    torch.testing.assert_close(features(found, [long]), features(found, [start]))
    features(found, [long])
    assert caplog.text.count("reads the first 0.5 s of clips: 'a.wav' is longer") == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_of_one_sample_has_a_feature(saved, name):
    found = encoder(saved(name))
    one = Sound(digest="", stored_size=(1, 1), where="", samples=np.ones(1, np.float32), rate=found.rate)
    assert features(found, [one]).isfinite().all()


def test_fused_clap_gives_the_same_each_time(tmp_path):
    values = CLAP.to_dict()
    values["audio_config"]["enable_fusion"] = True
    torch.manual_seed(0)
    ClapModel(ClapConfig(**values)).save_pretrained(tmp_path)
    ClapFeatureExtractor(8, max_length_s=1, truncation="fusion").save_pretrained(tmp_path)
    found, clips = encoder(tmp_path), [clip(0.5), clip(0.7)]
    torch.testing.assert_close(features(found, clips), features(found, clips[::-1]).flip(0), atol=1e-6, rtol=1e-6)


def test_a_guess_of_the_preprocessing_is_said(saved, tmp_path, caplog):
    made("hubert")[0].save_pretrained(tmp_path)
    encoder(tmp_path)
    assert "has no preprocessor_config.json: sound is prepared as by a new Wav2Vec2FeatureExtractor" in caplog.text


def test_what_does_not_fit_is_one_line(saved, tmp_path):
    refusals = [
        ("wav2vec2", {"layer": 4}, "has 3 layers, not a layer 4: give one of 1..3"),
        ("clap", {"layer": 1}, "has no layers that can be read: leave out layer"),
        ("ast", {"pool": "mean"}, "pools a spectrogram of one length itself: leave out pool"),
        ("whisper", {"seconds": 3}, "reads 2 s at most, not seconds=3"),
        ("clap", {"seconds": 3}, "reads 1 s at most, not seconds=3"),
    ]
    for name, settings, words in refusals:
        with pytest.raises(ConfigError, match=words):
            encoder(saved(name), **settings)
    made("wav2vec2")[0].save_pretrained(tmp_path)
    WhisperFeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has a WhisperFeatureExtractor beside it, not a Wav2Vec2FeatureExtractor"):
        encoder(tmp_path)
    made("whisper")[0].save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="needs feature_size=10 of its feature extractor, whose file says 80"):
        encoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "bert"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="is a bert model: give one of whisper"):
        encoder(tmp_path)


def test_the_identity_changes_with_what_is_computed(saved, tmp_path):
    name = saved("wav2vec2")
    first = encoder(name).identity()
    assert encoder(name).identity() == first and json.dumps(first)
    for changes in ({"pool": "mean+std"}, {"layer": 2}, {"seconds": 1}):
        assert encoder(name, **changes).identity() != first
    made("wav2vec2")[0].save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path)
    assert encoder(tmp_path).identity() != first and encoder(tmp_path).base() != encoder(name).base()


def test_without_weights_its_sizes_are_known(caplog):
    caplog.set_level(logging.WARNING)
    shape = {"model_type": "whisper", **WHISPER.to_diff_dict()}
    found = AudioEncoder(AudioConfig(name="x", shape=shape, pool="mean+std"), None)
    assert found.width == 48 and found.depth == 3 and next(found.parameters()).is_meta and not caplog.text


def test_frozen_and_without_gradients(saved):
    found = encoder(saved("wavlm"))
    assert not found.model.training and not any(p.requires_grad for p in found.parameters())
    assert not features(found, [clip(0.3)]).requires_grad
