"""The loss over parts of the vocabulary is the loss."""

import pytest
import torch
import torch.nn.functional as F
from tiny import COMMON, tiny
from torch import nn
from tracked import Tracked
from transformers import AutoConfig, AutoModelForCausalLM

from mitrain.core.errors import ModelError
from mitrain.models import quant, text
from mitrain.models.chunked_loss import chunked_cross_entropy
from mitrain.models.quant import FrozenInt8Linear, FrozenNF4Linear


def setting(n: int = 7, width: int = 12, vocabulary: int = 101, kind: type | None = None, bias: bool = True):
    """Hidden states (n, width) in float64, a head, labels of which two do not count."""
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias).requires_grad_(False)
    head = (head if kind is None else kind.of(head)).double()
    labels = torch.randint(0, vocabulary, (n,))
    labels[0], labels[1], labels[2], labels[3] = -100, vocabulary - 1, 0, -100
    return 3 * torch.randn(n, width, dtype=torch.float64), head, labels


@pytest.mark.parametrize("kind", [None, FrozenInt8Linear, FrozenNF4Linear])
@pytest.mark.parametrize("chunk", [1, 10, 101, 8192])
def test_loss_and_gradient_are_the_whole_ones(kind, chunk):
    """In float64: sums of 101 terms in another order."""
    hidden, head, labels = setting(kind=kind)
    one, two = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    ours = chunked_cross_entropy(one, head, labels, chunk)
    plain = F.cross_entropy(head(two), labels, reduction="none")
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1, 2, len(labels), dtype=torch.float64)
    (ours * weights).sum().backward()
    (plain * weights).sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-11, atol=1e-13)
    assert ours[0] == 0 and not one.grad[0].any()


@pytest.mark.parametrize("chunk", [10, 8192])
def test_labels_may_share_a_position_whose_logits_are_made_once(chunk):
    hidden, head, labels = setting()
    rows, made = torch.tensor([2, 0, 0, 2, 1, 2, 0]), []
    one, two = hidden[:3].clone().requires_grad_(), hidden[:3].clone().requires_grad_()
    head.register_forward_pre_hook(lambda _, args: made.append(len(args[0])))
    ours = chunked_cross_entropy(one, head, labels, chunk, rows)
    assert made == [3]
    plain = F.cross_entropy(head(two)[rows], labels, reduction="none")
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1, 2, len(labels), dtype=torch.float64)
    (ours * weights).sum().backward()
    (plain * weights).sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-11, atol=1e-13)


def test_large_logits_do_not_overflow():
    hidden, head, labels = setting()
    hidden = (1e4 * hidden).requires_grad_()
    loss = chunked_cross_entropy(hidden, head, labels, 10)
    torch.testing.assert_close(loss, F.cross_entropy(head(hidden), labels, reduction="none"), rtol=1e-12, atol=1e-9)


def test_all_logits_are_never_held():
    hidden, head, labels = setting(64, 16, 10_000)
    hidden, head = hidden.float().requires_grad_(), head.float()
    with Tracked() as found:
        chunked_cross_entropy(hidden, head, labels, 100).sum().backward()
    assert found.peak < 4 * 64 * 10_000 / 5


def test_the_heads_hooks_run_and_its_forward_comes_back():
    hidden, head, labels = setting()
    seen = []
    head.register_forward_pre_hook(lambda *_: seen.append("before"))
    head.register_forward_hook(lambda *_: seen.append("after"))
    chunked_cross_entropy(hidden, head, labels)
    assert seen == ["before", "after"] and "forward" not in vars(head)
    assert head(hidden).shape == (7, 101)


def test_a_trainable_head_is_refused():
    hidden, head, labels = setting()
    with pytest.raises(ModelError, match="needs a frozen linear head"):
        chunked_cross_entropy(hidden, head.requires_grad_(True), labels)


@pytest.mark.parametrize(("name", "plain"), [("llama", True), ("qwen3", True), ("gemma2", False)])
def test_capped_logits_keep_the_models_own_way(name, plain):
    assert text.is_plain_head(tiny(name)) is plain


@pytest.mark.parametrize(("name", "precision"), [("llama", "none"), ("llama", "int8"), ("gemma2", "none")])
@pytest.mark.parametrize("grad", [True, False])
def test_the_answers_likelihood_is_what_the_whole_logits_say(name, precision, grad):
    """The head reads no other positions."""
    model = tiny(name, dtype=torch.float64)
    backbone = text.TextBackbone(model, None)
    if precision != "none":
        quant.quantise(model, precision, embedding=True)
    given, expected = asked_of(model)
    read = []
    model.get_output_embeddings().register_forward_hook(lambda head, given, out: read.append(out.shape))
    with torch.set_grad_enabled(grad):
        found = backbone.log_likelihood(*given)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)
    assert [tuple(shape) for shape in read] == [(4,) if text.is_plain_head(model) else (4, 67)]


def test_a_head_that_is_trained_gets_its_gradient():
    """As in full fine-tuning, where it is the matrix of the embeddings."""
    model = tiny("llama", dtype=torch.float64)
    backbone, head = text.TextBackbone(model, None), model.get_output_embeddings().requires_grad_(True)
    given, expected = asked_of(model)
    expected.sum().backward()
    wanted, head.weight.grad = head.weight.grad, None
    found = backbone.log_likelihood(*given)
    found.sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.weight.grad, wanted, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(
            text.TextBackbone(model, None).log_likelihood(*given), found.double(), rtol=1e-5, atol=1e-5
        )


def asked_of(model):
    """What `log_likelihood` is asked, and what the model's own logits answer."""
    ids = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(0))
    rows, positions, targets = torch.tensor([0, 0, 1, 2]), torch.tensor([5, 6, 3, 6]), torch.tensor([4, 9, 66, 0])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[rows, positions]
    return (ids, torch.ones_like(ids), rows, positions, targets), logits.log_softmax(-1)[range(4), targets]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_what_stands_between_the_last_states_and_the_heads_matrix_is_not_skipped(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**COMMON, "is_decoder": True})).eval()
    ids, rows, positions = torch.arange(5, 13).view(2, 4), torch.tensor([0, 1]), torch.tensor([2, 3])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[rows, positions].log_softmax(-1)[range(2), [4, 66]]
        given = (ids, torch.ones_like(ids), rows, positions, torch.tensor([4, 66]))
        found = text.TextBackbone(model, None).log_likelihood(*given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
