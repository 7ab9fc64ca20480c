"""Each paper's claim on rows made up for it: what confirms it, what contradicts it, what does neither; and what it reads."""

from collections import defaultdict

import pytest
from source_tree import ROOT

from benchmarks.claims import CLAIMS, ledger
from benchmarks.claims.rows import Rows
from mitrain.compare import cells, study

STUDIES = ROOT / "configs" / "studies"
BY_ID = {claim.id: claim for claim in CLAIMS}
MIB = 2**20


def made(values, noise=0.0):
    """Rows of two seeds. ``values``: (method, axis, point) or a method → fields, or the field "value" alone; a method's
    name may begin with a task's and a slash. ``noise``: what the seeds' values lie from their mean."""
    found = []
    for index, (key, fields) in enumerate(values.items()):
        turn = (-1) ** index.bit_count()  # paired by seed, noise that is alike everywhere would be none
        name, axis, at = key if isinstance(key, tuple) else (key, None, None)
        task, method = name.split("/") if "/" in name else ("t", name)
        fields = fields if isinstance(fields, dict) else {"value": fields}
        for seed, sign in ((0, turn), (1, -turn)):
            row = {"task": task, "method": method, "axis": axis, "at": at, "seed": seed, "status": "ok", **fields}
            found.append(row | ({"value": row["value"] + sign * noise} if "value" in row else {}))
    return Rows(found)


def counted(name, point, axis, **fields):
    return {(name, axis, point): fields}


def m1(share):
    five = counted("mit", 5, "layers", trainable_parameters=15, backbone_parameters=1000)
    return five | counted("mit", 8, "layers", trainable_parameters=share, backbone_parameters=1.0)


def m2(tera, ratio=0.1):
    return {"mit": {"method_macs": tera * 1e12, "prepended_macs": tera * 1e12 / ratio}}


def m3(mit, prepended):
    sides = zip((224, 336, 448), mit, prepended, (1, 2, 3), strict=True)
    return {
        ("mit", "side", side): {"language_macs": one, "prepended_language_macs": other, "image_tokens": tokens}
        for side, one, other, tokens in sides
    }


def m4(llm, encoder):
    names = ("mit", "mit-no-gate", "mit-no-cosine")
    values = {f"llm/{name}": value for name, value in zip(names, llm, strict=True)}
    return values | {f"encoder/{name}": value for name, value in zip(names, encoder, strict=True)}


def p1(share):
    return counted("pmf", 2, "fusion_layers", share=share) | counted("pmf", 5, "fusion_layers", share=0.5)


def p2(saved, peak, full=100):
    rows = {("pmf", "fusion-layers", i): {"saved_bytes": s, "peak_bytes": peak} for i, s in enumerate(saved, 1)}
    return rows | {"pmf": {"saved_bytes": saved[1]}, "full": {"saved_bytes": 90, "peak_bytes": full}}


def p3(context, fusion_context, linear, sixteen=0.5):
    methods = {"pmf": 0.5, "pmf-no-context": context, "pmf-no-fusion-context": fusion_context, "pmf-linear": linear}
    return methods | {("pmf", "prompts", 4): 0.5, ("pmf", "prompts", 16): sixteen}


def p4(pmf, full, prompt):
    return {"pmf": pmf, "full": full, "prompt": prompt}


def c1(two, four, mope):
    def share(name, k, value):
        trained = {"adapter_parameters": value, "trainable_parameters": value}
        return counted(name, k, "experts", **trained, frozen_parameters=1.0)

    return share("cpt", 2, two) | share("cpt", 4, four) | share("mope", 4, mope)


def c2(experts, lengths):
    rows = {("mope", "experts", k): v for k, v in zip((1, 4, 8), experts, strict=True)}
    return rows | {("one-expert", "length", k): v for k, v in zip((6, 15, 27), lengths, strict=True)}


def c3(with_loss, without):
    usage = lambda value: {"usage": {"variation": value + 0.25, "variation_floor": 0.25, "top_share": 0.5}}  # noqa: E731
    return {"mope": usage(with_loss), "mope-no-importance": usage(without)}


