"""Table and figures from rows alone."""

import re
import xml.etree.ElementTree as ET

import pytest

from mitrain.compare.intervals import kept
from mitrain.compare.plots import plots
from mitrain.compare.table import groups, table

SVG = "{http://www.w3.org/2000/svg}"
MADE = {
    "command": "mitrain compare x.yaml",
    "date": "2026-01-02",
    "commit": "abc",
    "versions": "torch 2",
    "machine": "M",
}


def row(method, seed=0, value=0.5, **more):
    place = {"task": "label", "method": method, "axis": None, "at": None, "seed": seed}
    numbers = {
        "trainable_parameters": 1000, "share": 0.01, "peak_bytes": 2**21, "saved_bytes": 2**20, "step_ms": 12.4,
        "flops_per_sample": 2.5e9, "adapter_bytes": 2**19,
    }  # fmt: skip
    found = {"metric": "accuracy", "value": value, "controls": {"other-inputs": 0.25, "majority label": 0.1}}
    return {**place, **numbers, **found, "status": "ok", "reason": None, "reduced": None, **more}


def result(*rows, kind="train", title=""):
    return {"study": "s", "title": title, "kind": kind, "made": MADE, "rows": list(rows)}


def cells_of(text, method):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| label | {method}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_line_per_method_over_the_seeds():
    text = table(result(row("mit", 0, 0.5), row("mit", 1, 0.7), row("none", 0, 0.3)))
    assert cells_of(text, "mit") == [
        "label", "mit", "accuracy", "0.600 ± 0.141", "other-inputs 0.250, majority label 0.100", "1,000", "1 %", "2.0",
        "1.0", "12 ± 0", "2.5", "0.5", "2",
    ]  # fmt: skip
    assert cells_of(text, "none")[3] == "0.300" and cells_of(text, "none")[-1] == "1"
    assert "Made by `mitrain compare x.yaml` on 2026-01-02, commit abc, torch 2, M." in text


def test_outcomes_of_samples_give_intervals_and_differences():
    ids, spread = [str(i) for i in range(100)], [1.0] * 50 + [0.0] * 50
    more = {"outcomes": kept(ids, [1.0] * 60 + [0.0] * 40, 0.6)}, {"outcomes": kept(ids, spread, 0.5)}
    rows = row("mit", value=0.6, **more[0]), row("none", value=0.5, **more[1]), row("old", value=0.4)
    text = table({**result(*rows), "against": "none"})
    value, gain = cells_of(text, "mit")[3:5]
    assert re.fullmatch(r"0\.600 \[0\.[45]\d\d, 0\.[67]\d\d\]", value)
    assert re.fullmatch(r"\+0\.100 \[\+0\.0[45]\d, \+0\.1[56]\d\]", gain), "paired: of ten samples alone"
    assert cells_of(text, "none")[4] == "–" and cells_of(text, "old")[3:5] == ["0.400", "–"]
    assert "Δ none" in text and "± standard deviation over the seeds, where no sample's outcome was kept." in text
    assert "[95 % interval]" not in table(result(rows[2])) and "Δ" not in table(result(*rows))


def test_failed_cells_and_reduced_size_are_reported():
    lost = row("full", 1, None, status="too long", reason="not finished | after 240 s")
    text = table(
        result(
            row("full", 0),
            lost,
            row("none", 0, status="failed", reason="no `room` <b>"),
            row("pmf", reduced="60 steps"),
        )
    )
    assert cells_of(text, "full")[-1] == "1 of 2 (seed 1 too long: not finished &#124; after 240 s)"
    assert "seed 0 failed: no &#96;room&#96; &#60;b&#62;" in cells_of(text, "none")
    assert cells_of(text, "pmf")[1] == "pmf †" and "† measured at reduced size: 60 steps." in text
    assert "†" not in cells_of(text, "full")[1]


def test_cells_of_the_study_that_have_no_row_are_named():
    rows = result(row("mit"))
    assert "Not measured" not in table(rows) + table({**rows, "missing": []})
    text = table({**rows, "missing": ["label-vlora", "label-none"]})
    assert "Not measured yet: label-vlora, label-none." in text


def test_points_of_an_axis_are_lines_of_their_own():
    rows = [row("mope", seed, axis="experts", at=at) for at in (1, 1.0, True, "1") for seed in (0, 1)]
    assert [len(group) for group in groups(rows)] == [2, 2, 2, 2]
    assert "| label | mope, experts 1 |" in table(result(*rows[:2]))


def test_counted_rows():
    one = {"task": "refer", "method": "mit", "axis": "layers", "at": 8, "seed": None, "status": "ok", "reason": None,
           "reduced": None, "trainable_parameters": 170_136_482, "share": 0.0242, "method_macs": 4.7e11}  # fmt: skip
    text = table(result(one, {**one, "at": 9, "status": "failed", "reason": "no such layer"}, kind="count"))
    assert "| refer | mit, layers 8 | 170,136,482 | 2.42 % | 470.0 |" in text and "no such layer" in text
    assert plots(result(one, kind="count")) == {}


def test_a_figure_per_cost_and_per_axis():
    plain = [
        row(m, seed, trainable_parameters=n, step_ms=t) for m, n, t in (("a", 10**3, 5), ("b", 10**6, 50)) for seed in (0, 1)
    ]
    curve = [row("mope", s, 0.1 * k, axis="experts", at=k, saved_bytes=k * 2**20) for k in (1, 2, 4) for s in (0, 1)]
    found = plots(result(*plain, *curve, row("c", status="failed", value=None, axis="experts", at=9)))
    assert set(found) == {"label-parameters", "label-memory", "label-time", "label-experts", "label-experts-saved"}
    for svg in found.values():
        ET.fromstring(svg)
    across, up = zip(*marks(found["label-experts"]), strict=True)
    assert list(across) == sorted(across) and list(up) == sorted(up, reverse=True), "SVG counts from the top"
    assert across[2] - across[1] == pytest.approx(2 * (across[1] - across[0]), rel=1e-3), (
        "4 is twice as far from 2 as 2 from 1"
    )
    costs = marks(found["label-parameters"])
    assert len(costs) == 2 and {"a", "b"} <= set(re.findall(r">(\w+)</text>", found["label-parameters"]))


def marks(svg):
    """Where a figure has its points, the legend's left out."""
    root = ET.fromstring(svg)
    axes = next(group for group in root.iter(f"{SVG}g") if group.get("id") == "axes_1")
    groups = [group for group in axes if (group.get("id") or "").startswith("line2d")]
    return [(float(u.get("x")), float(u.get("y"))) for group in groups for u in group.iter(f"{SVG}use")]


def test_a_method_that_trains_nothing_is_in_no_logarithmic_figure():
    assert "label-parameters" not in plots(result(row("none", trainable_parameters=0)))
    assert set(plots(result(row("none", trainable_parameters=0)))) == {"label-memory", "label-time"}


def test_axes_without_numbers_have_no_curve():
    assert not [name for name in plots(result(row("a", axis="depth", at="20-29"))) if "depth" in name]


def test_nothing_in_a_figure_is_taken_for_markup_or_for_a_formula():
    (svg, *_) = plots(result(row("mit", metric="<b>$x$"))).values()
    assert "&lt;b&gt;$x$" in svg and "<b>" not in svg


def test_the_same_rows_give_the_same_figures():
    assert plots(result(row("mit"))) == plots(result(row("mit")))
