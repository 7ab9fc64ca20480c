#!/usr/bin/env bash
# The tables of docs/results/evidence.md: three seeds of every row, each trained from its configuration, then docs/results/. Hours on 2 cores.
#
#   bash launch/evidence.sh [answer|segment|all]
#
# Finished runs are kept in runs/evidence and not trained again; an interrupted one is resumed.
set -euo pipefail

what=${1:-all}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh demo
mitrain() { .venv/bin/mitrain "$@"; }

# Train NAME with SEED from CONFIG and overrides, unless that is done; the run's folder is added to $runs.
train() {
    local name=$1 seed=$2 config=$3 parent=runs/evidence/$1/seed$2 run
    shift 3
    run=$(find "$parent" -mindepth 1 -maxdepth 1 -type d 2> /dev/null | head -n 1 || true)
    if [ -z "$run" ]; then
        mitrain train "$config" "name=$name" "seed=$seed" "$@" --runs "$parent"
        run=$(find "$parent" -mindepth 1 -maxdepth 1 -type d | head -n 1)
    elif [ ! -f "$run/summary.json" ]; then
        mitrain train --resume "$run"
    fi
    runs+=("$run")
}

if [ "$what" = answer ] || [ "$what" = all ]; then
    runs=()
    for seed in 0 1 2; do train mit-answer "$seed" configs/quickstart.yaml; done
    mitrain report "${runs[@]}" --splits test --out docs/results/answer
fi

if [ "$what" = segment ] || [ "$what" = all ]; then
    runs=()
    for seed in 0 1 2; do
        train mit-segment "$seed" configs/segment.yaml
        train no-infusion "$seed" configs/segment.yaml 'adapter={name: none}'
        train no-llm "$seed" configs/segment.yaml 'adapter={name: none}' 'task.readout=[embeddings]'
    done
    mitrain report "${runs[@]}" --splits val,testA,testB --out docs/results/segment
fi
