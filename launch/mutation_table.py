"""The table of a mutation run: what mutmut left in mutants/, as docs/results/mutation/{results.json,table.md}.

A change that alters nothing is equivalent: docs/results/mutation/equivalent.json names each, with its reason.
"""

import json
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

OUT = Path("docs/results/mutation")
NOTICED = {1, 3, 36, -24, 24, 152, 255, -11, -9}  # a failed test, a time-out, a crash
UNTESTED = {5, 33}


def main() -> None:
    reasons = json.loads((OUT / "equivalent.json").read_text(encoding="utf-8"))
    rows = [row(path, reasons) for path in sorted(Path("mutants").rglob("*.py.meta"))]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    made = {
        "command": "bash launch/mutate.sh",
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": f"mutmut {version('mutmut')}, Python {platform.python_version()}, torch {version('torch')}",
    }
    rows = [r for r in rows if r["mutants"]]
    (OUT / "results.json").write_text(json.dumps({"made": made, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    (OUT / "table.md").write_text(table(made, rows), encoding="utf-8")


def row(path: Path, reasons: dict[str, str]) -> dict[str, object]:
    """Counts of one module, and the names of the changes that no test noticed."""
    codes = json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]
    tried = {name: code for name, code in codes.items() if code is not None}
    left = [name for name, code in tried.items() if code not in NOTICED]
    return {
        "module": str(path.relative_to("mutants")).removesuffix(".meta"),
        "mutants": len(codes),
        "tried": len(tried),
        "noticed": len(tried) - len(left),
        "equivalent": sum(name in reasons for name in left),
        "untested": sum(tried[name] in UNTESTED for name in left if name not in reasons),
        "unnoticed": sorted(name for name in left if name not in reasons),
    }


def table(made: dict[str, str], rows: list[dict]) -> str:
    """The Markdown table: a row per module, and one of all."""
    names = ("mutants", "tried", "noticed", "equivalent")
    total = {"module": "all", **{name: sum(r[name] for r in rows) for name in names}}
    lines = ["| module | mutants | tried | noticed | equivalent | noticed of the others |", "|---" * 6 + "|"]
    for r in [*rows, total]:
        others = r["tried"] - r["equivalent"]
        share = f"{100 * r['noticed'] / others:.1f} %" if others else "–"
        lines.append(f"| {r['module']} | {' | '.join(str(r[name]) for name in names)} | {share} |")
    lines += ["", f"Made by `{made['command']}` on {made['date']}, commit {made['commit']}, {made['versions']}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