def c4(tenth, whole):
    gaps = {("mope", "data", 0.1): 0.4 + tenth, ("mope", "data", 1.0): 0.4 + whole}
    return gaps | {("one-expert", "data", share): 0.4 for share in (0.1, 1.0)}


def c5(routed, static):
    permuted = lambda drop: {"value": 0.8, "controls": {"other-text": 0.8 - drop}}  # noqa: E731
    return {"routed": permuted(routed), "static": permuted(static), "mope": permuted(0.3)}


def a1(share):
    parts = {"modes.down.shared": share / 2, "modes.up.shared": share / 2}
    return counted("aurora", 64, "rank", parts=parts, adapter_parameters=1, backbone_parameters=1.0)


def a2(above_full, above_uniadapter=None):
    rows = {"aurora": 0.5, "full": 0.5 - above_full}
    return rows if above_uniadapter is None else rows | {"retrieve/uniadapter": 0.5 - above_uniadapter}


def a3(gqt, ice):
    return {"aurora": 0.5, "aurora-no-gqt": 0.5 - gqt, "aurora-no-ice": 0.5 - ice}


def a4(gap, ratio):
    return {
        "shared": {"value": 0.5, "adapter_parameters": 100},
        "per-modality": {"value": 0.5 + gap, "adapter_parameters": 100 * ratio},
    }


YES, NO, OPEN, BLANK = "confirmed", "contradicted", "not seen at this scale", "not tested"
CASES = [
    ("M1", YES, m1(0.0245)), ("M1", NO, m1(0.0244)), ("M1", NO, m1(0.0255)),
    ("M2", YES, m2(0.474)), ("M2", NO, m2(0.476)), ("M2", NO, m2(0.464)), ("M2", NO, m2(0.47, 0.13)),
    ("M3", YES, m3((1, 1, 1), (2, 3, 4))), ("M3", NO, m3((1, 1, 1.02), (2, 3, 4))), ("M3", NO, m3((1, 1, 1), (2, 3, 3))),
    ("M3", OPEN, m3((1, 1.005, 1), (2, 3, 4))), ("M3", OPEN, m3((1, 1, 1), (1, 2, 10))),
    ("M4", YES, m4((0.5, 0.4, 0.5), (0.5, 0.4, 0.5))), ("M4", NO, m4((0.5, 0.6, 0.5), (0.5, 0.6, 0.5))),
    ("M4", OPEN, m4((0.5, 0.4, 0.5), (0.5, 0.6, 0.5))), ("M4", OPEN, m4((0.5, 0.4, 0.6), (0.5, 0.4, 0.5))),
    ("P1", YES, p1(0.0299)), ("P1", NO, p1(0.03)),
    ("P2", YES, p2((1, 2, 3), 33.9)), ("P2", NO, p2((1, 2, 3), 34.1)), ("P2", NO, p2((1, 3, 2), 30)),
    ("P2", OPEN, p2((1, 2, 10), 30)),
    ("P3", YES, p3(0.4, 0.4, 0.4, 0.49)), ("P3", NO, p3(0.4, 0.6, 0.4)), ("P3", OPEN, p3(0.4, 0.5, 0.4)),
    ("P3", OPEN, p3(0.4, 0.4, 0.4, 0.6)),
    ("P4", YES, p4(0.5, 0.52, 0.4)), ("P4", NO, p4(0.5, 0.54, 0.4)), ("P4", NO, p4(0.5, 0.5, 0.51)),
    ("P4", OPEN, p4(0.5, 0.5, 0.5)),
    ("C1", YES, c1(0.007, 0.0065, 0.0075)), ("C1", NO, c1(0.0075, 0.0065, 0.008)), ("C1", NO, c1(0.007, 0.0064, 0.008)),
    ("C1", NO, c1(0.007, 0.0065, 0.0074)), ("C1", NO, c1(0.007, 0.0065, 0.0085)),
    ("C2", YES, c2((0.1, 0.2, 0.5), (0.3, 0.3, 0.4))), ("C2", NO, c2((0.5, 0.6, 0.4), (0.3, 0.3, 0.1))),
    ("C2", NO, c2((0.1, 0.2, 0.3), (0.1, 0.2, 0.4))), ("C2", OPEN, c2((0.1, 0.2, 0.3), (0.1, 0.2, 0.3))),
    ("C3", YES, c3(0.1, 0.2)), ("C3", NO, c3(0.11, 0.2)), ("C3", NO, c3(0.1, 0.09)), ("C3", OPEN, c3(0.05, 0.05)),
    ("C4", YES, c4(0.1, 0.2)), ("C4", NO, c4(0.2, 0.1)), ("C4", OPEN, c4(0.1, 0.1)),
    ("C5", YES, c5(0.2, 0.1)), ("C5", NO, c5(0.2, 0.3)), ("C5", NO, c5(-0.1, -0.2)), ("C5", OPEN, c5(0.2, 0.2)),
    ("A1", YES, a1(0.00044)), ("A1", NO, a1(0.00034)), ("A1", NO, a1(0.00045)),
    ("A2", YES, a2(0.1, 0.1)), ("A2", NO, a2(0.1, -0.1)), ("A2", NO, a2(-0.1)), ("A2", BLANK, a2(0.1)),
    ("A3", YES, a3(0.1, 0.1)), ("A3", NO, a3(0.1, -0.1)), ("A3", NO, a3(-0.1, 0.1)), ("A3", OPEN, a3(0.1, 0)),
    ("A4", YES, a4(0.019, 1.09)), ("A4", NO, a4(0.021, 0.91)), ("A4", OPEN, a4(0.019, 1.11)),
]  # fmt: skip


