#!/usr/bin/env bash
# Test and measure everything on a GPU machine, in ten minutes: results go to OUT/gpu_check.json, and as a table to
# OUT/gpu_check.md and the terminal. Without a network, add --wheels FOLDER, filled elsewhere with the same Python by
#   pip download -d FOLDER '.[gpu,test]' 'setuptools >= 64' wheel
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked tests/bench/gpu_check.py "$@"
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
    --wheels)
        [ -d "${2:-}" ] || fail "--wheels is '${2:-}', expected a folder of wheels"
        PIP_FIND_LINKS=$(cd "$2" && pwd)
        export PIP_NO_INDEX=1 PIP_FIND_LINKS
        shift 2
        ;;
    *)
        arguments+=("$1")
        shift
        ;;
    esac
done
python=${VIRTUAL_ENV:-$root/.venv}/bin/python
[ -x "$python" ] || python=$(find_python) || exit 1
extras=(test)
# The 1.7 GB of CUDA libraries need a driver.
! "$python" "$root/launch/doctor.py" --driver >/dev/null 2>&1 || extras+=(gpu)
set_up "${extras[@]}"
PWCNET_COMMAND=$0 exec python "$root/tests/bench/gpu_check.py" ${arguments[@]+"${arguments[@]}"}
