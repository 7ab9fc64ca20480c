"""The parity matrix without its runs: its cells, what makes one red, the table, and going on after an interruption."""

import json
from dataclasses import asdict

import pytest

from benchmarks.command import main
from benchmarks.parity import cells, judge
from benchmarks.parity import run as parity
from benchmarks.parity.cells import EXACT, OURS, Cell, Plan
from benchmarks.parity.steps import Measured, permuted
from benchmarks.parity.table import COLUMNS, table
from mitrain.core.config import digest

PLAN = Plan("x.yaml", steps=2)
FOUND = {
    "loss": 2.0,
    "losses": [2.5, 2.1, 2.0],
    "resident_frozen_bytes_per_rank": 520,
    "whole_frozen_bytes": 1000,
    "gathered_bytes_per_step": 1000,
    "optimizer_bytes": 64,
    "step_ms": 3.0,
}


def row(cell: Cell, **changes) -> dict:
    return {**asdict(cell), **FOUND, **changes}


def verdicts(*rows: dict) -> list:
    return [r["ok"] for r in judge.judged(rows)]


def test_the_matrix_is_whole_and_each_cell_has_its_reference():
    full = cells.full()
    assert len({cell.name for cell in full}) == len(full)
    ours = {(c.zero, c.precision, c.ranks) for c in full if c.who == OURS}
    wanted = {(z, p, r) for z in (0, 1, 2, 3) for p in ("fp32", "bf16", "int8", "nf4") for r in (1, 2)}
    assert wanted | {(z, "int8-activations", r) for z, r in ((0, 1), (0, 2), (3, 2))} == ours
    assert {c.who for c in full} == {"ours", "bitsandbytes", "peft"}
    first = cells.urgent_first(full)
    assert all(first.index(cell.reference) <= first.index(cell) for cell in full)
    assert {c.precision for c in first[-16:]} == {"bf16"}, "the slowest come last"
    for precision in cells.NOISY:
        assert sum(c.zero == 0 and c.precision == precision and c.who == OURS for c in full) >= 3
    assert len(cells.quick()) == 8 and all(c.who == OURS and c in full for c in cells.quick())


def test_a_step_has_as_many_samples_however_it_is_cut():
    for cell in cells.full():
        values = dict(text.split("=") for text in Plan("x.yaml", batch=4).overrides(cell))
        assert int(values["train.batch"]) * int(values["train.accumulate"]) == 4
        assert int(values["train.batch"]) >= cell.ranks
        assert values["zero.stage"] == str(cell.zero)


def test_cells_are_chosen_by_their_names_and_fit_the_batch():
    assert {c.precision for c in cells.full(only=["ours-int8-zero", "ours-nf4"])} == {"int8", "nf4"}
    assert {c.ranks * c.accumulate for c in cells.full(batch=2)} == {1, 2}


def test_a_loss_off_by_more_than_the_tolerance_is_red():
    reference, sharded = row(Cell(OURS, "int8", 0, 1)), Cell(OURS, "int8", 3, 2)
    assert verdicts(reference, row(sharded, loss=2 * (1 + 0.9 * EXACT))) == [True, True]
    assert verdicts(reference, row(sharded, loss=2 * (1 - 1.1 * EXACT))) == [True, False]


def test_noisy_precisions_are_held_to_the_spread_of_unsharded_runs():
    losses = [2.0, 2.01, 1.99, 2.005, 1.985]
    runs = [Cell(OURS, "bf16", 0, 1), Cell(OURS, "bf16", 0, 2), *(Cell(OURS, "bf16", 0, 1, order=i) for i in (1, 2, 3))]
    unsharded = [row(cell, loss=loss) for cell, loss in zip(runs, losses, strict=True)]
    same = row(Cell(OURS, "bf16", 0, 1, 2), loss=2.01)  # adds in the same order as another: it says nothing new
    # s = 0.0103682, t(0.995, 4) = 4.604095 from a table: 4.604095 · √2 · 0.0103682 / 2
    allowed = 0.033754
    within, beyond = (row(Cell(OURS, "bf16", 2, 1), loss=2 * (1 + allowed * part)) for part in (0.999, 1.001))
    found = judge.judged([*unsharded, same, within, beyond])
    assert [r["ok"] for r in found] == [True] * 7 + [False]
    assert found[-1]["tolerance"] == pytest.approx(allowed, rel=1e-4)
    assert verdicts(*unsharded[:4], within)[-1] is False, "four runs have no spread"


