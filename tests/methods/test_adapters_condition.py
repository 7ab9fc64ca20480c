"""Checking the features that are bound to a forward pass."""

import pytest
import torch

from mitrain.core.errors import ModelError
from mitrain.methods.mit.condition import make_condition

WIDTHS = {"image": 6, "audio": 3}


def test_features_of_several_modalities():
    image, audio = torch.randn(2, 6), torch.randn(2, 3)
    condition = make_condition({"image": image, "audio": audio}, WIDTHS)
    assert condition.samples == 2 and condition.copies_for(2) == 1
    assert torch.equal(condition.features["audio"], audio) and not condition.present


@pytest.mark.parametrize("nothing", [None, {}, {"image": None}, {"image": None, "audio": None}])
def test_no_features_are_no_condition(nothing):
    assert make_condition(nothing, WIDTHS) is None


def test_rows_that_lack_a_modality_are_zeroed_even_if_they_hold_nan():
    image = torch.tensor([[1.0] * 6, [float("nan")] * 6])
    condition = make_condition({"image": (image, torch.tensor([True, False]))}, WIDTHS)
    assert torch.equal(condition.features["image"], torch.tensor([[1.0] * 6, [0.0] * 6]))
    assert condition.present["image"].tolist() == [True, False]


def test_copies():
    features = {"image": torch.randn(2, 6)}
    assert make_condition(features, WIDTHS, copies=3).copies_for(6) == 3
    free = make_condition(features, WIDTHS, copies=None)
    assert [free.copies_for(rows) for rows in (2, 4, 8)] == [1, 2, 4]
    for copies, batch in ((1, 4), (3, 2), (None, 3), (None, 1)):
        with pytest.raises(ModelError, match=f"features are those of 2 samples.*batch has {batch} rows"):
            make_condition(features, WIDTHS, copies).copies_for(batch)


def test_rows_follow_the_batch():
    image, mask = torch.randn(2, 6), torch.tensor([True, False])
    condition = make_condition({"image": (image, mask)}, WIDTHS, copies=2)
    spread = condition.for_batch(4)
    assert torch.equal(spread.features["image"], condition.features["image"][[0, 0, 1, 1]])
    assert spread.present["image"].tolist() == [True, True, False, False] and spread.samples == 4
    assert make_condition({"image": image}, WIDTHS).for_batch(2).samples == 2


def test_same_features_compares_contents():
    image = torch.randn(2, 6)
    mask = torch.tensor([True, False])
    one = make_condition({"image": (image, mask)}, WIDTHS)
    assert one.same_features(make_condition({"image": (image.clone(), mask.clone())}, WIDTHS))
    assert not one.same_features(make_condition({"image": image}, WIDTHS))
    assert not one.same_features(make_condition({"image": (image + 1, mask)}, WIDTHS))
    assert not one.same_features(make_condition({"image": (image, ~mask)}, WIDTHS))
    assert not one.same_features(make_condition({"audio": torch.randn(2, 3)}, WIDTHS))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"imagee": torch.randn(2, 6)}, "unknown modality 'imagee'.*did you mean 'image'"),
        ({"image": torch.randn(2, 5)}, r"shape \(2, 5\): give \(batch, 6\)"),
        ({"image": torch.randn(6)}, r"shape \(6,\): give \(batch, 6\)"),
        ({"image": torch.randn(2, 1, 6)}, r"shape \(2, 1, 6\)"),
        ({"image": torch.randn(0, 6)}, r"shape \(0, 6\)"),
        ({"image": torch.ones(2, 6, dtype=torch.long)}, "torch.int64: give a floating-point tensor"),
        ({"image": [[0.0] * 6]}, "list: give a floating-point tensor"),
        ({"image": torch.randn(2, 6), "audio": torch.randn(3, 3)}, "different numbers of samples"),
        ({"image": (torch.randn(2, 6), torch.tensor([True]))}, r"bool tensor of shape \(2,\)"),
        ({"image": (torch.randn(2, 6), torch.ones(2))}, r"bool tensor of shape \(2,\)"),
        (torch.randn(2, 6), "must be a mapping"),
    ],
)
def test_wrong_features_are_named_in_one_line(features, message):
    with pytest.raises(ModelError, match=message) as error:
        make_condition(features, WIDTHS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("copies", [0, -1, 2.0, "2", True])
def test_wrong_copies(copies):
    with pytest.raises(ModelError, match="copies="):
        make_condition({"image": torch.randn(2, 6)}, WIDTHS, copies)
