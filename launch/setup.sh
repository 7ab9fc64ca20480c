#!/usr/bin/env bash
# Set-up: makes .venv/ in this clone and installs mitrain and its pinned dependencies into it. Safe to run again:
# when nothing has changed it returns at once; an interrupted set-up is started over. Every file that is installed is
# checked against a hash in this folder (constraints.txt, torch-cpu.txt, uv.txt), wherever it comes from.
#
#   bash launch/setup.sh [EXTRA …]        for example: bash launch/setup.sh dev wandb
#
# TORCH_BUILD=gpu  the GPU build of torch also where no GPU is seen, as while an image is built.
# PYTHON=…  the interpreter to use (3.11 or newer). pip's find-links and index-url (PIP_FIND_LINKS, PIP_INDEX_URL or its
# configuration file) are passed on to uv. An extra-index-url is not: one index serves every package.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=$root/.venv
stamp=$venv/.mitrain-complete       # three lines: this clone's path, a checksum of what to install, the extras
begun=$venv/.mitrain-begun          # stands while a set-up is under way
log=$venv/setup.log

exec 8>&2    # the terminal, also where a command's output goes to the log
say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&8; exit 2; }

for extra in "$@"; do
    case $extra in
        audio | coco | completion | gpu | datasets | deepspeed | demo | docs | parquet | peft | plots | quant | serve | tensorboard | triton | video | wandb | dev | all) ;;
        *) fail "unknown extra '$extra': choose from audio coco completion gpu datasets deepspeed demo docs parquet peft plots quant serve tensorboard triton video wandb dev all" ;;
    esac
done

find_python() {
    local candidate candidates=(python3.11 python3.12 python3.13 python3 python)
    if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer (looked for ${candidates[*]}):" \
        "install python3.11 with its venv module, or name one with PYTHON=/path/to/python"
}

# Run a command with its output in the log; on failure show the log's end and stop with one line.
quietly() {
    local what=$1
    shift
    printf '\n$ %s\n' "$*" >> "$log"
    if ! "$@" >> "$log" 2>&1; then
        tail -n 15 "$log" >&2
        fail "$what failed (above; all of it in $log): mend that and run this again"
    fi
}

# What pip is told about NAME (find-links, index-url), by environment or configuration file; uv reads neither.
pip_setting() {
    local variable
    variable=PIP_$(printf %s "$1" | tr 'a-z-' 'A-Z_')
    if [ -n "${!variable:-}" ]; then
        printf '%s' "${!variable}"
    else
        "$venv/bin/python" -m pip config get "global.$1" 2> /dev/null || true
    fi
}

package_sources() {
    local word
    sources=()
    for word in $(pip_setting find-links); do sources+=(--find-links "$word"); done
    for word in $(pip_setting index-url); do sources+=(--default-index "$word"); done
    if [ -n "${PIP_CERT:-}" ] && [ -z "${SSL_CERT_FILE:-}" ]; then export SSL_CERT_FILE=$PIP_CERT; fi
}

uv_install() { "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" "$@"; }

# Bytecode: without it every process compiles torch and transformers anew where Python may not write beside them. Half of
# the work would be for models of other families and packages' own tests. A file that is no Python of this version is left.
compile_packages() {
    "$venv/bin/python" -m compileall -qq -j 0 -x '/site-packages/(transformers/models/(?!auto/|__init__)|.*/tests/)' "$venv"/lib/python3.*/site-packages || true
}

has_gpu() { [ "${TORCH_BUILD:-}" = gpu ] || { command -v nvidia-smi > /dev/null && nvidia-smi -L 2> /dev/null | grep -q GPU; }; }

# Without a GPU: the CPU build of torch from the links offered, else from PyTorch's own index, else what there is.
install_cpu_torch() {
    local cpu=(--no-deps --require-hashes --requirements launch/torch-cpu.txt)
    if [ ${#sources[@]} -gt 0 ] && uv_install --no-index "${sources[@]}" "${cpu[@]}" >> "$log" 2>&1; then
        say "CPU build of torch: from the links that pip is told of"
    elif UV_HTTP_RETRIES=1 uv_install --torch-backend cpu "${cpu[@]}" >> "$log" 2>&1; then
        say "CPU build of torch: from PyTorch's index"
    else
        say "no CPU build of torch with a known hash is within reach: taking the registry's GPU build, a download of about 3 GB"
        return 1
    fi
}

make_venv() {
    local python
    python=$(find_python)
    mkdir -p "$venv"
    touch "$begun"
    say "making .venv with $("$python" --version 2>&1)"
    { "$python" -m venv "$venv" && "$venv/bin/python" -m pip --version; } >> "$log" 2>&1 ||
        fail "$python cannot make a virtual environment with pip:" \
            "install its venv module (Debian, Ubuntu: apt install python3-venv)"
    quietly "installing uv" "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --no-deps --require-hashes --requirement launch/uv.txt
}

install_packages() {
    local extra wanted=() torch="$venv/torch.txt" ours=(--editable .)
    package_sources
    for extra in ${1//,/ }; do wanted+=(--extra "$extra"); done
    sed -n 's/^torch==\([0-9.]*\).*/torch===\1/p' launch/constraints.txt > "$torch"    # ===: not the CPU build
    if ! has_gpu && [ "$(uname -s)" = Linux ] && install_cpu_torch; then torch=launch/torch-cpu.txt; fi
    say "installing the pinned packages (extras: ${1:-none}; details in .venv/setup.log)"
    quietly "installing the pinned packages" uv_install ${sources[@]+"${sources[@]}"} --require-hashes \
        --constraints launch/constraints.txt --constraints "$torch" --build-constraints launch/constraints.txt \
        --requirements pyproject.toml ${wanted[@]+"${wanted[@]}"}
    case ,$1, in *,demo,* | *,dev,* | *,all,*) ours+=(--editable examples/demo) ;; esac
    quietly "installing mitrain" uv_install ${sources[@]+"${sources[@]}"} --no-deps \
        --build-constraints launch/constraints.txt "${ours[@]}"
    quietly "compiling the packages" compile_packages
}

# One set-up at a time; the lock is on the folder itself and goes with this process.
if command -v flock > /dev/null; then
    exec 9< "$root/launch"
    flock -n 9 || { say "another set-up of this clone is running: waiting for it"; flock 9; }
fi
trap 'fail "interrupted: run this again to start over"' INT TERM

sum=$(cat pyproject.toml examples/demo/pyproject.toml launch/constraints.txt launch/torch-cpu.txt launch/uv.txt launch/setup.sh | cksum)
done_root='' done_sum='' done_extras=''
if [ -f "$stamp" ]; then { read -r done_root; read -r done_sum; read -r done_extras; } < "$stamp"; fi
# shellcheck disable=SC2086  # the extras are words
extras=$(printf '%s\n' $done_extras "$@" | sort -u | xargs | tr ' ' ',')
if [ "$done_root" != "$root" ] || [ -e "$begun" ] || ! [ -x "$venv/bin/uv" ]; then
    if [ -e "$begun" ] || [ -e "$stamp" ]; then
        say "the last set-up did not finish or was moved: starting over"
        rm -rf "$venv"
    fi
    make_venv
elif [ "$done_sum" = "$sum" ] && [ "${done_extras// /,}" = "$extras" ]; then
    exit 0
fi

touch "$begun"
install_packages "$extras"
printf '%s\n' "$root" "$sum" "${extras//,/ }" > "$stamp.new"
mv "$stamp.new" "$stamp"
rm -f "$begun"
say "done in $SECONDS s"
