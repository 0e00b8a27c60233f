#!/usr/bin/env bash
# Check style, types and scripts: ruff, basedpyright, clang-format and shellcheck. Nothing is changed.
# ruff check --fix, ruff format and clang-format -i fix most of what is found.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
help_if_asked "" "$@"
[ $# -eq 0 ] || fail "lint.sh takes no arguments, not '$*'"
set_up lint test tensorboard # types are checked against the installed packages
cd "$root"

status=0
check() {
    echo "== $*" >&2
    "$@" || status=1
}

shopt -s globstar nullglob
check ruff check --quiet --output-format concise
check ruff format --check
check basedpyright --level error --pythonpath "$environment/bin/python"
check clang-format --dry-run --Werror model/native/**/*.{cpp,cu,h}
if command -v shellcheck >/dev/null; then
    check shellcheck --external-sources --source-path=SCRIPTDIR --exclude=SC2119 launch/*.sh .ci/run
else
    echo "note: shellcheck is not installed, so the scripts were not checked" >&2
fi
[ "$status" = 0 ] || fail "not clean; see above"
echo "Clean: style, types and scripts."
