# shellcheck shell=bash
# What demo and test share: a virtual environment in .venv, with what they need in it. Sourced; it expects
# `set -euo pipefail` and the repository root as working directory. Nothing is installed that is already there, so a
# second run needs no network. PYTHON chooses the interpreter that a new environment is made from.

# A plain torch from PyPI brings gigabytes of CUDA libraries. This version has wheels for Python 3.11 to 3.14, and where
# pip also sees an index of CPU builds (PIP_EXTRA_INDEX_URL), it takes 2.13.0+cpu, which counts as newer than 2.13.0.
# A torch that is there already, such as Debian's python3-torch, is used as it is.
TORCH=torch==2.13.0
RUN_NEEDS=(numpy tokenizers huggingface-hub jinja2 pyyaml)

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# need_venv REQUIREMENT...: make .venv, with torch, RUN_NEEDS and the REQUIREMENTs; sets VENV_PYTHON.
need_venv() {
    local base options=() missing=()
    VENV_PYTHON=$PWD/.venv/bin/python
    if ! usable "$VENV_PYTHON" pip; then
        base=$(find_python) || exit 1
        if has_torch "$base"; then
            options=(--system-site-packages)
        fi
        printf 'Making .venv from %s ...\n' "$base" >&2
        "$base" -m venv --clear "${options[@]}" .venv
    fi
    if ! has_torch "$VENV_PYTHON"; then
        missing=("$TORCH")
    fi
    mapfile -t -O ${#missing[@]} missing < <(unmet "${RUN_NEEDS[@]}" "$@")
    if [ ${#missing[@]} -gt 0 ]; then
        printf 'Installing %s ...\n' "${missing[*]}" >&2
        "$VENV_PYTHON" -m pip install --quiet --no-input --disable-pip-version-check "${missing[@]}" ||
            die 'pip failed; see above'
    fi
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

# unmet REQUIREMENT...: those of NAME or NAME==VERSION (with *) that .venv does not meet, a line each.
unmet() {
    "$VENV_PYTHON" - "$@" <<'END'
import sys
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version

for need in sys.argv[1:]:
    name, _, wanted = need.partition("==")
    try:
        met = fnmatchcase(version(name).partition("+")[0], wanted or "*")
    except PackageNotFoundError:
        met = False
    if not met:
        print(need)
END
}
