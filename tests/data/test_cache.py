"""The feature cache: equal to what was computed, whole after an interruption, shared between processes."""

import io
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from mitrain.core import dist
from mitrain.core.errors import DataError, ModelError
from mitrain.data import cache as cache_module
from mitrain.data import segments
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
        np.testing.assert_array_equal(cache.get(key)["a"], item(key)["a"])
        assert cache.get(key)["b"].dtype == np.float16


def test_transposed_arrays_come_back_and_are_no_damage(tmp_path, caplog):
    """As a convolution's output is, the states that enter an audio encoder's first layer; one item, and two."""
    transposed = {key: {**item(key), "a": np.arange(12, dtype=np.float32).reshape(4, 3).T} for key in KEYS[:3]}
    cache = open_cache(tmp_path)
    for keys in (KEYS[:1], KEYS[1:3]):
        cache.fill(keys, lambda keys: {key: transposed[key] for key in keys})
    again = open_cache(tmp_path)
    for key, value in transposed.items():
        np.testing.assert_array_equal(again.get(key)["a"], value["a"])
    assert not caplog.records


def test_another_process_reads_what_was_published(tmp_path):
    open_cache(tmp_path).fill(KEYS, Computer())
    again = open_cache(tmp_path)
    assert all(key in again for key in KEYS)
    assert again.fill(KEYS, Computer()) == 0


def test_identity_separates(tmp_path):
    open_cache(tmp_path).fill(KEYS, Computer())
    assert "k0" not in open_cache(tmp_path, layer=9)


