#!/usr/bin/env bash
# The main job with the oldest packages that pyproject.toml allows, or with the newest there are, in an environment of its own:
# attach, train, eval, predict, export, chat.
#
#   bash launch/bounds.sh lowest|newest [pytest's arguments]
#
# PYTHON=…  the interpreter to use. VENV=…  where the environment is made (default: .venv-lowest, .venv-newest).
# UV_TORCH_BACKEND=cpu  the CPU build of torch in place of the registry's GPU build, which is 3 GB; uv's other variables
# (UV_FIND_LINKS, UV_CONSTRAINT) count as well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { printf 'bounds: %s\n' "$*" >&2; exit 2; }

case ${1:-} in
    lowest) resolution=lowest-direct ;;
    newest) resolution=highest ;;
    *) fail "say lowest or newest: bash launch/bounds.sh lowest" ;;
esac
venv=${VENV:-.venv-$1}
shift
if [ $# -eq 0 ]; then
    set -- tests/e2e/test_run.py tests/methods/test_mit_forward.py tests/methods/test_mit_generate.py \
        tests/methods/test_mit_training.py tests/models/test_frozen_layers.py tests/training/test_trainer.py
fi

"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement launch/uv.txt
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --resolution "$resolution" --editable '.[peft]' \
    --editable examples/demo 'hypothesis>=6.150' 'pytest>=9' 'scipy>=1.15' 'setuptools>=77'
"$venv/bin/python" -c 'import sys, torch, transformers; print(sys.version.split()[0], torch.__version__, transformers.__version__)'
exec "$venv/bin/python" -m pytest -q "$@"
