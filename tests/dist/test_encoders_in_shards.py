"""Encoders whose weights lie in shards give each rank its own samples' features, however many it has."""

import json

import pytest
import torch
from folders import vision_folder
from transformers import Wav2Vec2Config, Wav2Vec2Model, WhisperConfig, WhisperForConditionalGeneration

pytest.importorskip("deepspeed", reason="deepspeed is not installed")

SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
RAW = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (80, 2), "num_conv_pos_embeddings": 6}
WHISPER = WhisperConfig(
    vocab_size=20, d_model=24, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1,
    decoder_attention_heads=2, decoder_ffn_dim=8, num_mel_bins=10, max_source_positions=100,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip


def test_features_in_shards_are_those_of_whole_weights(forge, tmp_path):
    torch.manual_seed(0)
    raw = Wav2Vec2Config(**SHAPE, **RAW, num_conv_pos_embedding_groups=2)
    Wav2Vec2Model(raw).save_pretrained(tmp_path / "wav2vec2")
    WhisperForConditionalGeneration(WHISPER).save_pretrained(tmp_path / "whisper")
    vision_folder(tmp_path / "dinov2")
    folders = [tmp_path / name for name in ("wav2vec2", "whisper", "dinov2")]
    ended = forge.start(2, "encoders_worker:compare", tmp_path, *folders, MITRAIN_TIMEOUT="60").wait()
    assert [e.code for e in ended] == [0, 0], ended[0].err + ended[1].err
    for rank, rows in enumerate((4, 1)):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert {name: (one["sharded"], one["rows"]) for name, one in found.items()} == dict.fromkeys(
            ("wav2vec2", "whisper", "dinov2"), (True, rows)
        )
        assert max(one["off"] for one in found.values()) < 1e-5
