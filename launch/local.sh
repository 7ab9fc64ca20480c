#!/usr/bin/env bash
# Train or evaluate on several processes of this machine, through torchrun:
#
#   bash launch/local.sh RANKS train configs/digits.yaml [key=value …]
#   bash launch/local.sh RANKS eval RUN_DIR
#
# One rank a GPU, or on a CPU a rank for some cores: OMP_NUM_THREADS is set to the cores a rank has, if it is not set.
# PYTHON=…  the interpreter, if it is not that of .venv/
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
ranks=${1:-}
if ! [[ $ranks =~ ^[1-9][0-9]*$ ]] || [ $# -lt 2 ]; then
    echo "usage: bash launch/local.sh RANKS train CONFIG [key=value …]" >&2
    exit 2
fi
shift
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / ranks > 0 ? cores / ranks : 1))}
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m mitrain "$@"