@pytest.mark.parametrize(("claim", "verdict", "values"), CASES, ids=[f"{claim}-{verdict}" for claim, verdict, _ in CASES])
def test_rows_decide_each_claim(claim, verdict, values):
    found, reason, _ = ledger.verdict(BY_ID[claim], made(values))
    assert found == verdict, reason


def test_every_claim_is_decided_both_ways_here():
    seen = defaultdict(set)
    for claim, verdict, _ in CASES:
        seen[claim].add(verdict)
    assert seen.keys() == BY_ID.keys() and all({YES, NO} <= verdicts for verdicts in seen.values())


@pytest.mark.parametrize(
    ("claim", "values"),
    [
        ("M4", m4((0.5, 0.49, 0.5), (0.5, 0.49, 0.5))), ("P3", p3(0.51, 0.49, 0.49)), ("P4", p4(0.5, 0.49, 0.49)),
        ("C2", c2((0.1, 0.1, 0.14), (0.1, 0.1, 0.1))), ("C4", c4(0.01, 0)), ("C5", c5(0.05, 0)),
        ("A3", a3(-0.01, 0.1)), ("A2", a2(-0.01, -0.01)),
    ],
)  # fmt: skip
def test_a_difference_within_the_noise_of_the_seeds_decides_nothing(claim, values):
    assert ledger.verdict(BY_ID[claim], made(values))[0] in (YES, NO), "decided where seeds agree"
    assert ledger.verdict(BY_ID[claim], made(values, noise=0.03))[0] == OPEN


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_claims_speak_of_cells_that_their_studies_have(claim):
    """With a row for every cell no claim is open for a row that cannot be there."""
    (job,) = ledger.jobs([claim], ROOT / "none", STUDIES)
    _, reason, measured = ledger.verdict(claim, Rows([full(row) for row in ledger.expected(job)]))
    assert measured and ("no row with" not in reason or "uniadapter" in reason), reason


def full(row):
    """A row in which every number is there."""

    class Everything(dict):
        def get(self, key, default=None):
            return super().get(key, 1.5 + (row["seed"] or 0) / 10)

    return Everything({**row, "status": "ok", "controls": Everything(), "usage": Everything(), "parts": Everything()})


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_study_is_read_and_its_cells_have_configurations(path):
    found = study.read(path)
    assert found.name == path.stem
    firsts = {(place.task, place.method, place.axis, repr(place.at)): place for place in reversed(cells.cell_ids(found))}
    for place in firsts.values():
        cells.resolve(found, path, place)
