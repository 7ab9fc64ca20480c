"""Compile every kernel for GPUs that are not there and audit the machine code: ``python kernels/bench machine-code``.

Exit code 0: all rows may pass; 1: a rule is violated; 2: the command cannot run, with one line that says why. The
rules are those of ``audit.py``; ``--roofline`` prints instead, without compiling, what each kernel must move and compute.
"""

import argparse
import importlib
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from bench.machine_code import roofline

# Op → the module that lists its cases.
OPS = {
    "infused_attention": "bench.machine_code.attention_cases",
    "infused_swiglu": "bench.machine_code.swiglu_cases",
}
# Target → how many cases --quick takes.
QUICK = {"sm_80": 5, "sm_86": 1, "sm_90": 5, "sm_100": 1, "gfx942": 1}
QUICK_HEAD = 128
COLUMNS = (
    "kernel target head_dim dtype warps stages registers spills spills_in_mma_loops shared_bytes blocks_per_sm"
    " mma mma_ratio roofs async_copies ok"
).split()


class UsageError(Exception):
    """The command cannot run; the message is one line that says why and what to do."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UsageError(message)


def parser() -> Parser:
    parser = Parser(prog="python kernels/bench machine-code", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(QUICK), help="comma-separated (default: %(default)s)")
    parser.add_argument("--op", choices=sorted(OPS), metavar="NAME", help=f"one of {', '.join(OPS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="a dozen cases instead of the whole table of tiles")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--no-cache", action="store_true", help="compile everything anew")
    parser.add_argument("--roofline", action="store_true", help="bytes and FLOPs beside the GPUs' limits; compiles nothing")
    other = parser.add_mutually_exclusive_group()
    for name, module, text in (
        (
            "--search",
            "tiles",
            "compile the tiles that may serve infused attention and print the best of each entry (hours)",
        ),
        ("--expect", "expectation", "print what the instructions let one expect beside FlashAttention, an estimate"),
    ):
        other.add_argument(name, dest="of", action="store_const", const=module, help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout and nothing else there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = parser().parse_args(arguments)
        if options.roofline:
            print(json.dumps(roofline.rows(), indent=2) if options.json else roofline.table(roofline.rows()))
            return 0
        rows = audit(options)
    except UsageError as error:
        print(f"aot: {error}", file=sys.stderr)
        return 2
    shown = importlib.import_module(f"bench.machine_code.{options.of}").table if options.of else report
    print(json.dumps(rows, indent=2) if options.json else shown(rows))
    return 0 if options.of == "tiles" or all(row["ok"] for row in rows) else 1


def audit(options: argparse.Namespace) -> list[dict[str, Any]]:
    targets = wanted_targets(options.targets)
    if options.jobs < 1:
        raise UsageError(f"--jobs {options.jobs}: at least one process is needed")
    check_compiler(targets)
    # Behind the checks: a process without triton, or with its interpreter on, gets a sentence instead of a traceback.
    runs = importlib.import_module("bench.machine_code.audit_runs")
    if options.of:
        work = importlib.import_module(f"bench.machine_code.{options.of}").work(targets)
    else:
        modules = [importlib.import_module(OPS[op]) for op in ([options.op] if options.op else OPS)]
        work = [(case, target) for target in targets for case in cases(modules, target, options.quick)]
    return runs.audit_all(work, options.jobs, cached=not options.no_cache, progress=show_progress)


def wanted_targets(text: str) -> list[str]:
    targets = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in targets if name not in QUICK]
    if unknown or not targets:
        raise UsageError(f"unknown target {', '.join(unknown) or repr(text)}: choose from {', '.join(QUICK)}")
    return targets


def check_compiler(targets: Sequence[str]) -> None:
    """UsageError unless Triton can compile in this process and its disassembler is at hand."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UsageError("TRITON_INTERPRET is set, and interpreted kernels do not compile: unset it")
    if importlib.util.find_spec("triton") is None:
        raise UsageError("triton is not installed: install it (Linux only)")
    knobs = importlib.import_module("triton").knobs
    for tool in ("ptxas", "ptxas_blackwell", "cuobjdump") if any(name.startswith("sm_") for name in targets) else ():
        try:
            _ = getattr(knobs.nvidia, tool).path
        except RuntimeError:
            raise UsageError(f"triton's {tool} is missing: install triton from a wheel, which brings it") from None


def cases(modules: Sequence[Any], target: str, quick: bool) -> list[Any]:
    """The cases of all ops for one target; ``quick``: as many as ``QUICK`` says, of the ops in turn."""
    listed = [module.audit_cases(target) for module in modules]
    if not quick:
        return [case for op in listed for case in op]
    in_turn = itertools.zip_longest(*(one_per_kernel(op) for op in listed))
    return [case for turn in in_turn for case in turn if case is not None][: QUICK[target]]


def one_per_kernel(listed: Sequence[Any]) -> list[Any]:
    """Of every kernel of an op the case nearest to a head width of 128, dots first."""
    chosen: dict[str, Any] = {}
    for case in sorted(listed, key=lambda case: (not case.dots, abs(case.head_dim - QUICK_HEAD))):
        chosen.setdefault(case.name, case)
    return list(chosen.values())


def show_progress(left: int, row: dict[str, Any]) -> None:
    what = f"{row['kernel']} {row['target']} head_dim {row['head_dim']} {row['dtype']}"
    print(f"compiled {what} in {row['seconds']} s, {left} left", file=sys.stderr, flush=True)


def report(rows: Sequence[dict[str, Any]]) -> str:
    """A table of all rows, then the reasons of those that may not pass and the notes of the others."""
    cells = [[shown(row[name]) for name in COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in (COLUMNS, *cells)]
    failed = [row for row in rows if not row["ok"]]
    lines += [f"VIOLATION {where(row)}: {reason}" for row in failed for reason in row["reasons"]]
    lines += [f"note {where(row)}: {row['note']}" for row in rows if row["note"]]
    return "\n".join([*lines, f"{len(rows)} compilations, {len(failed)} with a violation"])


def shown(value: Any) -> str:
    return {True: "yes", False: "NO"}[value] if isinstance(value, bool) else str(value)


def where(row: dict[str, Any]) -> str:
    return f"{row['kernel']} {row['target']} head_dim {row['head_dim']} {row['dtype']}"


if __name__ == "__main__":
    sys.exit(main())
