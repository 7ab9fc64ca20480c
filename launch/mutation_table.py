"""The table of a mutation run: what mutmut left in mutants/, as docs/results/mutation/{results.json,table.md}.

A change that alters nothing is equivalent: docs/results/mutation/equivalent.json names each, with its reason. It counts
as tried, whether or not this run took the time. A module of which mutants/ says less than its earlier row, or the same,
keeps that row: each row names the commit that it is of.
"""

import json
import platform
import subprocess
import sys
import time
import tomllib
from importlib.metadata import version
from pathlib import Path

OUT = Path("docs/results/mutation")
NOTICED = {1, 3, 36, -24, 24, 152, 255, -11, -9}  # a failed test, a time-out, a crash
COMMAND = "bash launch/mutate.sh"
COUNTED = ("mutants", "tried", "noticed", "equivalent", "survived")


def main() -> None:
    reasons = json.loads((OUT / "equivalent.json").read_text(encoding="utf-8"))
    chosen = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"]["mutmut"]["only_mutate"]
    verdicts = {path: json.loads(Path(f"mutants/{path}.meta").read_text("utf-8"))["exit_code_by_key"] for path in chosen}
    if sys.argv[1:] == ["--left"]:
        print(
            *(name for codes in verdicts.values() for name, code in codes.items() if again(name, code, reasons)),
            sep="\n",
        )
        return
    made = {
        "commit": git("rev-parse", "--short", "HEAD"),
        "clean": not git("status", "--porcelain", "--", "mitrain", "kernels", "tests", "launch", "pyproject.toml"),
        "date": time.strftime("%Y-%m-%d"),
        "versions": f"mutmut {version('mutmut')}, Python {platform.python_version()}, torch {version('torch')}",
    }
    earlier = {kept["module"]: kept for kept in json.loads((OUT / "results.json").read_text("utf-8"))["rows"]}
    rows = [row(path, codes, reasons) | made for path, codes in verdicts.items()]
    rows = [earlier[r["module"]] if stands(earlier.get(r["module"]), r) else r for r in rows]
    found = {"command": COMMAND, "rows": rows}
    (OUT / "results.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (OUT / "table.md").write_text(table(rows), encoding="utf-8")


def git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()


def again(name: str, code: int | None, reasons: dict[str, str]) -> bool:
    """Whether a change has not been tried, or not been noticed, and is not known to alter nothing."""
    return code not in NOTICED and name not in reasons


def stands(old: dict[str, int] | None, new: dict[str, int]) -> bool:
    """Whether an earlier row stays: less of the module is tried by now, or nothing else came out."""
    if old is None:
        return False
    less = new["tried"] * old["mutants"] < old["tried"] * new["mutants"]
    return less or all(old[name] == new[name] for name in COUNTED)


def row(path: str, codes: dict[str, int | None], reasons: dict[str, str]) -> dict[str, object]:
    """Counts of one module, and the names of the changes that no test noticed."""
    tried = {name: code for name, code in codes.items() if code is not None or name in reasons}
    survived = sorted(name for name, code in tried.items() if again(name, code, reasons))
    noticed = sum(code in NOTICED for code in tried.values())
    return {
        "module": path,
        "mutants": len(codes),
        "tried": len(tried),
        "noticed": noticed,
        "equivalent": len(tried) - noticed - len(survived),
        "survived": len(survived),
        "unnoticed": survived,
    }


def table(rows: list[dict]) -> str:
    """The Markdown table: a row per module, and one of all."""
    total = {"module": "all of these", **{name: sum(r[name] for r in rows) for name in COUNTED}}
    lines = [f"| module | {' | '.join(COUNTED)} | noticed of the others | commit |", "|---" * 8 + "|"]
    for r in [*rows, total]:
        others = r["tried"] - r["equivalent"]
        share = f"{100 * r['noticed'] / others:.1f} %" if others else "–"
        of = f"{r['commit']}{'' if r['clean'] else ' with changes'}, {r['date']}" if "commit" in r else ""
        lines.append(f"| {r['module']} | {' | '.join(str(r[name]) for name in COUNTED)} | {share} | {of} |")
    lines += [
        "",
        f"Made by `{COMMAND}`, each row on its commit and date, with {'; '.join(sorted({r['versions'] for r in rows}))}.",
        "Each change was tried with the tests that `[tool.mutmut]` in pyproject.toml selects, without a GPU; of the others"
        " (`equivalent.json` says which and why not) the survivors stand in `results.json`. No other module was tried.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
