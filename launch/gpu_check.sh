#!/usr/bin/env bash
# Try and measure everything on a GPU machine, in ten minutes: figures in OUT/gpu_check.json, a
# table in OUT/gpu_check.md and here. Without a network: --wheels FOLDER, filled elsewhere by
#   pip download -d FOLDER '.[gpu,test]' 'setuptools >= 64' wheel
# under the same version of Python. Other options are those of tests/bench/gpu_check.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked tests/bench/gpu_check.py "$@"
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
    --wheels)
        [ -d "${2:-}" ] || fail "--wheels takes a folder of wheels, not '${2:-}'"
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
# Two gigabytes of CUDA libraries are of use only beside a driver.
! "$python" "$root/launch/doctor.py" --driver >/dev/null 2>&1 || extras+=(gpu)
set_up "${extras[@]}"
exec python "$root/tests/bench/gpu_check.py" ${arguments[@]+"${arguments[@]}"}
