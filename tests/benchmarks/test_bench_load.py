"""Tracked bytes, and the verdict on a load."""

import gc

import pytest
import torch

from benchmarks import load

MIB = 2**20


def test_what_lives_at_the_same_time_is_counted_once_and_views_not_at_all():
    before = torch.ones(MIB // 4)
    with load.Tracked() as tracked:
        first = before * 2  # 1 MiB
        second = torch.cat([first, first])  # 2 MiB
        views = [first[:10], second.view(2, -1), before.t(), first.detach()]
        assert tracked.now == tracked.peak == 3 * MIB
        del first, views[0], views[-1]
        gc.collect()
        assert (tracked.now, tracked.peak) == (2 * MIB, 3 * MIB)
        third = second.to(torch.float64)  # 4 MiB
        third.add_(1)
        assert (tracked.now, tracked.peak) == (6 * MIB, 6 * MIB)


def row(**changes) -> dict:
    return {"precision": "int8", "rank": 1, "peak": 9, "shards": 5, "layer": 3, "limit": 10, "ok": True, **changes}


def test_a_peak_above_the_limit_is_an_error_after_everything_is_written(tmp_path):
    found = {"model_bytes": 10, "ranks": 2, "rows": [row(), row(rank=0, peak=11, ok=False)]}
    load.write(found, tmp_path, "mitrain bench load")
    assert "| int8 | 0 |" in (tmp_path / "table.md").read_text() and "above" in (tmp_path / "table.md").read_text()
    with pytest.raises(load.LoadError, match="int8 rank 0") as caught:
        load.check(found)
    assert caught.value.exit_code == 1
    load.check({**found, "rows": [row()]})


def test_a_layer_is_the_largest_unit_in_float32(tmp_path):
    shape = {**load.SHAPE, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 300}
    size = load.make_model(tmp_path, {**shape, "num_attention_heads": 2, "num_key_value_heads": 1})
    layer = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16
    assert size == 4 * (2 * 300 * 16 + 2 * layer + 16)
    assert load.largest_layer(tmp_path) == 4 * 300 * 16
