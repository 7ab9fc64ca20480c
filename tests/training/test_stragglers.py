"""Stragglers: who is named, from the seconds that each rank spends before a step's collectives."""

import pytest

from mitrain.training import stragglers
from mitrain.training.stragglers import TIMES, Pace

EVEN = [[0.1, 2.0]] * 4
SLOW_DISK = [[0.1, 2.0], [0.1, 2.1], [4.1, 2.0], [0.1, 1.9]]
SLOW_CLOCK = [[0.1, 5.0], [0.1, 2.1], [0.1, 2.0], [0.1, 1.9]]


def pace(every: int = 10, lockstep: bool = False) -> Pace:
    made = Pace(every, lockstep)
    made.hosts = ["n1", "n1", "n2", "n2"]
    return made


def said(rows_of_reports, made=None) -> list[list[str]]:
    made = made or pace()
    return [made.stragglers(rows, 10 * (i + 1)) for i, rows in enumerate(rows_of_reports)]


def test_a_rank_that_stays_slow_is_named_once_with_its_host_and_what_it_waits_for():
    *before, third, fourth = said([SLOW_DISK] * (TIMES + 1))
    assert before == [[], []] and fourth == []
    assert third == [
        "rank 2 on n2 holds the others up: 4.10 s waiting for input in the 10 steps to 30, theirs is 0.10 s;"
        " look at what else runs there, and at its disk"
    ]
    (line,) = said([SLOW_CLOCK] * TIMES)[-1]
    assert line.startswith("rank 0 on n1 holds the others up: 5.00 s forward and backward in the 10 steps to 30")


def test_one_report_in_between_begins_the_count_anew():
    assert said([SLOW_DISK, SLOW_DISK, EVEN, SLOW_DISK, SLOW_DISK, EVEN]) == [[]] * 6
    assert [len(lines) for lines in said([SLOW_DISK] * 3 + [EVEN] + [SLOW_DISK] * 3)] == [0, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    "rows", [EVEN, [[0, 0.001], [0, 0.09], [0, 0.001], [0, 0.001]], [[0, 2.0], [0, 2.9], [0, 2.0], [0, 2.0]]]
)
def test_nobody_is_named_for_milliseconds_or_a_third(rows):
    assert said([rows] * 5) == [[]] * 5


def test_where_passes_hold_collectives_the_input_alone_tells():
    made = pace(lockstep=True)
    assert made.parts == ("input",)
    rows = [row[:1] for row in SLOW_DISK]
    assert len(said([rows] * TIMES, made)[-1]) == 1


def test_parts_add_up_and_one_process_reports_nothing(monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 7.0, 10.0, 10.5])
    monkeypatch.setattr(stragglers.time, "perf_counter", lambda: next(clock))
    made = Pace(1)
    for name in ("input", "compute", "input"):
        with made.part(name):
            pass
    assert made.spent == {"input": 1.5, "compute": 2.0}
    made.report(1)
    made.arrive()
    assert made.spent == {"input": 1.5, "compute": 2.0}
