#!/usr/bin/env bash
# Train or evaluate on several processes of this machine, through torchrun:
#
#   bash launch/local.sh RANKS train CONFIG [key=value …]
#   bash launch/local.sh RANKS eval RUN_DIR
#
# One rank a GPU, or on a CPU a rank for some cores. launch/env.sh lists the variables that matter.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

ranks=${1:-}
if ! is_count "$ranks" || [ $# -lt 2 ]; then
    fail "usage: bash launch/local.sh RANKS train CONFIG [key=value …]"
fi
shift
share_machine "$ranks"
exec "$python" "$root/launch/torchrun.py" --standalone --nproc-per-node "$ranks" -m mitrain "$@"
