#!/usr/bin/env bash
# Train: run one rank of the job that mpirun starts, or the only one.
#   mpirun -n RANKS launch/train.sh --config RECIPE --data DIR --out RUN [key=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked train/main.py "$@"
set_up
PWCNET_COMMAND=$0 exec python "$root/train/main.py" "$@"
