"""Layers by list, range, fraction and stride."""

import pytest

from mitrain.core.errors import ConfigError
from mitrain.methods.selection import parse_layers, select_layers


@pytest.mark.parametrize(
    ("spec", "depth", "expected"),
    [
        ([3, 1], 4, [1, 3]),
        ("all", 3, [0, 1, 2]),
        ("20-29", 30, list(range(20, 30))),
        ("2 - 3", 4, [2, 3]),
        ("13-17-21-25-29", 32, [13, 17, 21, 25, 29]),
        ("1, 3", 4, [1, 3]),
        ("2", 4, [2]),
        ("last third", 30, list(range(20, 30))),
        ("last third", 32, list(range(21, 32))),
        ("Last Third", 4, [3]),
        ("last quarter", 2, [1]),
        ("first half", 5, [0, 1]),
        ("last 2", 4, [2, 3]),
        ("first 1", 4, [0]),
        ("last 0.33", 30, list(range(20, 30))),
        ("first .5", 4, [0, 1]),
        ("last 1.0", 3, [0, 1, 2]),
        ("every 4", 32, [3, 7, 11, 15, 19, 23, 27, 31]),
        ("every 1", 3, [0, 1, 2]),
        ("every 3", 4, [0, 3]),
    ],
)
def test_what_a_spec_means(spec, depth, expected):
    assert parse_layers(spec) == spec
    assert select_layers(spec, depth) == expected


@pytest.mark.parametrize("spec", [[4], [0, 4], "3-4", "13-17-21", "1,9"])
def test_a_layer_that_does_not_exist_is_an_error_that_lists_the_layers_there_are(spec):
    with pytest.raises(ConfigError, match="this model has layers 0 to 3"):
        select_layers(spec, 4)


@pytest.mark.parametrize("spec", ["last 5", "first 9"])
def test_more_layers_than_there_are(spec):
    with pytest.raises(ConfigError, match="this model has layers 0 to 3"):
        select_layers(spec, 4)


@pytest.mark.parametrize(
    "spec",
    [
        *([], [1, 1], [-1], "1,1", "", "third", "last", "last word", "last 0", "last 0.0", "last 1.5", "last -1"),
        *("first 1e-1", "every 0", "every", "5-3", "0-99999999", "middle 3", "1-", "last third half"),
    ],
)
def test_a_malformed_spec_is_refused_before_any_model_is_known(spec):
    with pytest.raises(ConfigError, match="layers="):
        parse_layers(spec)


def test_a_stride_longer_than_the_model():
    assert parse_layers("every 5") == "every 5"
    with pytest.raises(ConfigError, match="stride"):
        select_layers("every 5", 4)
