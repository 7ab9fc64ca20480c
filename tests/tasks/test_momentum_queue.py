"""Momentum-distilled contrast: by hand, on several ranks, its queue and slow copies, and what a checkpoint carries."""

import copy
from hashlib import blake2b

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mitrain.core import dist
from mitrain.tasks.momentum import MomentumQueue, number

WIDTH = 4
IMAGES = ["a", "b", "c", "a", "d"]
TEXTS = ["one", "two", "three", "four", "two"]  # samples 0 and 3 share a picture, 1 and 4 a text
KEYS = list(zip(IMAGES, TEXTS, strict=True))
SHARPNESS = torch.tensor(5.0, requires_grad=True)


def vectors(seed, rows=5):
    generator = torch.Generator().manual_seed(seed)
    return tuple(F.normalize(torch.randn(rows, WIDTH, generator=generator), dim=-1) for _ in range(2))


def queue(size=8, **settings):
    torch.manual_seed(0)
    return MomentumQueue(size, WIDTH, {"map": nn.Linear(3, WIDTH)}, **settings)


def test_a_queue_may_start_full_of_unit_vectors_that_are_nobodys_partner():
    full = queue(size=6, start="random")
    assert full.filled == 6 and queue(size=6).filled == 0
    assert torch.allclose(full.images.norm(dim=-1), torch.ones(6)) and torch.allclose(full.words.norm(dim=-1), torch.ones(6))
    fast, slow = vectors(1), vectors(2)
    candidates = tuple(torch.cat(both) for both in zip(slow, (full.images.clone(), full.words.clone()), strict=True))
    right = torch.cat([right_of(KEYS, KEYS), torch.zeros(5, 6)], dim=1)
    full.train()
    assert float(full.contrast(fast, slow, KEYS, SHARPNESS.detach())) == pytest.approx(
        by_hand(fast, slow, candidates, right, full.distil), rel=1e-5
    )
    assert full.filled == 6 and torch.equal(full.images[:5], slow[0])  # the new ones take the oldest places


def by_hand(fast, slow, candidates, right, a):
    total = 0.0
    for side in (0, 1):
        q = a * (5 * slow[side] @ candidates[1 - side].T).softmax(-1) + (1 - a) * right / right.sum(1, keepdim=True)
        total += 0.5 * F.cross_entropy(5 * fast[side] @ candidates[1 - side].T, q, reduction="sum")
    return float(total)


def right_of(rows, columns):
    return torch.tensor([[float(a == c or b == d) for c, d in columns] for a, b in rows])


def test_the_loss_by_hand_with_an_empty_and_with_a_filled_queue():
    made = queue()
    fast, slow = vectors(1), vectors(2)
    found = made.contrast(fast, slow, KEYS, SHARPNESS)
    assert float(found.detach()) == pytest.approx(by_hand(fast, slow, slow, right_of(KEYS, KEYS), 0.4), rel=1e-5)
    assert made.filled == 5
    fast, new = vectors(3), vectors(4)
    keys = [("e", "five"), ("a", "six"), ("f", "two"), ("g", "seven"), ("h", "one")]
    found = made.contrast(fast, new, keys, SHARPNESS)
    candidates = [torch.cat([n, s]) for n, s in zip(new, slow, strict=True)]
    right = right_of(keys, keys + KEYS)
    assert right[1, 5] == right[1, 8] == right[2, 6] == right[2, 9] == right[4, 5] == 1 and right.sum() == 10
    assert float(found.detach()) == pytest.approx(by_hand(fast, new, candidates, right, 0.4), rel=1e-5)


def test_only_the_fast_vectors_and_the_sharpness_get_a_gradient():
    made, slow = queue(), [v.requires_grad_() for v in vectors(2)]
    fast = [v.requires_grad_() for v in vectors(1)]
    SHARPNESS.grad = None
    made.contrast(fast, [v.detach() for v in slow], KEYS, SHARPNESS).backward()
    assert all(v.grad.abs().max() > 0 for v in fast) and SHARPNESS.grad.abs() > 0
    assert not any(buffer.requires_grad for buffer in made.buffers()) and not list(made.parameters())


