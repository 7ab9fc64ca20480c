#!/usr/bin/env bash
# The tables of docs/results/evidence.md: three seeds of every row, each trained from its configuration, then docs/results/. Hours on 2 cores.
#
#   bash launch/evidence.sh [answer|segment|reference|reasoning|objects|all]
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

# The rows about a second picture: infused, beside the frozen text (late fusion, of unit variance as the text), not shown.
for part in reference reasoning; do
    if [ "$what" = "$part" ] || [ "$what" = all ]; then
        runs=() config=(configs/segment-reference.yaml "data.split_by=$part")
        for seed in 0 1 2; do
            train "mit-$part" "$seed" "${config[@]}"
            train "late-$part" "$seed" "${config[@]}" 'adapter={name: none}' 'task.readout=[last,reference]' features.norm=28
            train "no-$part" "$seed" "${config[@]}" 'adapter={name: none}'
        done
        mitrain report "${runs[@]}" --splits val,testA,testB --out "docs/results/segment-$part"
    fi
done

if [ "$what" = objects ] || [ "$what" = all ]; then
    runs=() config=(configs/segment-objects.yaml)
    for seed in 0 1 2; do
        train frozen-llm "$seed" "${config[@]}"
        train no-llm-objects "$seed" "${config[@]}" 'task.readout=[embeddings]'
        train mit-objects "$seed" "${config[@]}" 'adapter={name: mit, layers: [29], rank: 64}' model.encoders.image.infused=true
    done
    mitrain report "${runs[@]}" --splits val,testA,testB --out docs/results/segment-objects
fi
