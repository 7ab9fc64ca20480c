"""Table, figures and page from rows alone."""

import base64
import io
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from mitrain.compare.page import page
from mitrain.compare.plots import plots, powers, ticks
from mitrain.compare.table import groups, table

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
    found = {"metric": "accuracy", "value": value, "controls": {"no-image": 0.25, "majority label": 0.1}}
    return {**place, **numbers, **found, "status": "ok", "reason": None, "reduced": None, **more}


def result(*rows, kind="train", title=""):
    return {"study": "s", "title": title, "kind": kind, "made": MADE, "rows": list(rows)}


def cells_of(text, method):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| label | {method}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_line_per_method_over_the_seeds():
    text = table(result(row("mit", 0, 0.5), row("mit", 1, 0.7), row("none", 0, 0.3)))
    assert cells_of(text, "mit") == [
        "label", "mit", "accuracy", "0.600 ± 0.141", "no-image 0.250, majority label 0.100", "1,000", "1 %", "2.0", "1.0",
        "12 ± 0", "2.5", "0.5", "2",
    ]  # fmt: skip
    assert cells_of(text, "none")[3] == "0.300" and cells_of(text, "none")[-1] == "1"
    assert "Made by `mitrain compare x.yaml` on 2026-01-02, commit abc, torch 2, M." in text


def test_failed_cells_and_reduced_size_are_told():
    lost = row("full", 1, None, status="too long", reason="not finished | after 240 s")
    text = table(
        result(
            row("full", 0),
            lost,
            row("none", 0, status="failed", reason="no `room` <b>"),
            row("pmf", reduced="60 steps"),
        )
    )
    assert cells_of(text, "full")[-1] == "1 of 2 (seed 1 too long: not finished / after 240 s)"
    assert "seed 0 failed: no 'room' &lt;b>" in cells_of(text, "none")
    assert cells_of(text, "pmf")[1] == "pmf †" and "† measured at reduced size: 60 steps." in text
    assert "†" not in cells_of(text, "full")[1]


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
        row(m, seed, trainable_parameters=n, step_ms=t)
        for m, n, t in (("a", 10**3, 5), ("b", 10**6, 50))
        for seed in (0, 1)
    ]
    curve = [row("mope", s, 0.1 * k, axis="experts", at=k, saved_bytes=k * 2**20) for k in (1, 2, 4) for s in (0, 1)]
    found = plots(result(*plain, *curve, row("c", status="failed", value=None, axis="experts", at=9)))
    assert set(found) == {"label-parameters", "label-memory", "label-time", "label-experts", "label-experts-saved"}
    for svg in found.values():
        ET.fromstring(svg)
    circles = list(ET.fromstring(found["label-experts"]).iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == 3 + 1, "three points and the legend's"
    places = [(float(c.get("cx")), float(c.get("cy"))) for c in circles[:3]]
    assert places == sorted(places) and [y for _, y in places] == sorted((y for _, y in places), reverse=True)
    across = [x for x, _ in places]
    assert (across[2] - across[1]) == pytest.approx(2 * (across[1] - across[0]), abs=0.3), (
        "4 is twice as far from 2 as 2 from 1"
    )


def test_a_method_that_trains_nothing_is_in_no_logarithmic_figure():
    assert "label-parameters" not in plots(result(row("none", trainable_parameters=0)))
    assert set(plots(result(row("none", trainable_parameters=0)))) == {"label-memory", "label-time"}


def test_axes_without_numbers_have_no_curve():
    assert not [name for name in plots(result(row("a", axis="depth", at="20-29"))) if "depth" in name]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.31, 0.32), (-5, 12345), (1e-9, 2e-9)])
def test_ticks_are_few_and_between(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7 and low <= found[0] and found[-1] <= high * (1 + 1e-12)


def test_powers_lie_between():
    assert powers(1e3, 1e6) == [1e3, 1e4, 1e5, 1e6]
    assert powers(3, 60) == [5, 10, 20, 50]
    assert powers(7, 8) == [7, 8]


def picture(ink):
    with io.BytesIO() as file:
        Image.new("RGB", (4, 4), ink).save(file, "JPEG")
        return base64.b64encode(file.getvalue()).decode()


def panel(sample, said, right, ink="red"):
    return {"sample": sample, "picture": picture(ink), "lines": [said], "right": right}


def test_the_page_shows_methods_side_by_side():
    predictions = {
        "x": {"task": "label", "method": "none", "panels": [panel("1", "a cat", False), panel("2", "a cow", True)]},
        "y": {"task": "label", "method": "mit", "panels": [panel("1", "a dog", True), panel("2", "a cow", True)]},
        "z": {"task": "label", "method": "gone", "panels": [panel("1", "stale", True)]},
    }
    made = page(result(row("mit", 0, 0.9), row("none", 0, 0.3), title="A study"), predictions, {"f": "<svg/>"})
    assert made.index("<th>mit<br>accuracy 0.900</th>") < made.index("<th>none<br>accuracy 0.300</th>")
    assert made.count("data:image/jpeg;base64,") == 2, "a shared picture stands once"
    assert made.index("a dog") < made.index("a cat") and "stale" not in made
    assert made.count('class="wrong"') == 1 and "<svg/>" in made and "http" not in made.replace("http-equiv", "")


def test_pictures_that_differ_stand_with_each_method():
    predictions = {
        "x": {"task": "label", "method": "none", "panels": [panel("1", "m", None, "red")]},
        "y": {"task": "label", "method": "mit", "panels": [panel("1", "m", None, "blue")]},
    }
    assert page(result(row("mit"), row("none")), predictions, {}).count("data:image") == 2


def test_nothing_in_the_page_is_taken_for_markup():
    bad = "<script>alert(1)</script>"
    cell = {"task": "label", "method": "mit", "panels": [{**panel(bad, bad, True), "picture": f'"onload="x{bad}'}]}
    made = page(result(row("mit", metric=bad), title=bad), {bad: cell}, plots(result(row("mit", metric=bad))))
    assert "<script" not in made and "onload" not in made and "&lt;script&gt;alert" in made
