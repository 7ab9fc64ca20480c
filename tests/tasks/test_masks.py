"""Mask losses, metrics and baselines against per-pixel loops, scikit-learn and values computed by hand."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score, jaccard_score

from mitrain.core.errors import ConfigError, DataError
from mitrain.tasks.masks import LOSSES, MaskMetrics, baseline_masks, distance_to_centre, mask_loss, predict_masks

EPS = np.finfo(np.float64).eps


def batch(size: int = 5, classes: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(size, classes, 6, 7, generator=generator, dtype=torch.float64)
    return logits, torch.rand(size, 6, 7, generator=generator) < 0.3


def mean_loss(kind: str, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    total, count = mask_loss(kind, logits, target)
    return total / count


def naive_pixel(kind: str, score: float, true: int) -> tuple[float, float]:
    """(weighted value, weight) of one pixel."""
    p = 1 / (1 + math.exp(-score))
    of_true = p if true else 1 - p
    if kind == "ce":
        return (1.1 if true else 0.9) * -math.log(of_true), 1.1 if true else 0.9
    if kind == "focal":
        return (0.25 if true else 0.75) * (1 - of_true) ** 2 * -math.log(of_true), 1
    return -math.log(of_true), 1


def naive_dice(score: np.ndarray, target: np.ndarray) -> float:
    p = 1 / (1 + np.exp(-score))
    return 1 - (2 * (p * target).sum() + 1e-5) / ((p**2).sum() + target.sum() + 1e-5)


def naive_loss(kind: str, score: np.ndarray, target: np.ndarray) -> float:
    pixel = kind.removesuffix("dice").removesuffix("+")
    samples = list(zip(score, target, strict=True))
    pairs = [[naive_pixel(pixel, s, t) for s, t in zip(ss.flat, tt.flat, strict=True)] for ss, tt in samples]
    sums = np.array(pairs).sum(axis=1)
    dice = np.array([naive_dice(s, t) for s, t in samples])
    if kind == "dice":
        return dice.mean()
    if kind == pixel:
        return sums[:, 0].sum() / sums[:, 1].sum()
    return (sums[:, 0] / sums[:, 1] + dice).mean()


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_equal_a_loop_over_pixels(kind, classes):
    logits, target = batch(classes=classes)
    score = logits[:, 0] if classes == 1 else logits[:, 1] - logits[:, 0]
    expected = naive_loss(kind, score.numpy(), target.numpy())
    assert mean_loss(kind, logits, target).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_sums_and_counts_add_up(kind):
    """Splitting a batch only reorders float64 sums of fewer than 300 terms."""
    logits, target = batch()
    whole = torch.stack(mask_loss(kind, logits, target))
    parts = sum(torch.stack(mask_loss(kind, logits[a:b], target[a:b])) for a, b in ((0, 1), (1, 3), (3, 5)))
    torch.testing.assert_close(parts, whole, rtol=300 * EPS, atol=0)


@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_are_exact(kind):
    logits, target = batch(size=2)
    target = torch.cat([target[:1], torch.zeros_like(target[:1])])
    assert torch.autograd.gradcheck(lambda x: mean_loss(kind, x, target), logits.requires_grad_())


@pytest.mark.parametrize("scale", [0.0, 1e4, 6e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", LOSSES)
def test_extreme_logits_and_empty_masks_stay_finite(kind, dtype, scale):
    signs = torch.tensor([1.0, -1.0]).repeat(8).view(1, 1, 4, 4)
    for classes in (1, 2):
        logits = (scale * signs * torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1)[:, :classes]).to(dtype).repeat(3, 1, 1, 1)
        target = torch.stack([torch.zeros(4, 4), torch.ones(4, 4), torch.eye(4)]).bool()
        logits.requires_grad_()
        loss = mean_loss(kind, logits, target)
        loss.backward()
        assert loss.isfinite() and loss.dtype == torch.float32
        assert logits.grad.isfinite().all()


def test_an_unknown_loss_is_refused():
    with pytest.raises(ConfigError) as error:
        mask_loss("hinge", *batch())
    assert str(error.value) == f"loss 'hinge' is not known: choose one of {', '.join(LOSSES)}"


@pytest.mark.parametrize("kind", LOSSES)
def test_sum_and_count_are_of_the_scores_kind_where_the_scores_are(kind):
    """On torch's meta device, which has no numbers, whatever is made is seen to be made in the right place."""
    logits, target = batch()
    for place, dtype in (("cpu", torch.float64), ("cpu", torch.float32), ("meta", torch.float64)):
        total, count = mask_loss(kind, logits.to(place, dtype).requires_grad_(), target.to(place))
        assert total.dtype == count.dtype == dtype and total.device.type == count.device.type == place
        assert total.requires_grad and not count.requires_grad


