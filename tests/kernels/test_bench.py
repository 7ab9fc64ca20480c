"""The benchmarks: nothing wrong is timed, rows say what they must, tables come from CSV files alone."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench import cases, command, gate, measure, providers, report, results, rounds, worker
from bench.rounds import Measurement, Record

ROOT = Path(__file__).parents[2]
TINY = cases.attention(2, 4, 2, 9, 8)
ROW = ("op", "provider", "mode", "shape", "median_ms", "ratio_to_plain", "saved_bytes", "peak_bytes")
OWN = '''
import torch
from mitrain_kernels.infused_attention import infused_attention_folded


class Scale(torch.autograd.Function):
    """One, with a gradient of two percent too much."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.02 * grad


def right(**given):
    return infused_attention_folded(**given)


def wrong_output(**given):
    return 1.001 * infused_attention_folded(**given)


def wrong_gradient(head_logit, **given):
    return infused_attention_folded(head_logit=Scale.apply(head_logit), **given)


def no_gradient(v_add, **given):
    return infused_attention_folded(v_add=v_add.detach(), **given)


def nan(**given):
    return infused_attention_folded(**given).log()


def raises(**given):
    raise RuntimeError("out of order")


def refuses(**given):
    raise ValueError("this backend cannot do this: too odd")
