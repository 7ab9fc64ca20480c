# shellcheck shell=bash
# Sourced by the scripts beside it: the interpreter, and the environment that every rank of a run shares.
#
# PYTHON=…           the interpreter (default: that of .venv/, else of the active environment)
# OMP_NUM_THREADS=…  threads of a rank (default: an equal share of the cores)
# MITRAIN_TIMEOUT=…  seconds after which a silent rank, or a lock that is not let go, is given up (default: 1800)
# MITRAIN_STEP_TIMEOUT=…  the same of a rank after the first step (default: 600)
# DS_ACCELERATOR=…   what DeepSpeed computes on (default: cpu where no GPU is seen; otherwise DeepSpeed looks)
#
# GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, the network interface between nodes, are passed on and never set here.

fail() { printf '%s: %s\n' "$(basename "${BASH_SOURCE[-1]}")" "$*" >&2; exit 2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
python=${PYTHON:-$root/.venv/bin/python}
if [ -z "${PYTHON:-}" ] && ! [ -x "$python" ] && [ -n "$active" ]; then python=$active/bin/python; fi
command -v "$python" > /dev/null ||
    fail "there is no Python at $python: run bash launch/setup.sh, or name one with PYTHON=/path/to/python"

is_count() { [[ $1 =~ ^[1-9][0-9]{0,5}$ ]]; }

has_gpu() { [ -e /dev/kfd ] || { command -v nvidia-smi > /dev/null && nvidia-smi -L 2> /dev/null | grep -q GPU; }; }

# The environment of RANKS ranks that share this machine, or CORES of its cores.
share_machine() {
    local ranks=$1 cores=${2:-}
    cores=${cores:-$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN)}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / ranks > 0 ? cores / ranks : 1))}
    export MITRAIN_TIMEOUT=${MITRAIN_TIMEOUT:-1800}
    if [ -z "${DS_ACCELERATOR:-}" ] && ! has_gpu; then export DS_ACCELERATOR=cpu; fi
}
