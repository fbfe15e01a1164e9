"""The backend fixtures of the op tests."""

from __future__ import annotations

import pytest
from op_backends import BACKENDS, parameters

from vllmlite.backends.base import Backend
from vllmlite.weights.host import FLOAT_DTYPES


@pytest.fixture(params=parameters(*FLOAT_DTYPES))
def backend(request: pytest.FixtureRequest) -> Backend:
    name, dtype = request.param.rsplit("-", 1)
    return BACKENDS[name](dtype)


@pytest.fixture(params=parameters())
def exact(request: pytest.FixtureRequest) -> Backend:
    """Each backend, in float32 only, for ops with next to no rounding."""
    return BACKENDS[request.param]("float32")
