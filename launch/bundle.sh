#!/usr/bin/env bash
# Set up the environment on a machine without a network.
#   launch/bundle.sh --python 3.12 --gpu --strip --split 60M --out DIR   # where there is a network: collect
#   launch/bundle.sh --install DIR                                      # there: install from the collected files
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked launch/bundle.py "$@"
python=${VIRTUAL_ENV:-$root/.venv}/bin/python
[ -x "$python" ] || python=$(find_python) || exit 1
PWCNET_COMMAND=$0 exec "$python" "$root/launch/bundle.py" "$@"
