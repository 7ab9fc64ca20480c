"""An epoch sees every row and forgets it again; the verdict on its memory."""

import json

import pytest

from benchmarks import stream
from benchmarks.command import main
from mitrain.data.encoded import InputFeatures


def test_an_epoch_sees_every_row_and_holds_a_block(monkeypatch, tmp_path):
    known = []
    learn = InputFeatures._learn
    monkeypatch.setattr(InputFeatures, "_learn", lambda self, *a: (learn(self, *a), known.append(len(self._keys))))
    monkeypatch.setattr(stream, "BUFFER", 30)
    monkeypatch.setattr(stream, "BATCH", 8)
    stream.written(tmp_path, 200)
    found = stream.epoch(str(tmp_path))
    assert found["rows"] == 200 and found["sum"] != 0
    assert 30 <= max(known) <= 30 + 8  # a block, and what a batch still has of the one before


def test_an_epoch_decodes_a_row_once_as_far_as_a_block_may_be_held(monkeypatch, tmp_path):
    """160 rows in blocks of 32, of which all or 16 stay decoded; the next epoch's first block is looked at, too."""
    read, look = [], InputFeatures._look
    monkeypatch.setattr(InputFeatures, "_look", lambda self, file: (read.append(file), look(self, file))[1])
    monkeypatch.setattr(stream, "BUFFER", 32)
    monkeypatch.setattr(stream, "BATCH", 8)
    stream.written(tmp_path, 160)
    sums, counts = [], []
    for held in (1 << 26, 16 * 4 * stream.WIDTH):
        monkeypatch.setattr("mitrain.data.encoded.HELD", held)
        sums.append(stream.epoch(str(tmp_path))["sum"])
        counts.append(len(read))
        read.clear()
    assert sums[0] == sums[1] != 0
    assert counts == [160 + 32, 160 + 32 + 5 * 16]


def test_rows_are_measured_in_a_process_of_their_own_and_written(capsys, tmp_path):
    assert main(["stream", "--rows", "40", "--json", "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert [row["rows"] for row in found["rows"]] == [40] and "| 40 |" in (tmp_path / "table.md").read_text()


def test_above_the_limit_is_an_error_after_everything_is_written(monkeypatch, capsys, tmp_path):
    found = {"made": {}, "rows": [{"rows": 9, "bytes": 1, "peak": 501e6, "seconds": 2.0}]}
    monkeypatch.setattr(stream, "measured", lambda *_, **__: found)
    monkeypatch.setattr(stream, "sentence", lambda made: "")
    assert main(["stream", "--out", str(tmp_path)]) == 1
    assert "9 rows holds 501 MB, 500 allowed" in capsys.readouterr().err
    assert "above 500 MB" in (tmp_path / "table.md").read_text()
    stream.check({**found, "rows": [{**found["rows"][0], "peak": 500e6}]})


@pytest.mark.parametrize("rows", ["0", "-3", "9"])
def test_no_rows_are_one_line(rows, capsys):
    assert main(["stream", "--rows", rows]) == 2
    assert capsys.readouterr().err.count("\n") == 1