def test_the_queue_is_a_ring_of_the_newest():
    made = queue(size=7)
    first, second = vectors(1), vectors(2)
    made.contrast(first, first, KEYS, SHARPNESS)
    made.contrast(second, second, KEYS, SHARPNESS)
    assert made.filled == 7 and int(made.pushed) == 10
    expected = torch.cat([second[0][2:], first[0][3:], second[0][:2]])  # places 0-2, 3-4, 5-6
    assert torch.equal(made.images, expected)
    assert made.keys[0].tolist() == [number("c"), number("three")]
    small = queue(size=3)
    small.contrast(first, first, KEYS, SHARPNESS)
    kept = {tuple(row) for row in small.words.tolist()}
    assert kept == {tuple(row) for row in first[1][2:].tolist()} and small.filled == 3


def test_the_slow_copy_follows_and_is_there_only_inside():
    module = nn.Linear(3, WIDTH)
    made = MomentumQueue(4, WIDTH, {"map": module}, momentum=0.75)
    start, x = module.weight.detach().clone(), torch.randn(2, 3)
    with torch.no_grad():
        module.weight.add_(1.0)
    kept = module.weight.data_ptr()
    slow = start + 0.25
    out, _ = made.slow_vectors(lambda: (module(x), module(x)))
    assert torch.allclose(out, F.linear(x, slow, module.bias)) and not out.requires_grad
    assert module.weight.data_ptr() == kept and torch.allclose(module.weight, start + 1)
    with pytest.raises(RuntimeError, match="broken"):
        made.slow_vectors(lambda: (_ for _ in ()).throw(RuntimeError("broken")))
    assert module.weight.data_ptr() == kept
    made.eval()
    before = made.slow_map__weight.clone()
    made.slow_vectors(lambda: (module(x), module(x)))
    made.contrast(vectors(1), vectors(2), KEYS, SHARPNESS)
    assert torch.equal(made.slow_map__weight, before) and made.filled == 0


def test_a_pass_after_the_slow_one_trains_the_fast_parameters():
    module, x = nn.Linear(3, WIDTH), torch.randn(5, 3)
    made = MomentumQueue(4, WIDTH, {"map": module}, momentum=0.5)
    with torch.no_grad():
        module.weight.add_(1.0)
    slow = made.slow_vectors(lambda: (F.normalize(module(x), dim=-1),) * 2)
    fast = F.normalize(module(x), dim=-1)
    made.contrast((fast, fast), slow, KEYS, SHARPNESS).backward()
    twin = copy.deepcopy(module)
    twin.zero_grad()
    again = F.normalize(twin(x), dim=-1)
    other = MomentumQueue(4, WIDTH, {"map": twin})
    other.contrast((again, again), slow, KEYS, SHARPNESS).backward()
    assert torch.allclose(module.weight.grad, twin.weight.grad) and module.weight.grad.abs().max() > 0


def test_ranks_together_have_the_loss_gradient_and_queue_of_one_process(monkeypatch):
    fast = [v.requires_grad_() for v in vectors(1)]
    slow = vectors(2)
    one = queue()
    total = one.contrast(fast, slow, KEYS, SHARPNESS)
    total.backward()
    expected = [v.grad.clone() for v in fast]
    shares = [slice(0, 2), slice(2, 5)]
    keys = torch.tensor([[number(a), number(b)] for a, b in KEYS])
    monkeypatch.setattr(dist, "gather", lambda value: [(slow[0][s], slow[1][s], keys[s]) for s in shares])
    summed = 0.0
    for v in fast:
        v.grad = None
    for share in shares:
        made = queue()
        loss = made.contrast([v[share] for v in fast], [v[share] for v in slow], KEYS[share], SHARPNESS)
        loss.backward()
        summed += float(loss.detach())
        assert all(torch.equal(a, b) for a, b in zip(made.buffers(), one.buffers(), strict=True))
    assert summed == pytest.approx(float(total.detach()), rel=1e-5)
    assert all(torch.allclose(v.grad, grad, rtol=1e-4, atol=1e-6) for v, grad in zip(fast, expected, strict=True))


