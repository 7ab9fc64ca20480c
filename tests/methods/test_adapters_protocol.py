"""The adapter protocol, shown on two toy methods beside MiT: one that updates weights, one that runs two encoders."""

import contextlib

import pytest
import torch
from modalities import pictures
from tiny import GROUPED, features, text, tiny
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from mitrain.core.errors import ModelError
from mitrain.methods.base import Adapter, Attachment, Traits
from mitrain.methods.mit.bound import BoundFeatures
from mitrain.models.batch import Outputs, TextBatch
from mitrain.models.frozen import trunk_states


class SharedUpdate(Adapter):
    """After Aurora: W_n + U diag(p_n) Vᵀ with U and V shared by every backbone; needs no features; can be merged."""

    traits = Traits("shared")

    def __init__(self, width: int, rank: int = 2):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        self.scales = nn.ParameterList()
        self.tuned: list[nn.Linear] = []
        nn.init.zeros_(self.up.weight)

    def _install(self, backbones):
        self.tuned = [
            m
            for b in backbones.values()
            for n, m in b.named_modules()
            if n.endswith(("o_proj", "output.dense")) and m.in_features == m.out_features
        ]
        self.scales.extend(nn.Parameter(torch.ones(self.down.out_features)) for _ in self.tuned)
        for scale, linear in zip(self.scales, self.tuned, strict=True):
            hook = linear.register_forward_hook(lambda _, args, out, s=scale: out + self.up(self.down(args[0]) * s))
            self._undo.callback(hook.remove)
        return Attachment(dict.fromkeys(backbones, 0))

    @torch.no_grad()
    def merge(self):
        for scale, linear in zip(self.scales, self.tuned, strict=True):
            linear.weight += self.up.weight @ (scale[:, None] * self.down.weight)
        self.detach()


class TwoEncoders(Adapter):
    """After PMF: the last layers of two encoders take turns, each reading a summary of the other's tokens."""

    traits = Traits("two", backbones=("text", "encoder"), runs_layers=True, text_depends_on_input=True)

    def __init__(self, width: int):
        super().__init__()
        self.across = nn.ModuleDict({name: nn.Linear(width, width) for name in ("text", "encoder")})
        self.balance: Tensor | None = None

    def _install(self, backbones):
        return Attachment({name: len(b.encoder.layer) - 1 for name, b in backbones.items()})

    def encode(self, words, picture):
        states = {"text": words.states, "encoder": picture.states}
        summaries = {
            "text": self.across["text"](states["encoder"].mean(1)),
            "encoder": self.across["encoder"](states["text"].mean(1)),
        }
        for name, backbone in self._backbones.items():
            fused = torch.cat([states[name], summaries[name][:, None]], dim=1)
            states[name] = output(backbone.encoder.layer[-1](fused))[:, :-1]
        self.balance = summaries["text"].square().sum(), torch.tensor(summaries["text"].numel())
        return Outputs(states["text"], words.mask, {"image": states["encoder"].mean(1)})

    def extra_loss(self):
        return self.balance


def test_the_base_class_has_at_most_twelve_public_members():
    class Bare(Adapter):
        def _install(self, backbones):
            return Attachment({})

    own = {*dir(Bare()), *Adapter.__annotations__} - {*dir(nn.Module())}
    public = sorted(name for name in own if not name.startswith("_"))
    assert public == [
        *("attach", "attachment", "conditioned", "config", "detach", "disabled", "encode", "extra_loss", "merge"),
        *("save_pretrained", "traits", "usage"),
    ]
    assert len(public) <= 12


def output(value):
    return value[0] if isinstance(value, tuple) else value


