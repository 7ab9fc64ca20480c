"""kernels.backend reaches the operators, and what a backend cannot do is one clear line."""

import pytest
import torch
from tiny import features, text, tiny

import mitrain
from mitrain.core.errors import ModelError
from mitrain.methods.kernels import KernelConfig, feed_forward_backend
from mitrain.methods.mit import attention, ffn
from mitrain.methods.mit.config import MiTConfig


def logits(backend, **settings):
    model, inputs = tiny(), text(padding="left")
    mit = mitrain.attach(model, MiTConfig(modalities={"image": 6}, init="released", **settings), backend=backend)
    torch.manual_seed(3)
    for parameter in mit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    with mit.bind({"image": features()}), torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("gate", ["prefix", "sequence", "token", "none"])
def test_the_definition_and_the_fast_backend_agree_inside_a_model(gate):
    fast, slow = logits("sdpa", gate=gate), logits("reference", gate=gate)
    assert not torch.equal(fast, slow)
    assert torch.allclose(fast, slow, atol=1e-5)


def test_the_backend_is_handed_to_both_operators(monkeypatch):
    seen = []
    for module, name in ((attention, "infused_attention"), (ffn, "infused_swiglu")):
        real = getattr(module, name)

        def spy(*args, _real=real, _name=name, **kwargs):
            seen.append((_name, kwargs["backend"]))
            return _real(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)
    logits("reference")
    assert set(seen) == {("infused_attention", "reference"), ("infused_swiglu", "reference")}
    assert [feed_forward_backend(x) for x in ("auto", "sdpa", "flash", "triton")] == ["auto", "auto", "auto", "triton"]


def test_what_a_backend_cannot_do_is_one_line():
    with pytest.raises(ModelError, match=r"^layer 1: backend 'triton' cannot do this: .* kernels\.backend=auto\)$"):
        logits("triton", layers=[1], ffn=False)
    with pytest.raises(ValueError, match="backend"):
        KernelConfig(backend="cuda")
