#!/usr/bin/env bash
# Set up what the tests need and run them. Arguments go to pytest (see python -m pytest --help).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked "" "$@"
set_up test tensorboard
cd "$root"
exec python -m pytest "$@"
