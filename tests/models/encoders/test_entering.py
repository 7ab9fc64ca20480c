"""What enters an encoder's changed layers: those layers run on it are the encoder, alone and beside longer clips."""

import pytest
import torch
from test_audio_encoder import LENGTHS, clip, encoder, saved  # noqa: F401 - saved is a fixture
from torch.nn.utils.rnn import pad_sequence

from mitrain.models.batch import ModalityInputs
from mitrain.models.layers import Layers

# Padding changes the order of sums in matrix products: roundings of 1.1e-16 on values below 10 through a few layers.
EXACT = 1e-12
FAMILIES = ("whisper", "wav2vec2", "wav2vec2-layer-norm", "hubert", "ast")


def batch(entering, depth):
    counts = torch.tensor([(len(states), shown) for states, shown in entering])
    states = pad_sequence([states for states, _ in entering], batch_first=True)
    return ModalityInputs({"speech": torch.zeros(len(states), 1)}, {}, states, depth, "speech", counts=counts)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_changed_layers_unchanged_are_the_encoder_itself(saved, name):  # noqa: F811
    listener = encoder(saved(name)).double()
    layers, clips = Layers.of(listener.model), [clip(seconds) for seconds in LENGTHS]
    plain = listener._by_size(clips, None, listener._pooled)
    wanted = torch.empty(len(clips), listener.width, dtype=torch.float64)
    for members, rows in plain:
        wanted[members] = rows.double()
    for depth in range(layers.depth + 1):
        entering = listener.entering(depth, clips)
        together = batch(entering, depth)
        vectors = layers.encode_tokens(together)[1]
        torch.testing.assert_close(vectors, wanted, rtol=0, atol=1e-5)  # a feature is pooled in float32
        for i in range(len(clips)):
            alone = layers.encode_tokens(batch(listener.entering(depth, clips[i : i + 1]), depth))
            torch.testing.assert_close(alone[1][0], vectors[i], rtol=0, atol=EXACT)
    assert max(len(states) for states, _ in entering) <= listener.tokens
    if name == "whisper":  # a clip of 0.31 s has 16 of the 25 positions that it takes
        assert (len(entering[0][0]), entering[0][1]) == (25, 16)


@torch.no_grad()
def test_noise_in_the_padding_reaches_nothing(saved):  # noqa: F811
    listener = encoder(saved("whisper")).double()
    together = batch(listener.entering(1, [clip(seconds) for seconds in LENGTHS]), 1)
    noisy = torch.where(together.visible[..., None], together.states, torch.randn_like(together.states))
    layers = Layers.of(listener.model)
    vectors = [layers.encode_tokens(ModalityInputs(**{**vars(together), "states": s}))[1] for s in (together.states, noisy)]
    assert torch.equal(*vectors)


def test_batches_of_different_lengths_are_joined_with_their_padding(saved):  # noqa: F811
    listener = encoder(saved("whisper"))
    parts = [batch(listener.entering(0, [clip(seconds) for seconds in part]), 0) for part in ((0.31, 0.45), (0.9,))]
    whole = batch(listener.entering(0, [clip(seconds) for seconds in (0.31, 0.45, 0.9)]), 0)
    joined = ModalityInputs.joined(parts)
    assert torch.equal(joined.states, whole.states) and torch.equal(joined.counts, whole.counts)
    uncounted = ModalityInputs({"speech": torch.zeros(1, 1)}, {}, whole.states[:1, :7], 0, "speech")
    assert ModalityInputs.joined([uncounted, whole]).counts.tolist() == [[7, 7], *whole.counts.tolist()]
    assert ModalityInputs.joined([uncounted, uncounted]).counts is None
