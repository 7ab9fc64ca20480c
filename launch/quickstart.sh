#!/usr/bin/env bash
# The quickstart: set-up, real weights, real pictures, training and evaluation, on a CPU in minutes.
#
#   bash launch/quickstart.sh [--archive tuxpaint-stamps-default.deb] [key=value …]
#
# key=value goes to `mitrain train` (for example train.steps=60). The pictures come from a Debian package; where it
# cannot be had, and no --archive names a copy of it, scikit-learn's handwritten digits take their place.
set -euo pipefail

fail() { printf 'quickstart: %s\n' "$*" >&2; exit 2; }

archive=()
overrides=()
while [ $# -gt 0 ]; do
    case $1 in
        --archive)
            if [ $# -lt 2 ] || ! [ -f "$2" ]; then fail "--archive needs an existing file: give --archive FILE"; fi
            archive=(--archive "$(cd "$(dirname "$2")" && pwd)/$(basename "$2")")
            shift 2
            ;;
        -h | --help)
            sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *=*)
            overrides+=("$1")
            shift
            ;;
        *) fail "'$1' is not understood: give --archive FILE or key=value" ;;
    esac
done

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bash "$launch/setup.sh" demo
cd "$launch/.."
mitrain() { .venv/bin/mitrain "$@"; }

config=configs/quickstart.yaml
mitrain models prepare smollm2-135m-instruct efficientnet-lite0
code=0
mitrain data prepare tuxpaint ${archive[@]+"${archive[@]}"} || code=$?
if [ "$code" = 2 ] && [ ${#archive[@]} = 0 ]; then
    echo "quickstart: without the Tux Paint pictures (the line above says why) handwritten digits take their place"
    config=configs/digits.yaml
    mitrain data prepare digits
elif [ "$code" != 0 ]; then
    exit "$code"
fi

mitrain train "$config" ${overrides[@]+"${overrides[@]}"}
# shellcheck disable=SC2012  # run folders have plain names, and their age is what counts
run=$(ls -td runs/"$(basename "$config" .yaml)"-*/ | head -n 1)
run=${run%/}
mitrain report "$run" --splits test --samples 208 --out "$run/report"    # two fifths of the questions, evenly spread
echo "predictions on held-out objects: $(echo "$run"/report/*.png)"
