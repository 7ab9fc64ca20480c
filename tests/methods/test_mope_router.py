"""Routers, their noise and keys, and the importance loss."""

import pytest
import torch
from torch import nn

from mitrain.methods.mope.config import MoPEConfig
from mitrain.methods.mope.router import (
    ConditionRouter,
    MultimodalRouter,
    importance_loss,
    make_router,
    squared_variation,
    usage,
    weigh,
)

ROWS, WIDTH, CONDITION = 6, 8, 5


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def router_of(**settings):
    torch.manual_seed(1)
    config = MoPEConfig(**{"experts": 4, **settings})
    return config, make_router(config, WIDTH, CONDITION, dtype=torch.float64)


@pytest.mark.parametrize("settings", [{}, {"router": "cpt"}, {"routing": "top1"}, {"experts": 1}, {"experts": 16}])
@pytest.mark.parametrize("training", [True, False])
def test_weights_are_a_distribution_over_the_experts(settings, training):
    config, router = router_of(**settings)
    used, clean = weigh(router(random(ROWS, WIDTH), random(ROWS, CONDITION, seed=1)), config, training)
    assert used.shape == clean.shape == (ROWS, config.experts)
    for weights in (used, clean):
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(ROWS, dtype=torch.float64), rtol=0, atol=1e-14)


def test_the_scores_are_those_of_the_papers():
    mean, condition = random(ROWS, WIDTH), random(ROWS, CONDITION, seed=1)
    config, router = router_of(temperature=0.5)
    assert isinstance(router, MultimodalRouter)
    query = [mean @ router.tokens.weight.T + router.tokens.bias, condition @ router.condition.weight.T]
    query[1] = query[1] + router.condition.bias
    assert (query[0].shape[1], query[1].shape[1]) == (2, 8)
    expected = torch.exp(torch.cat(query, 1) @ router.keys / 0.5)
    _, clean = weigh(router(mean, condition), config, True)
    torch.testing.assert_close(clean, expected / expected.sum(1, keepdim=True), rtol=1e-12, atol=0)
    _, router = router_of(router="cpt")
    assert isinstance(router, ConditionRouter)
    expected = condition @ router.score.weight.T + router.score.bias
    torch.testing.assert_close(router(mean, condition), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("settings", "reads_tokens", "reads_condition"),
    [
        ({}, True, True),
        ({"router_reads": "tokens"}, True, False),
        ({"router_reads": "condition"}, False, True),
        ({"router": "cpt"}, False, True),
    ],
)
def test_what_a_router_reads(settings, reads_tokens, reads_condition):
    _, router = router_of(**settings)
    mean, condition = random(ROWS, WIDTH), random(ROWS, CONDITION, seed=1)
    scores = router(mean, condition)
    assert torch.equal(router(mean + 1, condition), scores) != reads_tokens
    assert torch.equal(router(mean, condition + 1), scores) != reads_condition


def test_noise_is_added_in_training_alone_and_after_the_temperature():
    config = MoPEConfig(experts=4, noise=0.3, temperature=0.5)
    scores = random(50_000, 4)
    used, clean = weigh(scores, config, training=False)
    assert torch.equal(used, clean)
    torch.manual_seed(0)
    used, still_clean = weigh(scores, config, training=True)
    assert torch.equal(clean, still_clean)
    noise = used.log() - clean.log()  # up to each row's normaliser: centred, the variance is s² (1 - 1/k)
    noise = noise - noise.mean(-1, keepdim=True)
    assert noise.square().mean().item() == pytest.approx(0.3**2 * 3 / 4, rel=0.03)  # 6 standard errors of 150 000 values
    assert torch.equal(*weigh(scores, config.model_copy(update={"noise": 0.0}), training=True))


