"""``mitrain bench faults`` as a command: every fault of the short suite ends as it must."""

import json

from benchmarks.command import main


def test_the_short_suite_is_all_ok(tmp_path, capsys):
    code = main(["faults", "--quick", "--json", "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    rows = {row["fault"]: row for row in json.loads(captured.out)["rows"]}
    assert code == 0, captured.err
    assert len(rows) >= 12 and all(row["fired"] and row["ok"] for row in rows.values())
    assert rows["kill-in-a-step"]["resumed_equal"] and rows["kill-in-a-step"]["lost_steps"] == 1
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == list(rows.values())
