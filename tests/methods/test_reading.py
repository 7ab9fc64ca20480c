"""What leaves the top layer is made where it is read, and is what it would be everywhere."""

import pytest
import torch
from tiny import features, scramble, tiny

import mitrain
from mitrain import MiTConfig
from mitrain.models.text import TextBackbone

ROWS, POSITIONS = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([5, 6, 3, 6, 6])  # one of them read twice
TARGETS = torch.tensor([4, 9, 66, 0, 5])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("layers", [[2, 3], [1, 2]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_the_whole_pass(name, layers, checkpointing):
    model = tiny(name, dtype=torch.float64)
    backbone = TextBackbone(model, None)
    mit = mitrain.attach(model, MiTConfig(modalities={"image": 6}, layers=layers))
    scramble(mit)
    mit.set_checkpointing(checkpointing)
    ids = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(0))
    mask, read = torch.ones_like(ids), []
    model.model.layers[3].mlp.down_proj.register_forward_pre_hook(lambda _, args: read.append(args[0][..., 0].numel()))

    def gradients(loss):
        mit.zero_grad()
        loss.double().sum().backward()
        return [parameter.grad.clone() for parameter in mit.parameters()]

    with mit.bind({"image": features(3).double()}):
        logits = model(input_ids=ids, attention_mask=mask).logits[ROWS, POSITIONS]
        expected = logits.log_softmax(-1)[range(5), TARGETS]
        whole, made = gradients(expected), read.copy()
        found = backbone.log_likelihood(ids, mask, ROWS, POSITIONS, TARGETS)
        ours = gradients(found)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)
    for one, two in zip(ours, whole, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    skips = name == "llama" and layers[-1] == 3
    assert set(made) == {24} and set(read[len(made) :]) == ({4} if skips else {24})
    assert len(read) == 2 * len(made) == (4 if checkpointing and layers[-1] == 3 else 2)
