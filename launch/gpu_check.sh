#!/usr/bin/env bash
# Test and measure everything on a GPU machine, in ten minutes: results go to OUT/gpu_check.json, and as a table to
# OUT/gpu_check.md and the terminal. Without a network, run launch/bundle.sh --install first.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked tests/bench/gpu_check.py "$@"
python=${VIRTUAL_ENV:-$root/.venv}/bin/python
[ -x "$python" ] || python=$(find_python) || exit 1
extras=(test)
# The 1.7 GB of CUDA libraries need a driver.
! "$python" "$root/launch/doctor.py" --driver >/dev/null 2>&1 || extras+=(gpu)
set_up "${extras[@]}"
PWCNET_COMMAND=$0 exec python "$root/tests/bench/gpu_check.py" "$@"