@pytest.mark.parametrize("experts", [3, 10, 16])
def test_keys_start_orthogonal(experts):
    _, router = router_of(experts=experts)
    keys = router.keys
    square = keys.T @ keys if experts <= 10 else keys @ keys.T
    torch.testing.assert_close(square, torch.eye(len(square), dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("keys", ["frozen", "learned"])
def test_frozen_keys_stay_and_are_saved(keys):
    config, router = router_of(keys=keys)
    before = router.keys.detach().clone()
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.1)
    used, _ = weigh(router(random(ROWS, WIDTH), random(ROWS, CONDITION)), config, True)
    used.square().sum().backward()
    optimizer.step()
    assert torch.equal(router.keys, before) == (keys == "frozen")
    assert "keys" in router.state_dict()


def test_top1_takes_the_best_expert_with_the_dense_gradient():
    scores = random(ROWS, 4).requires_grad_()
    target = random(ROWS, 4, seed=2)
    gradients = []
    for routing in ("dense", "top1"):
        used, clean = weigh(scores, MoPEConfig(routing=routing), training=False)
        gradients.append(torch.autograd.grad((used * target).sum(), scores)[0])
    assert torch.equal(used, nn.functional.one_hot(clean.argmax(-1), 4).to(used))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    assert gradients[0].abs().max() > 0


# Importance


def test_the_importance_loss_equals_a_hand_computation_and_is_zero_below_the_threshold():
    uneven = torch.tensor([[0.7, 0.2, 0.1], [0.9, 0.1, 0.0]], dtype=torch.float64)
    even = torch.tensor([[0.4, 0.3, 0.3], [0.3, 0.3, 0.4]], dtype=torch.float64)
    weights = torch.stack([uneven, even])
    # importance (1.6, 0.3, 0.1): mean 2/3, unbiased variance ((14/15)² + (11/30)² + (17/30)²) / 2
    first = ((14 / 15) ** 2 + (11 / 30) ** 2 + (17 / 30) ** 2) / 2 / (2 / 3) ** 2
    # importance (0.7, 0.6, 0.7): mean 2/3, unbiased variance (2 (1/30)² + (2/30)²) / 2
    second = (2 * (1 / 30) ** 2 + (2 / 30) ** 2) / 2 / (2 / 3) ** 2
    assert squared_variation(weights).tolist() == pytest.approx([first, second])
    assert importance_loss(weights, 0.0).item() == pytest.approx((first + second) / 2)
    assert importance_loss(weights, 0.1).item() == pytest.approx(first / 2)
    assert importance_loss(weights, 2.0).item() == 0


def test_equal_importance_has_a_finite_gradient():
    weights = torch.full((1, 3, 4), 0.25, dtype=torch.float64, requires_grad=True)
    importance_loss(weights, 0.0).backward()
    assert torch.equal(weights.grad, torch.zeros_like(weights))


def test_the_importance_loss_undoes_a_collapse_down_to_the_threshold():
    config, router = router_of(router="cpt")
    with torch.no_grad():
        router.score.bias[0] += 0.5  # divided by τ = 0.1: one expert takes nearly all
    condition, history = random(64, CONDITION, seed=3), []
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    for _ in range(150):
        _, clean = weigh(router(condition, condition), config, False)
        history.append(squared_variation(clean[None]).item())
        loss = importance_loss(clean[None], 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert history[0] > 1 and history[-1] < 0.1
    assert loss.item() == 0


def test_one_expert_has_no_importance_loss():
    assert squared_variation(torch.ones(2, 5, 1)).tolist() == [0, 0]


def test_usage_at_its_extremes():
    even, collapsed = torch.full((3, 4), 0.25), torch.tensor([[1.0, 0, 0, 0]]).expand(3, 4)
    found = usage(torch.stack([even, collapsed]).double())
    assert found.variation.tolist() == pytest.approx([0, 4])  # (1, 0, 0, 0): variance 1/4, mean 1/4
    assert found.entropy.tolist() == pytest.approx([1.3862943611198906, 0])
    assert found.top_share.tolist() == [0.25, 1]