def test_permuted_batches_hold_the_same_samples():
    draws = list("abcd")
    orders = {number: tuple(permuted(draws, number)) for number in (0, *cells.ORDERS["bf16"])}
    assert all(sorted(order) == draws for order in orders.values()) and orders[0] == tuple(draws)
    assert len(set(orders.values())) == len(orders) - 1, "1 and 3, which were measured first, are one"
    shares = {frozenset({order[:2], order[2:]}) for number, order in orders.items() if number in (0, *cells.SHARDED_ORDERS)}
    assert len(shares) == 1 + len(cells.SHARDED_ORDERS), "two ranks add in another order each time"


def test_the_batch_is_permuted_before_the_ranks_share_it(monkeypatch):
    taken = []
    monkeypatch.setattr(
        "mitrain.training.trainer.Trainer._accumulate", lambda self, draws, share: taken.extend(draws[share])
    )
    measured = object.__new__(Measured)
    measured.order = 7
    measured._accumulate(list("abcd"), slice(0, 2))
    assert taken == ["d", "b"]


def test_a_kept_cell_of_before_orders_is_still_known():
    cell = Cell(OURS, "bf16", 0, 1)
    assert PLAN.identity(cell) == digest({**asdict(PLAN), **{k: v for k, v in asdict(cell).items() if k != "order"}})
    assert PLAN.identity(Cell(OURS, "bf16", 0, 1, order=1)) != PLAN.identity(cell)


def test_a_rank_that_holds_too_much_is_red_at_stage_3_alone():
    reference = row(Cell(OURS, "nf4", 0, 1), resident_frozen_bytes_per_rank=1000)
    at_limit = row(Cell(OURS, "nf4", 3, 2), resident_frozen_bytes_per_rank=525)
    above = row(Cell(OURS, "nf4", 3, 2), resident_frozen_bytes_per_rank=526)
    assert verdicts(reference, at_limit, row(Cell(OURS, "nf4", 2, 2))) == [True, True, True]
    found = judge.judged([reference, above])
    assert [r["ok"] for r in found] == [True, False]
    assert judge.faults(found) == ["ours-nf4-zero3-ranks2: a rank holds 526 bytes, and 525 are allowed"]


def test_a_cell_that_failed_is_red_and_a_peer_is_not_judged():
    failed = {**asdict(Cell(OURS, "fp32", 1, 1)), "error": "no memory"}
    peer = {**asdict(Cell("peft", "fp32", 3, 2)), "error": "cannot | do that"}
    found = judge.judged([row(Cell(OURS, "fp32", 0, 1)), failed, peer])
    assert [r["ok"] for r in found] == [True, False, None]
    assert judge.faults(found) == ["ours-fp32-zero1-ranks1: no memory"]
    lost = judge.judged([{**asdict(Cell(OURS, "fp32", 0, 1)), "error": "no memory"}, row(Cell(OURS, "fp32", 0, 2))])
    assert judge.faults(lost)[1] == "ours-fp32-zero0-ranks2: its loss has nothing to be compared with"


class Bench:
    """Stands in for the ranks: counts what it is asked for; interrupts or fails at a cell."""

    def __init__(self, stops: Cell | None = None, fails: Cell | None = None):
        self.asked, self.stops, self.fails = [], stops, fails

    def __call__(self, cell: Cell, plan: Plan, limit_s: float) -> dict:
        if cell == self.stops:
            raise KeyboardInterrupt
        self.asked.append(cell)
        return {"error": "rank 1 fell"} if cell == self.fails else dict(FOUND)