def test_an_interruption_keeps_what_was_done(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        open_cache(tmp_path).fill(KEYS, Computer(fail_at="k8"), batch=4)
    again, compute = open_cache(tmp_path), Computer()
    assert again.fill(KEYS, compute) == 3 and compute.seen == ["k8", "k9", "k10"]


def halved(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def moved(path):
    np.save(path, np.roll(np.load(path), 1, axis=0))


def without_numbers(path):
    np.save(path, np.full_like(np.load(path), np.nan))


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def beyond(path):
    """A whole index that places an item behind the end of its file."""
    content = path.read_bytes()[: -segments.CRC]
    table = np.load(io.BytesIO(content))
    table["first a"][4] = 1 << 40
    with io.BytesIO() as file:
        np.save(file, table)
        content = file.getvalue()
    path.write_bytes(content + zlib.crc32(content).to_bytes(segments.CRC, "little"))


DAMAGES = [(change, "a.npy") for change in (halved, moved, without_numbers, flipped, Path.unlink)]
DAMAGES += [(change, "index.bin") for change in (halved, flipped, beyond)]


def all_right(cache) -> bool:
    stored = {key: cache.rounded(item(key)) for key in KEYS}
    return all(np.array_equal(cache.get(key)[name], stored[key][name]) for key in KEYS for name in "ab")


@pytest.mark.parametrize(("change", "name"), DAMAGES)
def test_a_damaged_segment_is_named_once_and_computed_again(tmp_path, caplog, change, name):
    (segment,) = open_cache_with_all(tmp_path).folder.glob("*/")
    change(segment / name)
    again, compute = open_cache(tmp_path), Computer()
    again.fill(KEYS, compute)
    for _ in range(2):
        assert equal(again, again.read(KEYS, compute))
    assert sorted(compute.seen) == sorted(KEYS)
    assert [record.message.count("is damaged") for record in caplog.records] == [1]
    caplog.clear()
    later = open_cache(tmp_path)
    later.fill(KEYS, Computer())
    assert open_cache(tmp_path).fill(KEYS, Computer()) == 0 and all_right(later) and not caplog.records


def equal(cache, items) -> bool:
    return all(np.array_equal(found["a"], item(key)["a"]) for key, found in zip(KEYS, items, strict=True))


def test_nothing_that_is_there_is_read_before_it_is_asked_for(tmp_path, monkeypatch):
    open_cache_with_all(tmp_path)
    monkeypatch.setattr(cache_module, "read_item", lambda *_: pytest.fail("read"))
    assert open_cache(tmp_path).fill(KEYS, Computer()) == 0


def test_ranks_that_hold_the_weights_together_look_for_damage_before_they_need_them(tmp_path, monkeypatch):
    flipped(next(open_cache_with_all(tmp_path).folder.glob("*/a.npy")))
    monkeypatch.setattr(dist, "world", lambda: 2)
    assert open_cache(tmp_path).missing(KEYS) == []
    assert open_cache(tmp_path).missing(KEYS, together=True) == KEYS


def test_of_a_damaged_cache_no_more_is_held_than_of_a_segment(tmp_path, monkeypatch):
    flipped(next(open_cache_with_all(tmp_path).folder.glob("*/a.npy")))
    monkeypatch.setattr(cache_module, "SEGMENT_ITEMS", 3)
    again, compute = open_cache(tmp_path), Computer()
    for key in ["k10", *KEYS, *KEYS]:
        again.read([key], compute)
    assert compute.seen == ["k10", *KEYS[:10], *KEYS[2:10]]


def open_cache_with_all(root):
    cache = open_cache(root)
    cache.fill(KEYS, Computer())
    return cache


@pytest.mark.parametrize(("change", "name"), [damage for damage in DAMAGES if damage[1] == "a.npy"])
def test_damage_to_what_a_process_reads_from_is_noticed_and_computed(tmp_path, caplog, change, name):
    cache, compute = open_cache_with_all(tmp_path), Computer()
    cache.get("k0")
    change(next(cache.folder.glob(f"*/{name}")))
    found = cache.read(["k10", "k2", "k10"], compute)
    for key, values in zip(("k10", "k2", "k10"), found, strict=True):
        np.testing.assert_array_equal(values["a"], item(key)["a"])
    deleted_under_a_reader = change is Path.unlink  # whoever has it open keeps it
    assert compute.seen == ([] if deleted_under_a_reader else ["k10", "k2"])
    assert len(caplog.records) == (0 if deleted_under_a_reader else 1)


def test_a_sound_copy_of_an_item_is_taken_where_another_is_damaged(tmp_path, caplog):
    one, two = open_cache(tmp_path), open_cache(tmp_path)
    one.fill(KEYS, Computer())
    flipped(next(one.folder.glob("*/a.npy")))
    two.fill(KEYS, Computer())
    again = open_cache(tmp_path)
    assert again.fill(KEYS, Computer()) == 0 and all_right(again)


def test_what_cannot_be_opened_for_now_is_not_deleted(tmp_path, monkeypatch):
    cache = open_cache_with_all(tmp_path)

    def refuse(*_):
        raise OSError(24, "Too many open files")

    segments.opened.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(segments.os, "open", refuse)
        assert cache.get("k0") is None
    assert open_cache(tmp_path).fill(KEYS, Computer()) == 0


def test_more_segments_than_files_are_held_open(tmp_path):
    cache, compute = open_cache(tmp_path), Computer()
    for key in KEYS:
        cache.fill([key], compute)
    assert all_right(cache) and len(list(cache.folder.glob("*/index.bin"))) == 11
    segments.opened.cache_clear()
    before = len(os.listdir("/proc/self/fd"))
    assert all_right(cache)
    assert len(os.listdir("/proc/self/fd")) - before <= segments.OPEN_FILES
    segments.opened.cache_clear()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_values_that_are_not_finite_as_they_are_kept_are_refused(tmp_path, value):
    cache = open_cache(tmp_path)
    with pytest.raises(ModelError, match="b are not finite in float16"):
        cache.fill(["k0"], lambda keys: {k: {**item(k), "b": np.full((1, 2), value, np.float32)} for k in keys})
    assert not list(cache.folder.glob("*/index.bin"))


def test_ranks_that_hold_the_weights_together_do_not_compute_alone(tmp_path, monkeypatch):
    cache = open_cache_with_all(tmp_path)
    flipped(next(cache.folder.glob("*/a.npy")))
    monkeypatch.setattr(dist, "world", lambda: 2)
    with pytest.raises(DataError, match="damaged while the ranks were reading it: resume"):
        cache.read(["k10"], lambda keys: pytest.fail("computed by one rank"), together=True)


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
        np.testing.assert_array_equal(again.get(key)["a"], item(key)["a"])
