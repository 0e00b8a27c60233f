#!/usr/bin/env bash
# Train: one rank of the job, started by mpirun, or the only one.
#   mpirun -n RANKS launch/train.sh --config RECIPE --data DIR --out RUN [key=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked train/main.py "$@"
set_up
exec python "$root/train/main.py" "$@"
