# shellcheck shell=bash
# Sets up the Python environment for the scripts in this folder, which source this file and call `set_up EXTRA ...`.
# The environment is the active virtual environment, else .venv in the checkout, which is created if necessary.
# Packages that setup.cfg requires are installed if they are missing.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# mpirun refuses to run as root unless both are set; in containers root is the usual user.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

fail() {
    echo "error: $*" >&2
    exit 1
}

# Whether MindSpore has wheels for the interpreter $1.
is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

find_python() {
    local name
    for name in python3.12 python3.11 python3.10 python3 python; do
        if is_supported "$name"; then
            echo "$name"
            return
        fi
    done
    fail "no Python 3.10, 3.11 or 3.12 on the PATH (python3 is $(python3 --version 2>/dev/null || echo missing));" \
        "install one of them"
}

# help_if_asked COMMAND "$@": if an argument is -h or --help, print the comment at the top of the script and the help
# of the Python command, if its imports are installed, and exit. Nothing is set up.
help_if_asked() {
    local command=$1 argument python text
    shift
    for argument; do
        case $argument in
        -h | --help)
            awk 'NR == 1 || /^#SBATCH/ { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$0"
            [ -n "$command" ] || exit 0
            python=${VIRTUAL_ENV:-$root/.venv}/bin/python
            [ -x "$python" ] || python=$(find_python 2>/dev/null) || exit 0
            text=$(PWCNET_COMMAND=$0 "$python" "$root/$command" --help 2>/dev/null) ||
                text="The options of $command are listed here once the environment has been set up."
            printf '\n%s\n' "$text"
            exit 0
            ;;
        esac
    done
}

make_environment() {
    local python
    python=$(find_python) || exit 1
    rm -rf "$environment"
    "$python" -m venv "$environment" >&2 ||
        fail "$python cannot create a virtual environment; install venv (on Debian: apt install python3-venv)"
}

# set_up EXTRA ...: put the environment on the PATH, with these extras of setup.cfg installed.
set_up() {
    environment=${VIRTUAL_ENV:-$root/.venv}
    local check=("$environment/bin/python" "$root/launch/requirements.py" "$@")
    if ! "${check[@]}" >/dev/null 2>&1; then
        # All ranks of a job start at once: one sets up the environment, the others wait.
        exec 9>"$environment.lock" ||
            fail "$environment.lock: cannot be written, but the environment must be set up; check the permissions"
        flock 9
        if [ -n "${VIRTUAL_ENV:-}" ]; then
            is_supported "$environment/bin/python" ||
                fail "the active environment $environment has $("$environment/bin/python" --version 2>&1), expected" \
                    "Python 3.10 to 3.12; deactivate it and try again"
        elif ! is_supported "$environment/bin/python" || ! "$environment/bin/python" -m pip --version \
            >/dev/null 2>&1; then
            make_environment
        fi
        if ! "${check[@]}" >/dev/null 2>&1; then
            local extras=$*
            echo "Installing packages into $environment (once; MindSpore is 770 MB) ..." >&2
            "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
                -e "$root${extras:+[${extras// /,}]}" >&2 ||
                fail "pip could not install the packages into $environment; see its message above"
        fi
        exec 9>&-
    fi
    export PATH="$environment/bin:$PATH"
    # The CUDA libraries of the extra "gpu" must be on the path before Python starts, and MindSpore loads its plugin
    # for CUDA 11.6 only if the nvcc in CUDA_HOME reports such a version.
    local folder
    for folder in "$environment"/lib/python3*/site-packages/nvidia/*/lib; do
        [ ! -d "$folder" ] || export CUDA_HOME="$root/launch/cuda" \
            LD_LIBRARY_PATH="$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    done
}
