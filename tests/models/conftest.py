"""The device fixture of the model tests."""

from __future__ import annotations

import pytest
import torch

DEVICES = ["cpu", "native", "native-cuda"]
"""The reference's, and the native backends."""


@pytest.fixture(params=[*DEVICES, "cuda"] if torch.cuda.is_available() else DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)