def random_masks(count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of varying size and overlap, some of them empty."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(count):
        shape = rng.integers(2, 9, size=2)
        true = rng.random(shape) < rng.choice([0.0, 0.3, 0.8], p=[0.1, 0.5, 0.4])
        mine = true ^ (rng.random(shape) < rng.choice([0.0, 0.1, 0.3, 0.9]))
        pairs.append((mine, np.zeros_like(true) if i % 10 == 0 else true))
    return pairs


def metrics_of(pairs: list[tuple[np.ndarray, np.ndarray]]) -> MaskMetrics:
    metrics = MaskMetrics()
    metrics.update(*zip(*pairs, strict=True))
    return metrics


def naive_metrics(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    intersections, unions = [], []
    for mine, true in pairs:
        both = either = 0
        for row, column in np.ndindex(*mine.shape):
            both += bool(mine[row, column]) and bool(true[row, column])
            either += bool(mine[row, column]) or bool(true[row, column])
        intersections.append(both)
        unions.append(either)
    ious = [i / u if u else 0.0 for i, u in zip(intersections, unions, strict=True)]
    return {
        "oiou": sum(intersections) / sum(unions),
        "miou": sum(ious) / len(ious),
        **{str(t): sum(iou >= t for iou in ious) / len(ious) for t in (0.5, 0.6, 0.7, 0.8, 0.9)},
    }


def test_metrics_equal_a_loop_over_pixels():
    pairs = random_masks(60, seed=3)
    found, expected = metrics_of(pairs).compute(), naive_metrics(pairs)
    assert found["samples"] == 60
    assert found["oiou"] == expected["oiou"]
    assert found["miou"] == pytest.approx(expected["miou"], rel=60 * EPS)
    assert found["precision"] == {key: expected[key] for key in ("0.5", "0.6", "0.7", "0.8", "0.9")}
    assert 0 < found["precision"]["0.9"] < found["precision"]["0.5"] < 1


def test_metrics_equal_scikit_learn():
    pairs = random_masks(40, seed=4)
    found = metrics_of(pairs).compute()
    flat = [(true.ravel(), mine.ravel()) for mine, true in pairs]
    jaccard = [jaccard_score(true, mine, zero_division=0) for true, mine in flat]
    dice = [f1_score(true, mine, zero_division=0) for true, mine in flat]
    pooled = jaccard_score(*(np.concatenate(side) for side in zip(*flat, strict=True)))
    assert found["miou"] == pytest.approx(np.mean(jaccard), rel=1e-12)
    assert found["dice"] == pytest.approx(np.mean(dice), rel=1e-12)
    assert found["oiou"] == pytest.approx(pooled, rel=1e-12)


def test_metrics_add_over_batches_and_ranks():
    pairs = random_masks(30, seed=5)
    parts = metrics_of(pairs[:7]) + metrics_of(pairs[7:8]) + metrics_of(pairs[8:])
    torch.testing.assert_close(parts.sums, metrics_of(pairs).sums, rtol=30 * EPS, atol=0)
    assert parts.sums.dtype == torch.float64
    assert MaskMetrics(parts.sums).compute() == parts.compute()


@pytest.mark.parametrize("tenths", [5, 6, 7, 8, 9])
def test_an_iou_exactly_at_the_threshold_is_a_hit(tenths):
    true = np.ones((1, 10), dtype=bool)
    found = metrics_of([(np.arange(10)[None] < tenths, true)]).compute()
    assert found["precision"] == {f"0.{t}": float(t <= tenths) for t in (5, 6, 7, 8, 9)}


def test_no_samples_give_zeros():
    found = MaskMetrics().compute()
    assert found["samples"] == 0 and found["oiou"] == found["miou"] == found["dice"] == 0


def test_masks_of_different_size_are_refused():
    with pytest.raises(DataError) as error:
        metrics_of([(np.ones((2, 3), dtype=bool), np.ones((3, 2), dtype=bool))])
    assert str(error.value) == "a mask of (2, 3) is compared with one of (3, 2): use the image's own size"


def test_what_is_missing_from_a_batch_is_not_left_out_of_the_mean():
    mask = np.ones((2, 2), dtype=bool)
    with pytest.raises(ValueError, match="shorter"):
        MaskMetrics().update([mask, mask], [mask])
    with pytest.raises(ValueError, match="shorter"):
        predict_masks(torch.zeros(2, 1, 2, 2), [(2, 2)])
    with pytest.raises(ValueError, match="longer"):
        MaskMetrics(torch.ones(11, dtype=torch.float64)).compute()


def test_numbers_count_as_masks_where_they_are_not_zero():
    """2 & 1 is 0: masks written as 0 and 255, or as counts, are read as yes and no first."""
    found = metrics_of([(np.array([[2, 0, 1]]), np.array([[1, 0, 2]]))]).compute()
    assert found["oiou"] == found["miou"] == found["dice"] == 1.0


def test_predictions_are_at_every_images_own_size():
    left = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    logits = torch.stack([left, -3 * left])[:, None]
    small, large = predict_masks(logits, [(2, 3), (4, 6)])
    assert small.tolist() == [[True, False, False]] * 2  # the middle is exactly 0: background
    assert large.tolist() == [[False] * 3 + [True] * 3] * 4
    assert small.dtype == large.dtype == np.bool_


def test_two_class_predictions_are_the_argmax_after_resizing():
    logits, _ = batch(size=3)
    sizes = [(9, 13), (6, 7), (20, 3)]
    for sample, size, mask in zip(logits, sizes, predict_masks(logits, sizes), strict=True):
        resized = F.interpolate(sample[None], size=size, mode="bilinear", align_corners=True)[0]
        assert np.array_equal(mask, resized.argmax(0).numpy() == 1)


def scene() -> list[np.ndarray]:
    """Four objects on 9 × 9: a large one top left, one near the centre, one at the right edge, and an empty one."""
    masks = [np.zeros((9, 9), dtype=bool) for _ in range(4)]
    masks[0][0:3, 0:4] = True
    masks[1][4:6, 4:6] = True
    masks[2][1:8, 8] = True
    return masks


def test_baselines_by_hand():
    masks = scene()
    baselines = baseline_masks(masks, seed=0, key="a")
    assert baselines["union"].sum() == 12 + 4 + 7
    assert np.array_equal(baselines["largest"], masks[0])
    assert np.array_equal(baselines["central"], masks[1])


def test_central_is_judged_in_both_directions():
    masks = [np.zeros((9, 9), dtype=bool) for _ in range(5)]
    for mask, place in zip(masks, [(4, 1), (1, 4), (4, 4), (7, 4), (4, 7)], strict=True):
        mask[place] = True
    assert baseline_masks(masks, seed=0, key="a")["central"] is masks[2]


def test_the_first_of_equal_objects_wins_and_empty_ones_are_never_central():
    first, twin = np.zeros((2, 5, 6), dtype=bool)
    first[2, 2] = twin[2, 3] = True  # as large, and as far from the centre (2, 2.5)
    nothing = np.zeros_like(first)
    for masks in ([first, twin], [nothing, first, twin], [first, nothing, twin]):
        baselines = baseline_masks(masks, seed=0, key="a")
        assert baselines["largest"] is baselines["central"] is first
    assert baseline_masks([nothing], seed=0, key="a")["central"] is nothing


def test_the_distance_to_the_centre_by_hand():
    mask = np.zeros((5, 8), dtype=bool)
    mask[0, 1] = mask[1, 1] = mask[1, 2] = mask[0, 2] = True  # the centroid is (0.5, 1.5), the image's centre (2, 3.5)
    assert distance_to_centre(mask) == 2.5
    assert distance_to_centre(np.zeros((5, 8), dtype=bool)) == math.inf


def test_the_random_baseline_is_seeded_and_uniform():
    masks = scene()

    def chosen(seed: int, key: str) -> int:
        found = baseline_masks(masks, seed, key)["random"]
        return next(i for i, mask in enumerate(masks) if mask is found)

    draws = [chosen(0, f"sample {i}") for i in range(400)]
    assert draws == [chosen(0, f"sample {i}") for i in range(400)]
    assert draws != [chosen(1, f"sample {i}") for i in range(400)]
    assert np.bincount(draws).min() > 60  # expected 100, standard deviation 8.7
    assert draws[:8] == [
        random.Random(f"0:sample {i}").randrange(4) for i in range(8)
    ]  # published baselines stay what they are


def test_a_scene_without_instances_is_refused():
    with pytest.raises(DataError) as error:
        baseline_masks([], seed=0, key="scene 7")
    assert str(error.value) == "the scene of 'scene 7' has no instance masks: baselines need its annotations"
