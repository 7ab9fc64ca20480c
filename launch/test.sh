#!/usr/bin/env bash
# Set-up and the tests: bash launch/test.sh [pytest arguments], for example: bash launch/test.sh tests/models -k trunk
# Two files at a time. What -m chooses (slow, gpu) has the machine to itself; -n 0 is one process, as --pdb wants it.
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bash "$launch/setup.sh" dev
cd "$launch/.."
workers=(-n 2 --dist loadfile --no-loadscope-reorder)    # in their order: long files with few tests are not the last
case " $* " in *" -m"*) workers=() ;; esac
exec .venv/bin/python -m pytest ${workers[@]+"${workers[@]}"} "$@"
