#!/usr/bin/env bash
# Say what this machine can do and what to do about what it cannot. Nothing is installed: the other
# scripts do that.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked launch/doctor.py "$@"
environment=${VIRTUAL_ENV:-$root/.venv}
if "$environment/bin/python" "$root/launch/requirements.py" >/dev/null 2>&1; then
    set_up # everything is there: this sets the paths
    python=$environment/bin/python
elif [ -x "$environment/bin/python" ]; then
    export PATH="$environment/bin:$PATH"
    python=$environment/bin/python
else
    python=$(find_python) || exit 1
fi
exec "$python" "$root/launch/doctor.py" "$@"