def bench(out, measure, plan=PLAN, wanted=None):
    return parity.parity(plan, wanted or cells.quick(), out, "mitrain bench parity", lambda _: None, 9, measure)


def test_an_interrupted_matrix_goes_on_and_a_failed_cell_is_tried_again(tmp_path):
    wanted = cells.urgent_first(cells.quick())
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path, Bench(stops=wanted[3], fails=wanted[1]))
    (tmp_path / "rows" / f"{wanted[2].name}.json").write_text('{"torn')
    second = Bench()
    found = bench(tmp_path, second)
    assert second.asked == [*wanted[1:]]
    assert [cells.from_dict(r) for r in found["rows"]] == cells.quick()
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert not (tmp_path / "rows").exists()
    third = Bench()
    bench(tmp_path, third)
    assert third.asked == wanted, "a whole matrix is measured anew"


def test_cells_of_another_plan_are_not_taken_over(tmp_path):
    wanted = cells.urgent_first(cells.quick())
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path, Bench(stops=wanted[2]))
    other = Bench()
    bench(tmp_path, other, Plan("x.yaml", steps=3))
    assert other.asked == wanted


def test_everything_is_written_before_a_red_cell_ends_the_command_with_1(tmp_path):
    failing = cells.quick()[5]
    found = bench(tmp_path, Bench(fails=failing))
    text = (tmp_path / "table.md").read_text()
    assert "failed: rank 1 fell" in text and text.count("| ok |") == 7 and text.count("**out**") == 1
    with pytest.raises(parity.ParityError, match=f"1 of 8 cells are out: {failing.name}: rank 1 fell") as caught:
        parity.check(found)
    assert caught.value.exit_code == 1
    parity.check(bench(tmp_path, Bench()))


def test_the_table_shows_every_row_and_how_it_was_made(tmp_path):
    found = bench(tmp_path, Bench(), wanted=cells.full())
    lines = table(found["rows"], found["made"]).splitlines()
    body = [line for line in lines if line.startswith("| ") and "---" not in line][1:]
    assert len(body) == len(cells.full()) and all(line.count("|") == len(COLUMNS) + 1 for line in body)
    assert "| ours | int8 | 3 | 2 | 2.000000 | 0 | 1.0e-05 |" in "\n".join(body)
    assert lines[-1].startswith("Made by `mitrain bench parity` on ") and "deepspeed" in lines[-1]


def boom(cell: Cell, plan: Plan, out) -> None:
    raise RuntimeError(f"no luck with {cell.precision}")


def refuse(cell: Cell, plan: Plan, out) -> None:
    from mitrain.core.errors import ModelError

    raise ModelError("the model is gone: bring it back")


def hang(cell: Cell, plan: Plan, out) -> None:
    import time

    time.sleep(600)


@pytest.mark.parametrize(
    ("work", "seconds", "error"),
    [
        (boom, 300, "RuntimeError: no luck with fp32"),
        (refuse, 300, "the model is gone: bring it back"),
        (hang, 0.5, "no result after 0.5 s"),
    ],
)
def test_a_cell_whose_ranks_fail_says_why(work, seconds, error):
    assert parity.measured(Cell(OURS, "fp32", 3, 2), PLAN, seconds, work) == {"error": error}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--batch", "3"], "an even number of samples"),
        (["--only", "our-int8"], "names no cell"),
        (["--config", "configs/segment.yaml"], "give a configuration of answer"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_arguments_are_one_line_and_2(arguments, told, capsys):
    assert main(["parity", *arguments]) == 2
    said = capsys.readouterr()
    assert told in said.err and said.err.count("\n") == 1 and not said.out


def test_without_deepspeed_it_is_refused(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", None)
    assert main(["parity", "--quick"]) == 2
    assert "pip install 'mitrain[deepspeed]'" in capsys.readouterr().err