def test_softness_rises_over_the_ramp():
    made, seen = queue(ramp=4), []
    for _ in range(6):
        seen.append(made.softness)
        made.contrast(vectors(1), vectors(2), KEYS, SHARPNESS)
    assert seen == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])
    hard = queue(distil=0.0)
    fast, slow = vectors(1), vectors(2)
    found = float(hard.contrast(fast, slow, KEYS, SHARPNESS).detach())
    assert found == pytest.approx(by_hand(fast, slow, slow, right_of(KEYS, KEYS), 0.0), rel=1e-5)
    assert queue().softness == 0.4


def test_a_checkpoint_carries_queue_and_slow_copy():
    one, two = queue(), queue()
    one.contrast(vectors(1), vectors(2), KEYS, SHARPNESS)
    with torch.no_grad():
        one.slow_map__weight.add_(1.0)
    assert set(one.state_dict()) == {"slow_map__weight", "slow_map__bias", "images", "words", "keys", "pushed", "calls"}
    two.load_state_dict(one.state_dict())
    fast, slow = vectors(3), vectors(4)
    assert torch.equal(one.contrast(fast, slow, KEYS, SHARPNESS), two.contrast(fast, slow, KEYS, SHARPNESS))
    assert two.filled == 8 and int(two.calls) == 2


def test_the_papers_settings_are_the_default():
    made = queue()
    assert (made.momentum, made.distil, made.ramp, made.filled) == (0.995, 0.4, 0, 0)
    module = nn.Linear(3, WIDTH)
    made = MomentumQueue(4, WIDTH, {"map": module})
    start = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1.0)
    made.slow_vectors(lambda: vectors(1))
    torch.testing.assert_close(made.slow_map__weight, start + 0.005)
    assert queue(start="random").calls == 0 and queue(ramp=1).softness == 0.0


def test_a_queue_is_made_where_the_trained_parameters_are():
    for start in ("empty", "random"):
        made = MomentumQueue(6, WIDTH, {"map": nn.Linear(3, WIDTH, device="meta")}, start=start)
        assert {buffer.device.type for buffer in made.buffers()} == {"meta"}
    made = queue()
    kinds = {name: buffer.dtype for name, buffer in made.named_buffers()}
    assert kinds["keys"] == kinds["pushed"] == kinds["calls"] == torch.int64
    assert kinds["images"] == kinds["words"] == kinds["slow_map__weight"] == torch.float32
    assert made.keys.shape == (8, 2) and made.images.shape == made.words.shape == (8, WIDTH)
    assert not any(buffer.count_nonzero() for name, buffer in made.named_buffers() if "slow" not in name)


def test_vectors_of_less_precision_are_compared_in_the_fast_ones():
    """Under autocast the fast vectors may be wider than the slow ones, whose queue is float32."""
    made = queue()
    fast, slow = [v.double() for v in vectors(1)], [v.bfloat16() for v in vectors(2)]
    exact = [v.double() for v in slow]
    found = made.contrast(fast, slow, KEYS, SHARPNESS.detach().double())
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(by_hand(fast, exact, exact, right_of(KEYS, KEYS).double(), 0.4), rel=1e-12)
    assert made.images.dtype == torch.float32 and torch.equal(made.images[:5], slow[0].float())


def test_a_name_has_the_same_number_in_every_process():
    assert number("a") == int.from_bytes(blake2b(b"a", digest_size=8).digest(), "big", signed=True) == 4681665781835383343
    assert any(number(str(i)) < 0 for i in range(9)) and all(abs(number(str(i))) < 2**63 for i in range(99))
