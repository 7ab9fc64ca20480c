#!/usr/bin/env bash
# Which small changes of the code no test notices: mutmut over the modules named in pyproject.toml, [tool.mutmut].
# Goes on where it was stopped. "again" as its argument tries once more what was not noticed, or not tried, so far; other
# arguments are patterns of mutants, as "mitrain.tasks.ranks*". Needs: pip install mutmut
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1
python="${PYTHON:-.venv/bin/python}"
if [ "${1:-}" = again ]; then
    mapfile -t names < <("$python" launch/mutation_table.py --left)
    set -- "${names[@]}"
fi
ln -sfn kernels/mitrain_kernels mitrain_kernels # mutmut takes a module's name from its path
trap 'rm -f mitrain_kernels' EXIT
nice -n 5 "$python" -m mutmut run --max-children 1 "$@" || true
"$python" launch/mutation_table.py
