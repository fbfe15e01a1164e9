"""Whether the native CPU backend is available, and a mark for tests that need it."""

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


HAS_NATIVE_CPU = not _missing()
needs_native_cpu = pytest.mark.skipif(
    not HAS_NATIVE_CPU, reason=f"needs the native CPU backend: {_missing()}"
)
