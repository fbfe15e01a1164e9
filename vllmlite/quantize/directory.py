"""Quantised checkpoints as directories of safetensors files with a ``config.json``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vllmlite.backends.base import Backend
from vllmlite.errors import ModelError, ParameterError
from vllmlite.hub.snapshot import CONFIG_FILES, INDEX
from vllmlite.models.hf_config import HfConfig
from vllmlite.models.multimodal import MULTIMODAL
from vllmlite.models.quantization_config import parse_quantization
from vllmlite.models.spec import DecoderSpec
from vllmlite.models.tensors import sources, stored_schemes
from vllmlite.quantize.calibration import Moments
from vllmlite.quantize.formats import Settings
from vllmlite.quantize.output import Output, Tensors
from vllmlite.weights.checkpoint import part_name
from vllmlite.weights.host import Floats, HostTensor, HostWeight, Scheme, float_tensor, float_values
from vllmlite.weights.json_object import read_object
from vllmlite.weights.packers import written_parts
from vllmlite.weights.parts import HEAD, ModelWeights, Source
from vllmlite.weights.schemes.float8 import Float8Scheme
from vllmlite.weights.writer import safetensors_checkpoint


class DirectoryOutput(Output):
    """A copy of the checkpoint in directory ``source`` whose products are quantised."""

    def __init__(
        self, source: Path, spec: DecoderSpec, weights: ModelWeights, settings: Settings, backend: Backend
    ) -> None:
        """Prepare the output. Raises ModelError or ParameterError for tensors that the format cannot store."""
        super().__init__(spec, weights, settings, backend)
        self.source = source
        if spec.architecture in MULTIMODAL and not settings.own:
            raise ParameterError(
                "format",
                settings.format,
                f"accepted for {spec.architecture}, whose vision tower is not copied: int8, int4 and those of GGUF",
            )
        if spec.keys.interleaved_experts is not None:
            raise ParameterError(
                "format",
                settings.format,
                f"accepted for {spec.architecture}: formats of GGUF, such as gguf-q4_0",
            )
        gates = [
            one.key.removesuffix(".weight")
            for name, one in sources(spec).items()
            if name.endswith(("router.weight", "shared_gate.weight"))
        ]
        if not settings.head and spec.keys.head != "lm_head":
            gates.append(spec.keys.head)
        self._config: dict[str, Any] = {"quantization_config": settings.config(gates)}
        quantization = parse_quantization(
            HfConfig(self._config["quantization_config"], "quantization_config")
        )
        made = replace(spec, quantization=quantization)
        if settings.head and spec.tie_word_embeddings:
            self._config["tie_word_embeddings"] = False
            made = replace(made, tie_word_embeddings=False)
        held = sources(made)
        if HEAD in weights.sources and HEAD not in held:
            held[HEAD] = weights.sources[HEAD]
        self.sources = held
        self._shapes, found = {one.key: one.stored for one in held.values()}, stored_schemes(made)
        self.schemes = {key: found[key] for key in self._shapes if key in found}
        for one in held.values():
            if one.key in self.schemes:
                _check_shape(source, one, self.schemes[one.key], settings)
        self.dtypes = {key: self._stored(key).dtype for key in self._shapes if key not in self.schemes}

    def open(self, work: Path) -> None:
        """Create the files in directory ``work``; what an earlier process wrote to them stays."""
        parts = {
            part_name(key, suffix): (part.dtype, part.shape)
            for key, scheme in self.schemes.items()
            for suffix, part in written_parts(scheme, self._shapes[key]).items()
        }
        floats = {key: (dtype, self._shapes[key]) for key, dtype in self.dtypes.items()}
        self.files = safetensors_checkpoint(work, {**parts, **floats})

    def write(
        self, tensors: Mapping[str, HostTensor], moments: Mapping[str, Moments], changed: set[str]
    ) -> Tensors:
        """Quantise and write ``tensors``, all those of some keys of the checkpoint, with the help of the ``moments`` of
        their inputs. Return their values as they were written; without ``moments``, only of tensors that stay as they
        are. ``changed``: names of tensors that differ from the source's."""
        written: Tensors = {}
        for key, names in self.keys(list(tensors)).items():
            own = [(self.sources[name], tensors[name]) for name in names]
            if key not in self.schemes:
                stored = self._stored(key)
                if changed.intersection(names):
                    stored = float_tensor(_assembled(own), stored.dtype)
                self.written.write(key, stored)
                meant: HostWeight = stored
            else:
                weight = self.quantized(key, _assembled(own), moments.get(names[0]))
                for suffix, part in weight.parts.items():
                    self.written.write(part_name(key, suffix), part)
                if not moments:
                    continue
                meant = float_tensor(weight.scheme.dequantize(weight), "float32")
            for name in names:
                taken = self.sources[name].take(meant)
                assert isinstance(taken, HostTensor)
                written[name] = float_tensor(float_values(taken), "float32")
        return written

    def finish(self, work: Path) -> Path:
        """Copy the files of the checkpoint besides tensors to ``work``, with the ``quantization_config``; return
        ``work``."""
        for pattern in CONFIG_FILES:
            for file in self.source.glob(pattern):
                if file.is_file() and file.name != INDEX:
                    shutil.copyfile(file, work / file.name)
        config = read_object(self.source / "config.json") | self._config
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return work

    def _stored(self, key: str) -> HostTensor:
        """Return the source's tensor ``key`` as it is stored."""
        found = self.weights.stored.tensor(key)
        assert isinstance(found, HostTensor)
        return found


def _assembled(parts: Sequence[tuple[Source, HostTensor]]) -> Floats:
    """Return the stored tensor that consists of ``parts``, tensors of the model, as float32."""
    first, tensor = parts[0]
    if first.rows is None:
        return float_values(tensor)
    whole = np.empty(first.stored, np.float32)
    for source, tensor in parts:
        values, begin = float_values(tensor), 0
        for span in source.rows or ():
            count = span[1] - span[0]
            whole[slice(*span)] = values[begin : begin + count]
            begin += count
    return whole


def _check_shape(path: Path, source: Source, scheme: Scheme, settings: Settings) -> None:
    """Raise an error that names the tensor if ``scheme`` cannot store it, or cannot be sliced into the fused parts."""
    key, shape, size = source.key, source.stored, settings.group_size or -1
    if not settings.own and not isinstance(scheme, Float8Scheme) and size > 0 and shape[1] % size:
        fitting = [str(one) for one in (128, 64, 32) if shape[1] % one == 0]
        raise ParameterError(
            "group_size",
            size,
            f"accepted for {key}, whose rows have {shape[1]} elements: {', '.join([*fitting, '-1'])}",
        )
    try:
        written_parts(scheme, shape)
    except ModelError as error:
        raise ModelError(f"{path}: tensor {key!r}: {error}") from error
    bounds = [bound for span in source.rows or () for bound in span]
    if any(bound % scheme.row_unit and bound != shape[0] for bound in bounds):
        raise ModelError(
            f"{path}: tensor {key!r}: its fused parts begin at rows {bounds[::2]}; accepted in {settings.format}: "
            f"multiples of {scheme.row_unit}"
        )
