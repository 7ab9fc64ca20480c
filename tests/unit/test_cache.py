"""The feature cache: equal to what was computed, whole after an interruption, shared between processes."""

import numpy as np
import pytest

from mitrain.data.cache import FeatureCache

KEYS = [f"k{i}" for i in range(11)]


def item(key: str) -> dict[str, np.ndarray]:
    i = int(key[1:])
    return {"a": np.full((i % 3 + 1, 4), i / 7, np.float32), "b": np.arange(2, dtype=np.float32)[None] + i}


class Computer:
    def __init__(self, fail_at: str | None = None):
        self.seen, self.fail_at = [], fail_at

    def __call__(self, keys):
        if self.fail_at in keys:
            raise KeyboardInterrupt
        self.seen += keys
        return {key: item(key) for key in keys}


def open_cache(root, **identity):
    return FeatureCache(root, {"weights": "w", **identity}, {"a": "float32", "b": "float16"})


@pytest.mark.parametrize("kept", [True, False])
def test_values_come_back_and_are_computed_once(tmp_path, kept):
    cache, compute = open_cache(tmp_path if kept else None), Computer()
    assert cache.fill(KEYS + KEYS, compute, batch=4) == 11
    assert cache.fill(KEYS, compute) == 0 and sorted(compute.seen) == sorted(KEYS)
    for key in KEYS:
        np.testing.assert_array_equal(cache[key]["a"], item(key)["a"])
        assert cache[key]["b"].dtype == np.float16


def test_another_process_reads_what_was_published(tmp_path):
    open_cache(tmp_path).fill(KEYS, Computer())
    again = open_cache(tmp_path)
    assert all(key in again for key in KEYS)
    assert isinstance(again["k3"]["a"].base, np.memmap)


def test_identity_separates(tmp_path):
    open_cache(tmp_path).fill(KEYS, Computer())
    assert "k0" not in open_cache(tmp_path, layer=9)


def test_an_interruption_keeps_what_was_done(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        open_cache(tmp_path).fill(KEYS, Computer(fail_at="k8"), batch=4)
    again, compute = open_cache(tmp_path), Computer()
    assert again.fill(KEYS, compute) == 3 and compute.seen == ["k8", "k9", "k10"]


def test_a_damaged_segment_is_computed_again(tmp_path, caplog):
    cache = open_cache(tmp_path)
    cache.fill(KEYS, Computer())
    broken = next(cache.folder.glob("*/a.npy"))
    broken.write_bytes(broken.read_bytes()[:50])
    again = open_cache(tmp_path)
    assert "damaged" in caplog.text and "k0" not in again
    assert again.fill(KEYS, Computer()) == 11


def test_items_left_out_stay_missing(tmp_path):
    cache = open_cache(tmp_path)
    cache.fill(KEYS, lambda keys: {k: item(k) for k in keys if k != "k5"})
    assert "k5" not in cache and "k4" in cache


def test_two_writers_do_not_disturb_each_other(tmp_path):
    one, two = open_cache(tmp_path), open_cache(tmp_path)
    one.fill(KEYS[:8], Computer())
    two.fill(KEYS[4:], Computer())
    again = open_cache(tmp_path)
    for key in KEYS:
        np.testing.assert_array_equal(again[key]["a"], item(key)["a"])
