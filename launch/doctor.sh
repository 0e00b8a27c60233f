#!/usr/bin/env bash
# Check what training needs on this machine, and say how to fix what fails. Nothing is installed; the other scripts
# do that.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked launch/doctor.py "$@"
environment=${VIRTUAL_ENV:-$root/.venv}
if "$environment/bin/python" "$root/launch/requirements.py" >/dev/null 2>&1; then
    set_up # everything is installed: this only sets the paths
    python=$environment/bin/python
elif [ -x "$environment/bin/python" ]; then
    export PATH="$environment/bin:$PATH"
    python=$environment/bin/python
else
    python=$(find_python) || exit 1
fi
PWCNET_COMMAND=$0 exec "$python" "$root/launch/doctor.py" "$@"
