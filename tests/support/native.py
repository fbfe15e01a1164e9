"""Whether the native CPU backend is there, and a mark for tests that need it: a build may lack its extension."""

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
