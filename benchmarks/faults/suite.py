"""The cases, run one after another, and their table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.faults.lab import Ended, Lab, Left, Process, moment, opened
from mitrain.core import markdown
from mitrain.core.errors import ConfigError, UserError
from mitrain.core.provenance import commit, made_with, sentence

PACKAGES = ("torch", "transformers", "deepspeed")
COLUMNS = ("fault", "fired", "detected after", "lost steps", "end state", "resumed equal", "said", "")
SHOWN = 160
"""Characters of a message that the table shows."""


@dataclass
class Found:
    """What came of a fault.

    ``fired``: it took place. ``detected_s``: seconds from then until the command had ended (or, where the fault stood
    there before, from the command's start). ``lost_steps``: finished steps that the newest checkpoint lacks.
    ``end_state``: see `Ended.state`, or what the case says.
    ``resumed_equal``: whether what goes on after it equals what nothing happened to, bit for bit.
    """

    fired: bool
    end_state: str
    detected_s: float | None = None
    lost_steps: int | None = None
    resumed_equal: bool | None = None
    said: str = ""


@dataclass(frozen=True)
class Case:
    """A fault: how it is set off and what must come of it."""

    name: str
    group: str
    work: Callable[[Lab, Path], Found]
    wanted: str
    most_lost: int
    quick: bool


CASES: dict[str, Case] = {}


def fault(wanted: str, most_lost: int = 0, quick: bool = False) -> Callable[[Any], Any]:
    """Registers a case under its function's name. ``wanted``: the end state; ``most_lost``: steps it may cost."""

    def register(work: Callable[[Lab, Path], Found]) -> Callable[[Lab, Path], Found]:
        name, group = work.__name__.replace("_", "-"), work.__module__.rpartition(".")[2]
        CASES[name] = Case(name, group, work, wanted, most_lost, quick)
        return work

    return register


def refused_at_start(ended: Ended, *needles: str, fired: bool = True, notices: int = 0) -> Found:
    """A fault that stood there before the command: refused in one line that holds ``needles``, after so many ``notices``."""
    state = ended.state
    if state == "refused" and len(ended.lines) != 1 + notices:
        state = f"refused in {len(ended.lines)} lines"
    missing = [needle for needle in needles if needle not in ended.err]
    if state == "refused" and missing:
        state = f"refused without {missing[0]!r}"
    return Found(fired, state, ended.seconds, said=" / ".join(ended.lines[-1:]))


def interrupted(process: Process, fired: Path, run: Path, lab: Lab, resume: Sequence[Any] = (), ranks: int = 1) -> Found:
    """A run that a fault ends, looked at, resumed and compared with the undisturbed one."""
    ended = process.wait()
    when = moment(fired)
    detected = None if when is None else process.started + ended.seconds - when
    last = Left.of(run)
    lost = max(last.losses, default=0) - last.step
    again = lab.run("train", "--resume", run, *resume) if ranks == 1 else resumed_on(ranks, lab, run, resume)
    equal = again.code == 0 and Left.of(run).equals(lab.undisturbed(ranks))
    said = " / ".join((ended.lines or again.lines)[:2])
    return Found(when is not None, ended.state, detected, lost, equal, said)


def resumed_on(ranks: int, lab: Lab, run: Path, resume: Sequence[Any]) -> Ended:
    ended = [p.wait() for p in lab.start_ranks([["train", "--resume", run, *resume]] * ranks)]
    return next((e for e in ended if e.code), ended[0])


def verdict(case: Case, found: Found) -> bool:
    kept = found.lost_steps is None or found.lost_steps <= case.most_lost
    return found.fired and found.end_state == case.wanted and kept and found.resumed_equal is not False


class FaultsError(UserError):
    """Faults that did not end as they must; everything has been written."""

    exit_code = 1


def chosen(known: Mapping[str, Case], quick: bool, only: Sequence[str]) -> list[Case]:
    """The cases asked for, in their order; ConfigError for names that none has."""
    for name in only:
        if not any(case.startswith(name) for case in known):
            raise ConfigError(f"--only {name} names no fault: they are {', '.join(known)}")
    cases = [case for case in known.values() if not only or case.name.startswith(tuple(only))]
    return [case for case in cases if case.quick or not quick]


def faults(cases: Sequence[Case], out: Path, command: str, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Run ``cases``, write their rows to ``out`` and return them; see `check` for the verdict."""
    rows, here = [], commit()
    known = None if here.endswith("-dirty") else here  # nothing says what a changed tree has measured
    with opened() as lab:
        for number, case in enumerate(cases, 1):
            row = results.row(out, case.name, known, lambda case=case: measured(case, lab))
            rows.append(row)
            say(f"[{number}/{len(cases)}] {case.name}: {row['end_state']}{'' if row['ok'] else ', wanted ' + case.wanted}")
    found = {"made": {"command": command, **made_with(PACKAGES)}, "rows": rows}
    results.write(out, found, table(found))
    return found


def measured(case: Case, lab: Lab) -> dict[str, Any]:
    """One row. A case that fails by itself is a row that is not ok, so that the others are still run."""
    try:
        found = case.work(lab, lab.scratch(case.name))
    except Exception as error:
        found = Found(False, "the case failed", said=f"{type(error).__name__}: {error}")
    row = {"fault": case.name, "group": case.group, **asdict(found), "wanted": case.wanted, "ok": verdict(case, found)}
    if found.detected_s is not None:
        row["detected_s"] = round(found.detected_s, 2)
    return row | {"said": found.said.replace(str(lab.folder), "…")}


def check(found: dict[str, Any]) -> None:
    """FaultsError where a fault did not end as it must."""
    bad = [f"{row['fault']} ({row['end_state']})" for row in found["rows"] if not row["ok"]]
    if bad:
        raise FaultsError(f"{len(bad)} of {len(found['rows'])} faults did not end as they must: {'; '.join(bad)}")


def table(found: dict[str, Any]) -> str:
    """Markdown: a line a fault."""
    lines = markdown.table(COLUMNS, [cells(row) for row in found["rows"]])
    note = (
        "Detected: seconds from the fault to the command's end, of a fault that stood there before from the command's start."
        " Lost: finished steps that the newest checkpoint lacks. Resumed equal: losses, step and trained tensors are those"
        " of an undisturbed run, bit for bit (refused commands: of the run as it goes on without the fault)."
    )
    return "\n".join([*lines, "", note, "", sentence(found["made"]), ""])


def cells(row: dict[str, Any]) -> list[str]:
    seconds = "–" if row["detected_s"] is None else f"{row['detected_s']:.1f} s"
    lost = "–" if row["lost_steps"] is None else str(row["lost_steps"])
    equal = {None: "–", True: "yes", False: "**no**"}[row["resumed_equal"]]
    said = row["said"].removeprefix("mitrain: ")
    said = markdown.plain(said if len(said) <= SHOWN else said[:SHOWN] + "…")
    fired = "yes" if row["fired"] else "**no**"
    ending = "ok" if row["ok"] else f"**wanted {row['wanted']}**"
    return [row["fault"], fired, seconds, lost, row["end_state"], equal, said, ending]
