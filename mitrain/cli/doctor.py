"""``mitrain doctor``: this machine, its packages, and what would keep a run from starting here."""

import argparse
import json
import subprocess
import sys
from typing import Any

from mitrain.cli.shared import describe, on_ranks, say

SMOKE_S = 300.0
EXAMPLES = """  mitrain doctor
  mitrain doctor --smoke
  srun --nodes=2 --ntasks-per-node=1 python -m mitrain doctor"""


def add_doctor(sub: argparse.ArgumentParser) -> None:
    describe(sub, on_ranks(run_doctor), EXAMPLES)
    sub.add_argument(
        "--smoke",
        action="store_true",
        help="also start two ranks here, measure their bandwidth and train a step (ranks that torchrun or srun started"
        " always do)",
    )


def run_doctor(arguments: argparse.Namespace) -> dict[str, Any]:
    from mitrain.cli import checks, machine
    from mitrain.core import dist

    report = machine.examine()
    found = [*checks.check_all(), checks.known_faults(report["faults"])]
    if dist.world() > 1:
        from mitrain.cli import rank_checks

        found = [*rank_checks.united(found), rank_checks.bandwidth(), rank_checks.smoke_step()]
    rows = [vars(check) for check in found] + (of_two_ranks() if arguments.smoke and dist.world() == 1 else [])
    report["checks"] = rows
    arguments.code = 0 if all(row["ok"] for row in rows) else 1
    say(arguments, machine.as_text(report))
    return report


def of_two_ranks(seconds: float = SMOKE_S) -> list[dict[str, Any]]:
    """What two ranks of this machine find when they run this command together, and this process alone does not."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    try:
        done = subprocess.run(
            [*launcher, "-m", "mitrain", "doctor", "--json"], capture_output=True, text=True, timeout=seconds
        )
        rows = json.loads(done.stdout)["checks"]
        return [row for row in rows if row["name"] in ("bandwidth", "step")]
    except subprocess.TimeoutExpired:
        why = f"two ranks had not finished after {seconds:g} s"
    except (ValueError, KeyError):
        lines = [line for line in done.stderr.splitlines() if line.startswith("mitrain")] or done.stderr.splitlines()
        why = (lines or [f"the ranks ended with {done.returncode}"])[0][:300]
    fix = "torchrun --standalone --nproc-per-node=2 -m mitrain doctor shows all that they say"
    return [{"name": "step", "ok": False, "detail": why, "fix": fix}]
