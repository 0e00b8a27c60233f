#!/usr/bin/env bash
# Set up what the tests need, check style and types (launch/lint.sh) and run the tests. With arguments, which go to
# pytest (see python -m pytest --help), only the tests.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked "" "$@"
set_up test tensorboard
cd "$root"
[ $# -gt 0 ] || launch/lint.sh
exec python -m pytest "$@"
