"""The mark of tests that need the native CPU backend, which a build without its extension lacks."""

from __future__ import annotations

import pytest

from vllmlite.backends.cpu import CpuBackend
from vllmlite.errors import BackendError


def _missing() -> str:
    try:
        CpuBackend()
    except BackendError as error:
        return str(error)
    return ""


needs_native_cpu = pytest.mark.skipif(bool(_missing()), reason=f"needs the native CPU backend: {_missing()}")
