"""What rows keep of their samples, and the intervals that follow from it."""

from types import SimpleNamespace

import numpy as np
import pytest

from mitrain.compare.intervals import kept, outcomes_of, packed
from mitrain.compare.worker import outcomes

RANDOM = np.random.default_rng(5)


def row(numbers, seed=0, samples=None, groups=()):
    ids = samples or [f"s{i}" for i in range(len(numbers))]
    return {"seed": seed, "outcomes": kept(ids, list(numbers), float(np.mean(numbers)), groups)}


def right(share, count):
    return (np.arange(count) < share * count).astype(float)


def test_what_is_kept_comes_back():
    one, two = [1.0, 0.0, 0.0, 1.0], [0.5, 0.25, 0.0, 1.0]
    found = outcomes_of([row(one, 3), row(two, 4)])
    assert found.by_seed[3].tolist() == one and found.by_seed[4].tolist() == two
    assert found.estimate.value == pytest.approx(np.mean([one, two]))


def test_numbers_whose_mean_is_not_the_metric_are_not_kept():
    assert kept(["a", "b"], [1.0, 0.0], 0.6) is None
    assert kept(["a", "b"], [1.0, float("nan")], float("nan")) is None
    assert kept(["a"], None, 0.5) is None


def test_one_seed_has_the_sampling_error_of_its_samples():
    found = outcomes_of([row(right(0.6, 1000))]).estimate
    assert found.value == pytest.approx(0.6)
    assert found.least == pytest.approx(1.96 * np.sqrt(0.6 * 0.4 / 1000), rel=0.1)
    assert found == outcomes_of([row(right(0.6, 1000))]).estimate, "drawn from a fixed seed"


def test_seeds_that_differ_have_the_error_of_their_mean():
    means = np.array([0.40, 0.45, 0.52, 0.58, 0.60])
    found = outcomes_of([row(np.full(50, mean), seed) for seed, mean in enumerate(means)]).estimate
    assert found.least == pytest.approx(1.96 * means.std(ddof=1) / np.sqrt(5), rel=0.1)


def test_a_difference_is_taken_sample_by_sample():
    base = [RANDOM.random(1000) < 0.5 for _ in range(3)]
    better = [numbers | (RANDOM.random(1000) < 0.1) for numbers in base]  # right wherever the other one is
    one, two = ([row(n.astype(float), seed) for seed, n in enumerate(side)] for side in (better, base))
    gain = (outcomes_of(one) - outcomes_of(two)).estimate
    assert gain.value == pytest.approx(np.mean(better) - np.mean(base)) and gain.low > 0.03
    apart = np.hypot(outcomes_of(one).estimate.least, outcomes_of(two).estimate.least)
    assert gain.least < apart / 2
    same = (outcomes_of(one) - outcomes_of(one)).estimate
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_samples_of_a_group_count_as_one():
    """Ten copies of each sample tell no more than one of each."""
    one, many = right(0.6, 200), np.repeat(right(0.6, 200), 10)
    groups = np.repeat(RANDOM.permutation(200) * 7, 10).tolist()
    alone = outcomes_of([row(one)]).estimate
    together = outcomes_of([row(many, groups=groups)])
    assert (together.estimate.low, together.estimate.high) == pytest.approx((alone.low, alone.high), abs=0.02)
    assert outcomes_of([row(many)]).estimate.least < alone.least / 2
    assert (together - outcomes_of([row(np.zeros(2000))])).estimate == together.estimate
    assert (outcomes_of([row(np.ones(2000))]) - together).estimate.least == pytest.approx(together.estimate.least)


def test_groups_of_other_sizes_keep_the_mean_over_samples():
    numbers, groups = [1.0] * 90 + [0.0] * 10, [0] * 90 + list(range(1, 11))
    found = outcomes_of([row(numbers, groups=groups)]).estimate
    assert found.value == pytest.approx(0.9) and found.low == 0 and 0.9 < found.high < 1


def test_a_control_has_the_groups_of_its_samples():
    groups, bare = [0, 0, 1, 2], {"ids", "each"}
    plain, under = row([1.0, 0.0, 1.0, 0.0], groups=groups), row([0.0, 0.0, 1.0, 0.0])["outcomes"]
    assert set(under) == bare and set(row([1.0, 0.0], groups=[3, 4])["outcomes"]) == bare, "each its own"
    held = {**plain, "control_outcomes": {"shuffle": under}}
    assert outcomes_of([held], "shuffle").groups.tolist() == groups
    plain["outcomes"]["groups"] = packed(np.array([0, 0], dtype="<u4"))
    assert outcomes_of([plain]) is None, "of other samples"


def test_a_group_of_all_samples_is_none():
    assert row(right(0.6, 50), groups=[3] * 50)["outcomes"].keys() == {"ids", "each"}


def test_numbers_of_groups_may_be_any():
    held = row([1.0, 0.0, 1.0], groups=[0, 0, 1])
    held["outcomes"]["groups"] = packed(np.array([9, 9, 2**32 - 1], dtype="<u4"))
    assert outcomes_of([held]).groups.tolist() == [0, 0, 1]


def test_a_row_keeps_which_samples_share_an_object_or_a_file():
    named = [("cat", "a.png"), ("dog", "b.png"), ("cat", "c.png"), ("", "b.png"), ("", "d.png"), ("", "")]
    samples = [
        SimpleNamespace(id=str(i), object=one, inputs={"image": path} if path else {}) for i, (one, path) in enumerate(named)
    ]
    found = SimpleNamespace(metrics={"accuracy": 0.5}, predictions=[1.0, 0.0] * 3)
    run = SimpleNamespace(model=SimpleNamespace(task=SimpleNamespace(each=lambda predictions, _: predictions)))
    held = {"seed": 0, "outcomes": outcomes(run, samples, found, "accuracy")}
    assert outcomes_of([held]).groups.tolist() == [0, 1, 0, 1, 2, 3]


def test_what_was_scored_on_other_samples_or_seeds_is_not_paired():
    one = outcomes_of([row([1.0, 0.0])])
    assert one - outcomes_of([row([1.0, 0.0], samples=["s0", "t1"])]) is None
    assert one - outcomes_of([row([1.0, 0.0], seed=1)]) is None
    assert list((one - outcomes_of([row([0.0, 0.0]), row([1.0, 1.0], 1)])).by_seed) == [0]


@pytest.mark.parametrize(
    "change", [{"outcomes": None}, {"outcomes": {"ids": "x"}}, {"outcomes": {"ids": "x", "each": "%%"}}, {}]
)
def test_rows_without_their_samples_have_no_outcomes(change):
    other = row([1.0, 0.0], 1)
    assert outcomes_of([other, {"seed": 2, **change}]) is None
    assert outcomes_of([]) is None and outcomes_of([other, row([1.0], 2)]) is None
