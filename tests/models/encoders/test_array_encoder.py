"""Features of one's own are pooled as asked, and nothing else is done to them."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mitrain.core.errors import DataError
from mitrain.data.arrays import read_array
from mitrain.models.encoders import encoder_of
from mitrain.models.encoders.arrays import ArrayConfig, ArrayEncoder

ROWS = np.array([[1, 5, 3], [4, 2, 0]], np.float32)


@pytest.mark.parametrize(
    ("pool", "expected"),
    [("mean", [2.5, 3.5, 1.5]), ("mean+std", [2.5, 3.5, 1.5, 1.5, 1.5, 1.5]), ("max", [4, 5, 3]), ("last", [4, 2, 0])],
)
def test_rows_are_pooled(tmp_path, pool, expected):
    np.save(tmp_path / "a.npy", ROWS)
    np.save(tmp_path / "b.npy", ROWS[0])
    found = encoder_of(ArrayConfig(width=3, pool=pool), None)
    assert isinstance(found, ArrayEncoder) and found.width == len(expected)
    items = [found.preprocess(read_array(tmp_path, name, width=3)) for name in ("a.npy", "b.npy")]
    pooled = found.encode(items, [0, 0])["pooled"]
    single = [1, 5, 3, 0, 0, 0] if pool == "mean+std" else [1, 5, 3]
    torch.testing.assert_close(pooled, torch.tensor([expected, single], dtype=torch.float32))


def test_means_are_right_of_many_large_numbers(tmp_path):
    values = (1e4 + np.random.default_rng(0).standard_normal((5000, 2))).astype(np.float32)
    np.save(tmp_path / "a.npy", values)
    found = ArrayEncoder(ArrayConfig(width=2, pool="mean+std"))
    exact = values.astype(np.float64)
    expected = np.concatenate([exact.mean(0), exact.std(0)]).astype(np.float32)
    np.testing.assert_array_equal(found.preprocess(read_array(tmp_path, "a.npy")).numpy(), expected)


def test_another_width_is_one_line_and_none_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", ROWS)
    with pytest.raises(DataError, match="'a.npy' .* has 3 numbers in a row, not width=4"):
        read_array(tmp_path, "a.npy", width=4)
    with pytest.raises(ValidationError, match="width"):
        ArrayConfig()


def test_the_identity_is_the_pooling():
    identities = [ArrayEncoder(ArrayConfig(width=w, pool=p)).identity() for w in (3, 4) for p in ("mean", "max")]
    assert all(identities.count(identity) == 1 for identity in identities)
    assert ArrayEncoder(ArrayConfig(width=3)).base() == ArrayEncoder(ArrayConfig(width=3, name="other")).base()
