# The Python environment of the scripts beside this file, which source it and call `set_up EXTRA ...`:
# the active virtual environment, else .venv in the checkout, which is made if it is not there. Either
# gets what setup.cfg names, if it lacks it.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# mpirun refuses root unless told twice; in containers everybody is root.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

fail() {
    echo "error: $*" >&2
    exit 1
}

# Whether the interpreter $1 is one that MindSpore has wheels for.
fits() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

find_python() {
    local name
    for name in python3.12 python3.11 python3.10 python3 python; do
        if fits "$name"; then
            echo "$name"
            return
        fi
    done
    fail "no Python 3.10, 3.11 or 3.12 on the PATH (python3 there is" \
        "$(python3 --version 2>/dev/null || echo missing)); install one of them"
}

# help_if_asked COMMAND "$@": where an argument asks for help, print the comment at the top of the script
# and the help of the Python command, if what it imports is there; and end. Nothing is installed.
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
            text=$("$python" "$root/$command" --help 2>/dev/null) ||
                text="The options of $command are shown here when the environment has been set up."
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
        fail "$python cannot make a virtual environment (on Debian: apt install python3-venv)"
}

# Put the environment on the PATH with the extras of setup.cfg that are named.
set_up() {
    environment=${VIRTUAL_ENV:-$root/.venv}
    local check=("$environment/bin/python" "$root/launch/requirements.py" "$@")
    if ! "${check[@]}" >/dev/null 2>&1; then
        # The ranks of a job start all at once: one sets up, the others wait for it.
        exec 9>"$environment.lock" ||
            fail "$environment.lock cannot be written, and the environment beside it must be set up"
        flock 9
        if [ -n "${VIRTUAL_ENV:-}" ]; then
            fits "$environment/bin/python" ||
                fail "the active environment $environment has no Python 3.10 to 3.12 (it says" \
                    "$("$environment/bin/python" --version 2>&1)); deactivate it and start again"
        elif ! fits "$environment/bin/python" || ! "$environment/bin/python" -m pip --version \
            >/dev/null 2>&1; then
            make_environment
        fi
        if ! "${check[@]}" >/dev/null 2>&1; then
            local extras=$*
            echo "Installing into $environment: MindSpore is 300 MB, once ..." >&2
            "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
                -e "$root${extras:+[${extras// /,}]}" >&2 ||
                fail "pip could not install the packages into $environment; its message is above"
        fi
        exec 9>&-
    fi
    export PATH="$environment/bin:$PATH"
    # The CUDA libraries of the extra "gpu" must be on the path before Python starts; and MindSpore
    # takes its plugin for CUDA 11.6 only where CUDA_HOME has an nvcc that says such a version.
    local folder
    for folder in "$environment"/lib/python3*/site-packages/nvidia/*/lib; do
        [ ! -d "$folder" ] || export CUDA_HOME="$root/launch/cuda" \
            LD_LIBRARY_PATH="$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    done
}
