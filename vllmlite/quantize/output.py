"""Base class of the writers of quantised checkpoints, with the parts that are common to all file formats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from vllmlite.backends.base import Backend
from vllmlite.errors import ModelError
from vllmlite.models.spec import DecoderSpec
from vllmlite.quantize.calibration import Moments
from vllmlite.quantize.formats import FLOAT8_BLOCK, Settings
from vllmlite.quantize.gptq import Inputs, gptq
from vllmlite.quantize.rounding import Grid, nearest
from vllmlite.weights.host import Floats, HostTensor, PackedWeight, Scheme, float_tensor
from vllmlite.weights.packers import packed, packed_float8
from vllmlite.weights.parts import ModelWeights, Source
from vllmlite.weights.schemes.float8 import LARGEST, Float8Scheme
from vllmlite.weights.writer import Checkpoint

Tensors: TypeAlias = dict[str, HostTensor]


class Output(ABC):
    """A checkpoint of the model ``spec`` with quantised ``weights``. Nothing is written before :meth:`open`."""

    sources: Mapping[str, Source]
    """For each tensor of the model, by name, where the new checkpoint stores it."""
    schemes: Mapping[str, Scheme]
    """Quantisation scheme of each quantised tensor, by its key in the new checkpoint."""
    dtypes: Mapping[str, str]
    """Dtype of each other tensor, by its key in the new checkpoint."""

    def __init__(
        self, spec: DecoderSpec, weights: ModelWeights, settings: Settings, backend: Backend
    ) -> None:
        self.spec, self.weights, self.settings, self.backend = spec, weights, settings, backend
        self.files: Checkpoint | None = None
        self._latest: tuple[Moments, Inputs] | None = None

    @abstractmethod
    def open(self, work: Path) -> None:
        """Create the files in directory ``work``; what an earlier process wrote to them stays."""

    @abstractmethod
    def write(
        self, tensors: Mapping[str, HostTensor], moments: Mapping[str, Moments], changed: set[str]
    ) -> Tensors:
        """Quantise and write ``tensors``, all those of some keys of the checkpoint, with the help of the ``moments`` of
        their inputs. Return their values as they were written; without ``moments``, only of tensors that stay as they
        are. ``changed``: names of tensors that differ from the source's."""

    @abstractmethod
    def finish(self, work: Path) -> Path:
        """Write the parts of the checkpoint besides tensors to directory ``work``. Returns the finished file, or
        ``work`` if the checkpoint is a directory."""

    @property
    def written(self) -> Checkpoint:
        """The open files."""
        assert self.files is not None
        return self.files

    def close(self) -> None:
        """Close the files."""
        if self.files is not None:
            self.files.close()

    def keys(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Return the keys of the new checkpoint that hold the tensors ``names``, each with those of ``names`` that it
        holds."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self.sources[name].key, []).append(name)
        return found

    def grids(self, names: Sequence[str]) -> dict[str, Grid]:
        """Return the grids of the products among the tensors ``names``."""
        chosen = {name: self.sources[name] for name in names if self.sources[name].product}
        return {name: self._grid(self.schemes[one.key], one.stored[-1]) for name, one in chosen.items()}

    def quantized(self, key: str, weight: Floats, moments: Moments | None) -> PackedWeight:
        """Return ``weight``, rows of the tensor ``key``, quantised. ModelError names the tensor."""
        try:
            return self._quantized(self.schemes[key], weight, moments)
        except ModelError as error:
            raise ModelError(f"tensor {key!r}: {error}") from error

    def _quantized(self, scheme: Scheme, weight: Floats, moments: Moments | None) -> PackedWeight:
        settings = self.settings
        if not np.isfinite(weight).all():
            raise ModelError("values that are not finite cannot be quantised")
        if settings.own:
            return self.backend.quantize(float_tensor(weight, "float32"), settings.format)
        if isinstance(scheme, Float8Scheme):
            return packed_float8(weight, _block_scales(weight), scheme)
        grid = self._grid(scheme, weight.shape[1])
        if moments is None or not moments.rows:
            return packed(nearest(weight, grid, search=grid.bits < 8), scheme)
        return packed(gptq(weight, grid, self._inputs(moments)), scheme)

    def _inputs(self, moments: Moments) -> Inputs:
        """Return the properties of inputs that GPTQ needs, from their ``moments``. The last result is kept for further
        weights with the same inputs."""
        if self._latest is None or self._latest[0] is not moments:
            self._latest = moments, Inputs.of(moments.gram, self.settings.act_order)
        return self._latest[1]

    def _grid(self, scheme: Scheme, columns: int) -> Grid:
        settings = self.settings
        assert (
            settings.bits is not None and settings.group_size is not None and settings.symmetric is not None
        )
        bits = 8 if scheme.name == "Q8_0" else settings.bits
        return Grid(
            bits, columns if settings.group_size == -1 else settings.group_size, settings.symmetric, scheme
        )


def _block_scales(weight: Floats) -> Floats:
    """Return the scale of each block of 128 rows and columns."""
    rows, columns = weight.shape
    size = FLOAT8_BLOCK
    padded = np.pad(np.abs(weight), ((0, -rows % size), (0, -columns % size)))
    largest = padded.reshape(padded.shape[0] // size, size, -1, size).max((1, 3))
    return np.where(largest > 0, largest / LARGEST, 1).astype(np.float32)
