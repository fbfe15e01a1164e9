"""The form in which the weights of matrix products reach a backend: as stored, repacked, quantised at load, or as
floats.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cache

from vllmlite.backends.base import Backend
from vllmlite.weights.host import HostTensor, HostWeight, PackedWeight, Scheme
from vllmlite.weights.schemes.float4 import MXFP4
from vllmlite.weights.schemes.float8 import Float8Scheme
from vllmlite.weights.schemes.gguf_blocks import BLOCK_SCHEMES, BlockScheme, to_tiles
from vllmlite.weights.schemes.grouped import GroupableScheme, GroupedScheme
from vllmlite.weights.schemes.tiles import TILES

logger = logging.getLogger(__name__)

GGML_MXFP4 = BLOCK_SCHEMES["MXFP4"]
"""ggml's blocks of the scheme MXFP4."""
LOAD_SCHEMES: dict[str, Scheme] = {**TILES, "fp8": Float8Scheme("channel", inputs="dynamic")}
"""The scheme of weights that are quantised at load, by the name of the quantisation."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Decides the form of each weight, and brings it into that form."""

    backend: Backend
    quantization: str | None = None
    """How weights stored as floats are quantised at load: a key of :data:`LOAD_SCHEMES`."""
    keep_blocks: bool = False
    """Leave ggml's blocks packed if the backend multiplies them; otherwise they become floats."""
    head: str | None = None
    """The scheme in which an output layer stored as floats is quantised at load."""
    int8_activations: bool = False
    """Products with integer weights in groups quantise activations to int8."""

    def scheme(self, stored: Scheme | None, head: bool = False) -> Scheme | None:
        """Return the scheme in which the backend gets a weight that is stored in the scheme ``stored``; None means as
        floats. ``head``: it is the output layer."""
        if head and stored is None and self.head is not None:
            return TILES[self.head]
        native = stored is not None and stored.name in self.backend.schemes
        if isinstance(stored, BlockScheme):
            if self.quantization is None:
                if self.keep_blocks and stored is GGML_MXFP4:
                    return self.scheme(MXFP4)
                return stored if native and self.keep_blocks else None
            if stored.tiles is not None and stored.tiles.name == self.quantization:
                return stored if native else stored.tiles
        elif isinstance(stored, GroupedScheme) or (isinstance(stored, GroupableScheme) and not native):
            grouped = stored if isinstance(stored, GroupedScheme) else stored.grouped
            if grouped is not None and not grouped.floats and self.int8_activations:
                grouped = replace(grouped, int8_input=True)
            return grouped if grouped is not None and grouped.name in self.backend.schemes else None
        elif stored is not None:
            return stored if native else None
        return None if self.quantization is None else LOAD_SCHEMES[self.quantization]

    def treatment(self, stored: Scheme | None, packed: bool = True) -> str:
        """Describe how weights that are stored in the scheme ``stored`` (None: as floats) are put on the backend. If
        ``packed`` is False, the backend gets them as floats in any case."""
        scheme = self.scheme(stored) if packed else None
        if scheme is None:
            return f"in {self.backend.dtype}" if stored is None else f"dequantised to {self.backend.dtype}"
        if isinstance(stored, BlockScheme) and stored.tiles is not None and scheme in (stored, stored.tiles):
            rounded = f" as {stored.tiles.name} with scales rounded to bfloat16"
            return "kept" + rounded * (stored.tiles.scale_dtype == "bfloat16")
        kept = scheme is stored or isinstance(stored, GroupableScheme) or stored is GGML_MXFP4
        return "kept" if kept else f"quantised to {scheme.name}"

    def activations(self, stored: Scheme | None) -> str:
        """Name the dtype that activations have in products with weights that are stored in ``stored``."""
        scheme = self.scheme(stored)
        wanted = None if stored is None else stored.input_dtype
        found = (None if scheme is None else scheme.input_dtype) or self.backend.dtype
        return found if wanted in (None, found) else f"{found}, not {wanted}"

    def __call__(self, weight: HostWeight, head: bool = False) -> HostWeight:
        """Return ``weight`` in the form that :meth:`scheme` names. Raises ModelError for values that cannot be
        quantised, and for scales that are not finite."""
        stored = weight.scheme if isinstance(weight, PackedWeight) else None
        scheme = self.scheme(stored, head)
        if scheme is None:
            return self.floats(weight)
        if isinstance(weight, PackedWeight):
            if scheme is stored or isinstance(stored, GroupedScheme):
                return replace(weight, scheme=scheme)
            if isinstance(stored, BlockScheme) and scheme is stored.tiles:
                return to_tiles(weight)
            if stored is GGML_MXFP4 and self.quantization is None:
                weight, stored = MXFP4.of_ggml(weight), MXFP4
            if isinstance(stored, GroupableScheme):
                grouped = stored.to_grouped(weight, self.backend.repack)
                return self._ungrouped(weight) if grouped is None else replace(grouped, scheme=scheme)
        return self.backend.quantize(self.floats(weight), scheme.name)

    def floats(self, weight: HostWeight, dtype: str | None = None) -> HostTensor:
        """Return ``weight`` as it is if its elements are floats, else dequantised to ``dtype``: by default the
        backend's, or float32 if floats are to be quantised."""
        if isinstance(weight, HostTensor):
            return weight
        return self.backend.dequantize(
            weight, dtype or (self.backend.dtype if self.quantization is None else "float32")
        )

    def _ungrouped(self, weight: PackedWeight) -> HostTensor:
        _tell_of_floats(weight.scheme.name, self.backend.dtype)
        return self.floats(weight)


@cache
def _tell_of_floats(name: str, dtype: str) -> None:
    logger.warning(
        "%s weights with uneven groups, in e5m2 or with scales above 128 are dequantised to %s", name, dtype
    )
