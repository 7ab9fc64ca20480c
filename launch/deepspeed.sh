#!/usr/bin/env bash
# Train or evaluate through the deepspeed launcher, on this machine or on several hosts:
#
#   bash launch/deepspeed.sh RANKS train CONFIG [key=value …]
#   bash launch/deepspeed.sh HOSTFILE [launcher option …] train CONFIG [key=value …]
#
# HOSTFILE has lines "HOST slots=RANKS" (launch/hostfile.example). Every host has this clone, the configuration, the
# models, the data and the run folder at the same paths. The launcher reaches the hosts with pdsh and ssh, without a
# password. Where that cannot be, run the same command on every host, N counting from 0 in the file's order:
#
#   bash launch/deepspeed.sh HOSTFILE --no_ssh --node_rank N --master_addr FIRST_HOST train CONFIG [key=value …]
#
# Over ssh the ranks see only what is passed on: the variables below, and the user's own DeepSpeed environment file.
# None of them is a secret: they stand in a command line on every host. launch/env.sh lists the variables that matter.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

PASSED_ON='^(MITRAIN_[A-Z_]+|OMP_NUM_THREADS|DS_ACCELERATOR|GLOO_[A-Z_]+|NCCL_[A-Z_0-9]+|TORCH_NCCL_[A-Z_]+|TORCH_EXTENSIONS_DIR|HF_HOME|HF_HUB_OFFLINE|WANDB_MODE)='

usage() { fail "usage: bash launch/deepspeed.sh RANKS|HOSTFILE [launcher option …] train CONFIG [key=value …]"; }

# Sets `hosts`, and `slots` to the most ranks that a host has.
read_hostfile() {
    local file=$1 line number=0 name known=' '
    hosts=0 slots=0
    while read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        if [ -z "$line" ] || [ "${line:0:1}" = '#' ]; then continue; fi
        [[ $line =~ ^([^[:space:]]+)[[:space:]]+slots=([1-9][0-9]{0,4})[[:space:]]*(#.*)?$ ]] ||
            fail "$file line $number is not 'HOST slots=RANKS': $line"
        name=${BASH_REMATCH[1]}
        case $known in *" $name "*) fail "$file line $number names $name again: give each host one line" ;; esac
        known+="$name "
        hosts=$((hosts + 1))
        if [ "${BASH_REMATCH[2]}" -gt "$slots" ]; then slots=${BASH_REMATCH[2]}; fi
    done < "$file"
    [ "$hosts" -gt 0 ] || fail "$file names no host: write lines like 'node-1 slots=8' (launch/hostfile.example)"
}

# The value of --NAME among the launcher's options (given as --NAME VALUE or --NAME=VALUE), or nothing.
option() {
    local i
    for ((i = 0; i < ${#options[@]}; i++)); do
        case ${options[i]} in
            "--$1") printf '%s' "${options[i + 1]:-}" ;;
            "--$1="*) printf '%s' "${options[i]#*=}" ;;
        esac
    done
}

has_option() { case " ${options[*]-} " in *" --$1 "*) ;; *) return 1 ;; esac }

# Without ssh every host is told which it is and where the first one is.
check_by_hand() {
    if ! [[ $(option node_rank) =~ ^[0-9]+$ ]] || [ -z "$(option master_addr)" ]; then
        fail "--no_ssh needs --node_rank N (0 on the first host) and --master_addr FIRST_HOST"
    fi
    [ "$(option node_rank)" -lt "$hosts" ] || fail "there is no host $(option node_rank): $where names $hosts, from 0"
}

# The launcher joins the remote command with blanks and a shell reads it again; itself it only puts double quotes
# around words with a blank.
protect_words() {
    local i
    for ((i = 0; i < ${#words[@]}; i++)); do
        case ${words[i]} in
            *' '*) words[i]=$(printf %s "${words[i]}" | sed 's/[\\$`]/\\&/g') ;;
            *) words[i]=$(printf %q "${words[i]}") ;;
        esac
    done
}

# An environment file of the launcher, open as file 9 and already without a name: nothing is left to clean up.
pass_environment_on() {
    local file own
    file=$(mktemp)
    for own in "${DS_ENV_FILE:-$HOME/.deepspeed_env}" ./.deepspeed_env; do
        if [ -f "$own" ]; then sed '/^[[:space:]]*$/d' "$own" >> "$file"; fi
    done
    env | grep -E "$PASSED_ON" >> "$file" || true
    exec 9< "$file"
    rm -f "$file"
    export DS_ENV_FILE=/dev/fd/9
}

[ $# -gt 0 ] || usage
where=$1
shift
options=()
while [ $# -gt 0 ] && [ "$1" != train ] && [ "$1" != eval ]; do
    options+=("$1")
    shift
done
words=("$@")
[ ${#words[@]} -gt 1 ] || usage

"$python" -c 'import sys, importlib.util as found; sys.exit(found.find_spec("deepspeed") is None)' ||
    fail "DeepSpeed is not installed in $python: run bash launch/setup.sh deepspeed"

if is_count "$where"; then
    slots=$where
    places=(--num_gpus "$where")
elif [ -f "$where" ]; then
    read_hostfile "$where"
    places=(--hostfile "$where")
else
    fail "$where is neither a number of ranks nor a host file: see launch/hostfile.example"
fi
share_machine "$slots"
if ! is_count "$where"; then
    if has_option no_ssh; then
        check_by_hand
    elif [ "$hosts" = 1 ]; then
        fail "$where names one host: run bash launch/deepspeed.sh $slots on it"
    else
        command -v pdsh > /dev/null || fail "pdsh, which reaches the hosts, is not installed: install it or use --no_ssh"
        pass_environment_on
        protect_words
    fi
fi
exec "$python" -m deepspeed.launcher.runner "${places[@]}" ${options[@]+"${options[@]}"} --module mitrain "${words[@]}"
