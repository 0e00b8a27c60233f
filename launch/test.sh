#!/usr/bin/env bash
# Run the tests, after setting up what they need; arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
set_up test tensorboard
cd "$root"
exec python -m pytest "$@"