'''


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN, encoding="utf-8")
    return lambda function: f"{path}:{function}"


def faults(name, case=TINY):
    return gate.check(providers.make_provider(name, case, "cpu"), case, "cpu")


@pytest.mark.parametrize(
    "case",
    [TINY, replace(TINY, modalities=3), replace(TINY, padded=True), replace(TINY, queries=1)],
    ids=["usual", "modalities", "padded", "decode"],
)
@pytest.mark.parametrize("name", ["plain", "eager", "reference", "sdpa"])
def test_right_attention_passes_the_gate(name, case):
    assert faults(name, case) == []


@pytest.mark.parametrize("name", ["plain", "eager", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_swiglu_passes_the_gate(name, dtype):
    assert faults(name, cases.swiglu(2, 7, 12, dtype=dtype)) == []


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("wrong_output", "output is off by"),
        ("wrong_gradient", "head_logit is off by"),
        ("no_gradient", "v_add is off by"),
        ("nan", "output is off by nan"),
    ],
)
def test_wrong_providers_are_red(own, function, said):
    assert any(fault.startswith(said) for fault in faults(own(function)))
    assert faults(own("right")) == []


def test_the_large_truth_is_held_against_the_definition(monkeypatch):
    monkeypatch.setattr(gate, "DEFINITION_LIMIT", 0)
    assert faults("sdpa") == faults("eager") == []
    twisted = lambda *args, **named: 1.0001 * gate.infused_attention_reference(*args, **named)  # noqa: E731
    monkeypatch.setattr(gate, "infused_attention_folded", twisted)
    assert any("from the definition" in fault for fault in faults("sdpa"))


def test_what_is_weighed():
    case = cases.attention(1, 2, 1, 32, 16)
    weights = {
        name: measure.Subject(providers.make_provider(name, case, "cpu"), case, "cpu").memory()
        for name in ("plain", "eager")
    }
    query, key = 4 * 2 * 32 * 16, 4 * 32 * 16
    logsumexp = 4 * 2 * 32
    assert weights["plain"]["saved_bytes"] == 2 * query + 2 * key + logsumexp
    assert weights["eager"]["saved_bytes"] > 2 * weights["plain"]["saved_bytes"]
    peaks = weights["plain"]["peak_bytes"]
    assert peaks["forward"] >= query + logsumexp and peaks["backward"] >= query + 2 * key
    assert peaks["both"] >= peaks["backward"] + query


def test_tensors_kept_on_ctx_are_weighed():
    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.kept = [torch.zeros(100)]
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            return grad

    case = cases.swiglu(1, 2, 3)
    subject = measure.Subject(providers.Provider(lambda gate: Keeps.apply(gate), ("gate",), "off"), case, "cpu")
    assert subject.saved_bytes() == 400


def filled(times, **options):
    record = Record(memory={"saved_bytes": 10, "peak_bytes": dict.fromkeys(cases.MODES, 5)}, **options)
    for mode in cases.MODES:
        record.samples[mode] = times
    return record


def found(**options):
    records = {(0, "plain"): filled([[1.0, 1.0], [4.0, 4.0], [1.0, 1.0]])}
    records[0, "sdpa"] = filled([[1.1, 1.1], [4.4, 4.4], [1.4, 1.4]], **options)
    return Measurement([TINY], [], records)


def test_ratio_is_the_median_over_rounds():
    row = next(row for row in results.rows(found(), "cpu") if row["provider"] == "sdpa")
    assert set(ROW) <= set(row) <= set(results.COLUMNS)
    assert row["ratio_to_plain"] == pytest.approx(1.1) and row["ratio_of_medians"] == pytest.approx(1.4)
    assert row["rounds"] == 3 and row["samples"] == 6 and row["q20_ms"] <= row["median_ms"] <= row["q80_ms"]


def test_a_red_provider_has_no_row():
    red = found(faults=["output is off"])
    assert {row["provider"] for row in results.rows(red, "cpu")} == {"plain"}
    assert red.red[0]["provider"] == "sdpa"
    baseline = found()
    baseline.records[0, "plain"].faults.append("output is off")
    assert all(row["ratio_to_plain"] is None for row in results.rows(baseline, "cpu"))


def test_csv_round_trip_table_and_figure(tmp_path):
    made = results.rows(found(), "cpu")
    (path,) = results.write_results(made, "cpu", tmp_path)
    assert path.name == "infused_attention-cpu.csv"
    back = results.read_csv(path)
    for row, read in zip(made, back, strict=True):
        assert {k: v for k, v in row.items() if not isinstance(v, float)} == {
            k: v for k, v in read.items() if not isinstance(v, float)
        }
        assert read["median_ms"] == pytest.approx(row["median_ms"], rel=1e-4)
    assert report.write_reports(tmp_path) == 0
    table = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "| B=2 H=4 G=2 T=9 d=8 | sdpa | 1.4 (1.1–4.4) | 1.10 |" in table and "× 1.00" in table
    assert results.commit() in table and torch.__version__ in table
    assert ">sdpa</text>" in path.with_suffix(".svg").read_text(encoding="utf-8")


def test_the_readme_block_is_replaced(tmp_path):
    page, shown = tmp_path / "docs" / "page.md", tmp_path / "a.md"
    page.parent.mkdir()
    page.write_text("x\n<!-- results: a.md -->\nold\n<!-- end -->\ny\n", encoding="utf-8")
    shown.write_text("new\n", encoding="utf-8")
    report.into_page(shown, page, tmp_path)
    assert page.read_text(encoding="utf-8") == "x\n<!-- results: a.md -->\nnew\n<!-- end -->\ny\n"


def test_no_results_is_said(tmp_path, capsys):
    assert command.main(["--report", "--out", str(tmp_path)]) == 2
    assert "measure first" in capsys.readouterr().err


@pytest.mark.parametrize(
    "mistake", [["--shape", "B=1"], ["--op", "infused_swiglu", "--shape", "B=1,T=x"], ["--rounds", "0"], ["--op", "x"]]
)
def test_mistakes_end_in_exit_code_2(mistake):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--device", "cpu", *mistake])
    assert stopped.value.code == 2


def test_cases_and_providers_that_do_not_fit_are_said():
    plan = rounds.Plan(cases.cases_for("infused_attention", "cpu"), None, "cpu", quick=False)
    whys = {(note["provider"], note["why"]) for note in plan.left_out}
    assert ("triton", "needs a GPU") in whys
    assert any(name == "reference" and "GiB" in why for name, why in whys)
    assert all(names[0] == "plain" and "sdpa" in names for names in plan.members.values())
    sizes = {cases.shape_text(case.shape) for case in plan.cases}
    assert {"B=4 H=9 G=3 T=128 d=64", "B=4 H=9 G=3 T=512 d=64", "B=1 H=32 G=32 T=1024 d=128"} <= sizes


def test_a_measurement_from_end_to_end(tmp_path):
    shape = ["--op", "infused_attention", "--shape", "B=1,H=2,G=1,T=16,d=8", "--rounds", "1", "--samples", "2"]
    command = [sys.executable, ROOT / "kernels" / "bench", "--device", "cpu", *shape, "--providers", "sdpa"]
    done = subprocess.run([*command, "--quick", "--json", "--out", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    rows = {(row["provider"], row["mode"]): row for row in printed["rows"]}
    assert set(rows) == {(name, mode) for name in ("plain", "sdpa") for mode in cases.MODES}
    for row in rows.values():
        assert set(ROW) <= set(row) and row["shape"] == {"B": 1, "H": 2, "G": 1, "T": 16, "d": 8}
        assert row["median_ms"] > 0 and row["ratio_to_plain"] > 0 and row["saved_bytes"] > 0 and row["peak_bytes"] > 0
    assert rows["plain", "both"]["ratio_to_plain"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["infused_attention-cpu.csv"]


class LocalWorker(worker.Desk):
    """A worker without a process."""

    def __init__(self, device, bytecode):
        super().__init__(device)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def ask(self, **request):
        return self.answer(**json.loads(json.dumps(request)))


def test_a_red_gate_ends_in_exit_code_1_without_a_time(own, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rounds, "Worker", LocalWorker)
    names = ["sdpa", own("wrong_output"), own("raises"), own("refuses")]
    shape = ["--op", "infused_attention", "--shape", "B=1,H=2,G=1,T=16,d=8", "--rounds", "2", "--samples", "2"]
    call = ["--device", "cpu", *shape, "--providers", ",".join(names), "--json", "--out", str(tmp_path / "out")]
    assert command.main(call) == 1
    printed, said = capsys.readouterr()
    printed = json.loads(printed)
    assert {row["provider"] for row in printed["rows"]} == {"plain", "sdpa"}
    red = {one["provider"]: one["faults"] for one in printed["red"]}
    assert set(red) == set(names[1:3])
    assert "output is off by" in red[names[1]][0] and "out of order" in red[names[2]][0]
    assert any(note["provider"] == names[3] and "cannot do this" in note["why"] for note in printed["left_out"])
    assert said.count("no time is reported") == 2 and not (tmp_path / "out").exists()


def test_a_worker_that_died_is_a_fault(tmp_path):
    with worker.Worker("cpu", tmp_path) as dead:
        dead.process.kill()
        assert "ended with code -9" in dead.ask(do="ready")["error"]
        assert "ended with code -9" in dead.ask(do="ready")["error"]


def test_the_table_names_the_command_that_measures_it_again():
    rows = [{"op": "infused_swiglu", "provider": p, "rounds": "3", "samples": "18"} for p in ("plain", "torch", "plain")]
    options = "--op infused_swiglu --providers plain,torch --rounds 3 --samples 6"
    assert report.command(rows) == f"python kernels/bench {options}"
