#!/usr/bin/env bash
# Rerun a resumable command after a failure, up to N times:
#   launch/retry.sh [--delay SECONDS] N COMMAND ...
#   launch/retry.sh 5 mpirun -n 8 launch/train.sh --config chairs --data DIR --out RUN
# The delay before a restart, 10 s by default, doubles each time, up to 10 minutes. The command is not restarted after
# Ctrl-C, SIGTERM or SIGUSR1, which are forwarded to it; after an invalid command line (status 2); or after a restart
# without progress: no newer checkpoint in RUN, or no further shard of a conversion.
set -uo pipefail

usage() {
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

fail() {
    echo "error: $*" >&2
    exit 2
}

delay=10 longest=600
while [[ ${1:-} == -* ]]; do
    case $1 in
    -h | --help)
        usage
        exit
        ;;
    --delay)
        delay=${2:-}
        [[ $delay =~ ^[0-9]+$ ]] || fail "--delay is '$delay', expected whole seconds, such as 10"
        delay=$((10#$delay)) # in base 10: bash would read 08 as an invalid octal number
        shift 2
        ;;
    *) fail "$1: unknown option; see launch/retry.sh --help" ;;
    esac
done
[[ ${1:-} =~ ^[0-9]+$ ]] || fail "the first argument is '${1:-}', expected the number of restarts; see launch/retry.sh --help"
[ $# -gt 1 ] || fail "expected a command after the number of restarts; see launch/retry.sh --help"
restarts=$((10#$1))
shift

out=
arguments=("$@")
for index in "${!arguments[@]}"; do
    case ${arguments[index]} in
    --out) out=${arguments[index + 1]:-} ;;
    --out=*) out=${arguments[index]#--out=} ;;
    esac
done
[ -n "$out" ] || fail "the command has no --out, which shows whether a restart made progress; add --out FOLDER"

# Progress of the command: its newest checkpoint and the number of converted shards.
progress() {
    local newest
    newest=$(find "$out/checkpoints" -name 'step-????????.ckpt' 2>/dev/null | sort | tail -n 1)
    echo "${newest##*/} $(find "$out" "$out.partial" -name '*.mindrecord' 2>/dev/null | wc -l)"
}

child='' stopped='' signals=0
forward() {
    stopped=$1
    signals=$((signals + 1))
    [ -z "$child" ] || kill -s "$1" "$child" 2>/dev/null
}
for name in INT TERM HUP USR1; do
    # shellcheck disable=SC2064 # expand the name now
    trap "forward $name" "$name"
done

set -m # without job control, commands in the background ignore Ctrl-C
for ((attempt = 0; ; attempt++)); do
    before=$(progress)
    "$@" &
    child=$!
    seen=-1
    while [ "$seen" != "$signals" ]; do # a signal ends `wait` early
        seen=$signals
        wait "$child"
        status=$?
    done
    child=''
    reason=
    if [ "$status" = 0 ] || [ -n "$stopped" ] || [ "$status" = 130 ] || [ "$status" = 143 ]; then
        exit "$status"
    elif [ "$status" = 2 ]; then
        reason="its command line is invalid"
    elif [ "$attempt" -gt 0 ] && [ "$(progress)" = "$before" ]; then
        reason="the restart made no progress in $out"
    elif [ "$attempt" -ge "$restarts" ]; then
        reason="it has been restarted $restarts time(s)"
    fi
    if [ -n "$reason" ]; then
        echo "error: the command failed with status $status and is not restarted: $reason" >&2
        exit "$status"
    fi
    echo "note: the command failed with status $status; restart $((attempt + 1)) of $restarts in $delay s" >&2
    sleep "$delay" &
    child=$!
    wait "$child"
    [ -z "$stopped" ] || exit 143
    delay=$((2 * delay < longest ? 2 * delay : longest))
done
