#!/usr/bin/env bash
# Set-up and the tests: bash launch/test.sh [pytest arguments], for example: bash launch/test.sh -m slow
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bash "$launch/setup.sh" dev
cd "$launch/.."
exec .venv/bin/python -m pytest "$@"
