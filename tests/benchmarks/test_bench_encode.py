"""Features are made of every clip, beside as many bare passes; the verdict on them."""

import json

import pytest
import torch

from benchmarks import encode
from benchmarks.command import main

SMALL = {**encode.BASE, "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16,
         "num_mel_bins": 8, "vocab_size": 9, "decoder_attention_heads": 2, "decoder_ffn_dim": 8}  # fmt: skip


def test_both_run_the_encoder_on_the_same_frames(monkeypatch, capsys, tmp_path):
    shapes = {"features": [], "bare": []}
    for name in shapes:
        plain = getattr(encode, name)

        def watched(encoder, *rest, name=name, plain=plain):
            note = lambda _, inputs, kinds: shapes[name].append(tuple(kinds["input_features"].shape))  # noqa: E731
            hook = encoder.model.register_forward_pre_hook(note, with_kwargs=True)
            plain(encoder, *rest)
            hook.remove()

        monkeypatch.setattr(encode, name, watched)
    monkeypatch.setattr(encode, "BASE", SMALL)
    monkeypatch.setattr(encode, "LIMIT", 1e9)
    assert main(["encode", "--clips", "19", "--json", "--out", str(tmp_path)]) == 0
    assert shapes["features"] == shapes["bare"] == [(8, 8, 200)] * 3 + [(3, 8, 200)]
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert found["clips"] == 19 and min(found["seconds"].values()) > 0 and torch.is_grad_enabled()
    assert "| 19 |" in (tmp_path / "table.md").read_text()


def test_above_the_limit_is_an_error_after_everything_is_written(monkeypatch, capsys, tmp_path):
    found = {"seconds": {"features": 13.1, "bare": 10.0}, "clips": 10, "parameters": 1, "cores": 2, "made": {}}
    monkeypatch.setattr(encode, "measured", lambda *_, **__: found)
    monkeypatch.setattr(encode, "sentence", lambda made: "")
    assert main(["encode", "--out", str(tmp_path)]) == 1
    assert "1.31 of the bare passes' time, 1.3 are allowed" in capsys.readouterr().err
    assert "| 10 | 13.1 | 10.0 | 1.31 | 0.8 | above 1.3 |" in (tmp_path / "table.md").read_text()
    encode.check({**found, "seconds": {"features": 13, "bare": 10.0}})


@pytest.mark.parametrize("words", [["--clips", "0"], ["--clips", "-3"]])
def test_no_clips_are_one_line(words, capsys):
    assert main(["encode", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