def encoder(seed):
    torch.manual_seed(seed)
    small = {
        k: v
        for k, v in GROUPED.items()
        if k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    return BertModel(BertConfig(**small, vocab_size=32, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5))


def test_a_weight_update_shared_by_two_models_attaches_trains_and_merges():
    one, two, inputs = tiny("llama"), tiny("qwen2"), text()
    frozen = [m(**inputs).logits for m in (one, two)]
    adapter = SharedUpdate(32)
    adapter.attach({"text": one, "other": two})
    assert [torch.equal(m(**inputs).logits, f) for m, f in zip((one, two), frozen, strict=True)] == [True, True]
    (one(**inputs).logits.square().mean() + two(**inputs).logits.square().mean()).backward()
    assert adapter.up.weight.grad.abs().max() > 0 and len(adapter.scales) == 8
    with torch.no_grad():
        adapter.up.weight.copy_(torch.randn_like(adapter.up.weight))
    adapted = [m(**inputs).logits for m in (one, two)]
    adapter.merge()
    for model, with_hooks, before in zip((one, two), adapted, frozen, strict=True):
        assert not hasattr(model, "shared")
        assert torch.allclose(model(**inputs).logits, with_hooks, atol=1e-4)
        assert not torch.allclose(with_hooks, before, atol=1e-2)


def test_a_method_that_interleaves_two_encoders_overrides_read():
    backbones = {"text": encoder(0), "encoder": encoder(1)}
    assert all(b.training for b in backbones.values())
    adapter = TwoEncoders(32)
    adapter.attach(backbones)
    tokens = torch.ones(2, 5, dtype=torch.long)
    states = trunk_states(backbones["text"], adapter.attachment.first_layers["text"], input_ids=tokens)
    words = TextBatch(tokens, tokens, states, adapter.attachment.first_layers["text"])
    picture = pictures(torch.randn(2, 3), torch.randn(2, 7, 32), adapter.attachment.first_layers["encoder"])
    results, again = adapter.encode(words, picture), adapter.encode(words, picture)
    assert torch.equal(results.text, again.text)  # dropout of the frozen encoders is off
    total, count = adapter.extra_loss()
    (results.text.sum() + results.vectors["image"].sum() + total / count).backward()
    assert all(p.grad is not None for p in adapter.parameters())
    for backbone in backbones.values():
        backbone.train()
        own = set(adapter.modules())
        assert not any(m.training for m in backbone.modules() if m not in own)
        assert all(p.grad is None for n, p in backbone.named_parameters() if not n.startswith("two."))
    adapter.detach()
    assert all(b.training and all(m.training for m in b.modules()) for b in backbones.values())
    assert all(p.requires_grad for b in backbones.values() for p in b.parameters())
    assert adapter.attachment is None
    with pytest.raises(ModelError, match="two has no activation checkpointing"):
        adapter.attach(backbones, checkpoint=True)


class Failing(SharedUpdate):
    traits = Traits("failing")

    def _install(self, backbones):
        super()._install(backbones)
        raise ModelError("this model will not do")


def test_an_attach_that_fails_leaves_no_trace():
    model = tiny()
    model.train()
    model.lm_head.eval()
    next(model.parameters()).requires_grad_(False)
    before = (
        [(n, p.requires_grad) for n, p in model.named_parameters()],
        [(n, m.training) for n, m in model.named_modules()],
    )
    with pytest.raises(ModelError, match="will not do"):
        Failing(32).attach({"text": model})
    after = (
        [(n, p.requires_grad) for n, p in model.named_parameters()],
        [(n, m.training) for n, m in model.named_modules()],
    )
    assert before == after and not any(m._forward_hooks for m in model.modules())


def test_bind_nests_and_ends_with_an_exception():
    class Hearing(BoundFeatures, SharedUpdate):
        traits, feature_widths = Traits("hearing"), {"image": 6}

    adapter = Hearing(32)
    with pytest.raises(ModelError, match="hearing adapter is not attached"), adapter.bind({}):
        pass
    adapter.attach({"text": tiny()})
    outer, inner = features(), features(seed=5)
    assert adapter.condition is None
    with adapter.bind({"image": outer}):
        with contextlib.suppress(KeyError), adapter.bind({"image": inner}, copies=2):
            assert torch.equal(adapter.condition.features["image"], inner) and adapter.condition.copies == 2
            raise KeyError
        assert torch.equal(adapter.condition.features["image"], outer)
        with adapter.bind({}):
            assert adapter.condition is None
    assert adapter.condition is None
    with pytest.raises(ModelError, match="cannot be merged"):
        Adapter.merge(adapter)
    assert Adapter.extra_loss(adapter) is None
