"""The schedule: rounds of fresh processes, one per provider; within a round the workers are asked in turn.

For every case: first the gate (in the first round; a provider that fails it is never timed on that case), then passes
in which each worker gives one timed sample per mode. The order shifts by one from pass to pass. Before each sample the
parent waits a moment, so that the last worker's threads are asleep.
"""

import contextlib
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import providers
from bench.cases import Case
from bench.worker import Worker

PAUSE = 0.004


@dataclass
class Record:
    """What one provider showed on one case: samples per mode and round, bytes, faults of the gate."""

    samples: dict[str, list[list[float]]] = field(default_factory=lambda: defaultdict(list))
    memory: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    refused: str = ""


@dataclass
class Measurement:
    """Records by position of the case and name of the provider."""

    cases: list[Case]
    left_out: list[dict[str, str]]
    records: dict[tuple[int, str], Record] = field(default_factory=lambda: defaultdict(Record))

    @property
    def red(self) -> list[dict[str, Any]]:
        found = ((self.cases[i], name, record.faults) for (i, name), record in self.records.items() if record.faults)
        return [{"op": c.op, "provider": name, "case": str(c), "faults": faults} for c, name, faults in found]


class Plan:
    """Which providers measure which cases, and why the others do not."""

    def __init__(self, cases: Sequence[Case], wanted: str | None, device: str, quick: bool):
        self.cases, self.device = list(cases), device
        self.members: dict[int, list[str]] = {}
        self.left_out: list[dict[str, str]] = []
        for i, case in enumerate(self.cases):
            self.members[i] = [n for n in providers.names_for(case.op, wanted) if self.takes(n, case, quick)]

    def takes(self, name: str, case: Case, quick: bool) -> bool:
        absent = providers.why_absent(name, case.op, self.device, quick)
        why = absent or providers.why_too_large(name, case, self.device)
        note = left_out(case, name, why, every=absent is not None) if why else None
        if note and note not in self.left_out:
            self.left_out.append(note)
        return why is None

    @property
    def names(self) -> list[str]:
        """Every provider once: one worker serves all ops that have a provider of its name."""
        return list(dict.fromkeys(name for names in self.members.values() for name in names))


def measure(plan: Plan, rounds: int, passes: int) -> Measurement:
    found = Measurement(plan.cases, plan.left_out)
    with tempfile.TemporaryDirectory() as bytecode:
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            one_round(plan, found, passes, Path(bytecode), first=number == 0)
    for (i, name), record in found.records.items():
        if record.refused:
            found.left_out.append(left_out(plan.cases[i], name, record.refused))
    return found


def left_out(case: Case, name: str, why: str, every: bool = False) -> dict[str, str]:
    return {"op": case.op, "provider": name, "case": "every case" if every else str(case), "why": why}


def one_round(plan: Plan, found: Measurement, passes: int, bytecode: Path, first: bool) -> None:
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(plan.device, bytecode)) for name in plan.names}
        for worker in workers.values():
            worker.ask(do="ready")
        for i, case in enumerate(plan.cases):
            say(str(case))
            asked = {name: (workers[name], found.records[i, name]) for name in plan.members[i]}
            one_case(case, asked, passes, first)


def one_case(case: Case, asked: dict[str, tuple[Worker, Record]], passes: int, first: bool) -> None:
    """One round of one case: open it in every worker that is not red yet, sample in turn, close it."""
    timed = []
    for name, (worker, record) in asked.items():
        if (
            not record.faults
            and not record.refused
            and opened(worker, record, do="open", provider=name, case=case.to_json(), check=first)
        ):
            timed.append((worker, record))
            for mode in case.modes:
                record.samples[mode].append([])
    for turn in range(passes if timed else 0):
        start = turn % len(timed)
        for worker, record in timed[start:] + timed[:start]:
            for mode in case.modes:
                time.sleep(PAUSE)
                answer = worker.ask(do="sample", mode=mode) if not record.faults else {}
                note(record, answer)
                record.samples[mode][-1] += [answer["ms"]] if "ms" in answer else []
    for worker, _ in timed:
        worker.ask(do="close")


def opened(worker: Worker, record: Record, **request: Any) -> bool:
    answer = worker.ask(**request)
    note(record, answer)
    record.refused = answer.get("refused", "")
    if record.faults or record.refused:
        return False
    record.memory = {key: answer[key] for key in ("saved_bytes", "peak_bytes")}
    return True


def note(record: Record, answer: dict[str, Any]) -> None:
    """An exception is a fault like a wrong number: no times, and the command fails."""
    record.faults += answer.get("faults", []) + ([answer["error"]] if "error" in answer else [])


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)
