#!/usr/bin/env bash
# Which small changes of the code no test notices: mutmut over what decides a score (pyproject.toml, [tool.mutmut]).
# Goes on where it was stopped; its arguments are patterns of mutants, as "mitrain.tasks.ranks*". Needs: pip install mutmut
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1
nice -n 19 "${PYTHON:-.venv/bin/python}" -m mutmut run --max-children 1 "$@" || true
"${PYTHON:-.venv/bin/python}" launch/mutation_table.py
