#!/usr/bin/env bash
# Run the tests, after setting up what they need; arguments go to pytest
# (python -m pytest --help).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked "" "$@"
set_up test tensorboard
cd "$root"
exec python -m pytest "$@"
