"""Quantised checkpoints as GGUF files, with the tokenizer and the chat templates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vllmlite.backends.base import Backend
from vllmlite.models.gguf import in_pairs
from vllmlite.models.gguf_metadata import (
    check_description,
    extra_tensors,
    gguf_family,
    gguf_metadata,
    written_keys,
)
from vllmlite.models.spec import DecoderSpec
from vllmlite.models.tensors import sources
from vllmlite.quantize.calibration import Moments
from vllmlite.quantize.formats import Settings
from vllmlite.quantize.output import Output, Tensors
from vllmlite.runner.generation_config import eos_ids
from vllmlite.tokenizers.gguf_metadata import check_tokenizer, tokenizer_metadata
from vllmlite.tokenizers.tokenizer import Tokenizer
from vllmlite.weights.gguf_writer import Entry, gguf_checkpoint
from vllmlite.weights.host import HostTensor, HostWeight, PackedWeight, float_tensor, float_values
from vllmlite.weights.json_object import read_object
from vllmlite.weights.parts import HEAD, TABLE, ModelWeights, Source
from vllmlite.weights.schemes.gguf_blocks import BLOCK_SCHEMES, FLOATS, block_data

FILE = "model.gguf"
"""The file's name while it is being written."""
FILE_TYPES = {"gguf-q4_0": 2, "gguf-q8_0": 7}
"""Format → llama.cpp's number for a file of mostly this type."""
_TOKENS_OF_PHI3 = ("<s>", "</s>", "<unk>", "<|endoftext|>")
_KINDS = {dtype: kind for kind, dtype in FLOATS.items()}


class GgufOutput(Output):
    """A GGUF file of the model in directory ``source``.

    The output layer, which may be the embedding table, is stored as Q8_0; norms, biases, routers and learned positions
    as F32; matrices whose rows are not whole blocks as they are."""

    def __init__(
        self, source: Path, spec: DecoderSpec, weights: ModelWeights, settings: Settings, backend: Backend
    ) -> None:
        """Prepare the output. Raises ModelError for families and tokenizers that GGUF files cannot store."""
        super().__init__(spec, weights, settings, backend)
        self.source = source
        self._architecture, self._family = gguf_family(source, spec)
        keys = written_keys(self._family, spec)
        self._spec = replace(spec, keys=keys, tie_word_embeddings=HEAD not in weights.sources)
        self.sources = sources(self._spec)
        scheme = BLOCK_SCHEMES[settings.format.removeprefix("gguf-").upper()]
        schemes, self.dtypes = {}, {}
        for name, one in self.sources.items():
            if not one.product and name != TABLE:
                self.dtypes[one.key] = "float32"
            elif one.stored[-1] % scheme.elements:
                self.dtypes[one.key] = weights.floats(name).dtype
            else:
                head = name == (TABLE if HEAD not in self.sources else HEAD)
                schemes[one.key] = BLOCK_SCHEMES["Q8_0"] if head else scheme
        self.schemes = schemes
        self._tokenizer = Tokenizer(source)
        generation = read_object(source / "generation_config.json", optional=True)
        ends = eos_ids(generation, source, self._tokenizer)
        self._metadata: dict[str, Any] = {
            "general.architecture": self._architecture,
            "general.type": "model",
            "general.name": _model_name(source, self._tokenizer),
            "general.file_type": FILE_TYPES[settings.format],
            "general.quantization_version": 2,
            **gguf_metadata(self._architecture, self._family, self._spec),
            **tokenizer_metadata(self._tokenizer, source, spec.vocab_size, ends),
        }

    def open(self, work: Path) -> None:
        """Create the files in directory ``work``; what an earlier process wrote to them stays. Raises ModelError if the
        file would be read differently from the source."""
        extra = extra_tensors(self.spec)
        table = {name: Entry("F32", values.shape) for name, values in extra.items()}
        for one in self.sources.values():
            kind = self.schemes[one.key].name if one.key in self.schemes else _KINDS[self.dtypes[one.key]]
            table[one.key] = Entry(kind, self._shape(one))
        path = work / FILE
        self.files = gguf_checkpoint(path, self._metadata, table)
        for name, values in extra.items():
            self.files.write(name, float_tensor(values, "float32"))
        check_description(self.source, self._spec, path)
        check_tokenizer(self._tokenizer, self.source, path)

    def write(
        self, tensors: Mapping[str, HostTensor], moments: Mapping[str, Moments], changed: set[str]
    ) -> Tensors:
        """Quantise and write ``tensors``, all those of some keys of the checkpoint, with the help of the ``moments`` of
        their inputs. Return their values as they were written; without ``moments``, only of tensors that stay as they
        are. ``changed``: names of tensors that differ from the source's."""
        written: Tensors = {}
        for name, tensor in tensors.items():
            one = self.sources[name]
            values = float_values(tensor)
            offset = np.float32(self.spec.norm.unit_offset and name.endswith("norm.weight"))
            weight: HostWeight = (
                self.quantized(one.key, values, moments.get(name))
                if one.key in self.schemes
                else float_tensor(values + offset, self.dtypes[one.key])
            )
            stored, heads = weight, self._heads(name)
            if heads:
                stored = in_pairs(stored, heads)
            data = block_data(stored) if isinstance(stored, PackedWeight) else stored.data
            first = one.rows[0][0] if one.rows else 0
            self.written.write_part(one.key, data, first * (data.nbytes // one.shape[0]))
            if isinstance(weight, HostTensor):
                written[name] = float_tensor(float_values(weight) - offset, "float32")
            elif moments:
                written[name] = float_tensor(weight.scheme.dequantize(weight), "float32")
        return written

    def finish(self, work: Path) -> Path:
        """Write the parts of the checkpoint besides tensors to directory ``work``. Returns the finished file."""
        return work / FILE

    def _heads(self, name: str) -> int:
        """Return the number of heads whose rows are reordered; 0 if the tensor's rows are not."""
        if not self._family.reordered or name.split(".")[1] not in ("q", "k"):
            return 0
        return self.spec.num_heads if name.split(".")[1] == "q" else self.spec.num_kv_heads

    def _shape(self, source: Source) -> tuple[int, ...]:
        """Return the shape in the file's table: experts have a dimension of their own, single rows have none."""
        rows, *columns = source.stored
        if source.key.endswith("_exps.weight"):
            experts = max(layer.moe.num_experts for layer in self.spec.layers if layer.moe)
            return experts, rows // experts, *columns
        return tuple(columns) if columns and rows == 1 else source.stored


def _model_name(source: Path, tokenizer: Tokenizer) -> str:
    """Return the name of a model: that of its repository in the hub's cache, or of its directory.

    llama.cpp treats the special tokens of a model named Phi-3 differently, and fails if the model lacks any of them."""
    parts = source.resolve().parts
    name = next((part.split("--")[-1] for part in parts if part.startswith("models--")), parts[-1])
    if re.search("phi-?3", name, re.IGNORECASE) and None in map(tokenizer.token_id, _TOKENS_OF_PHI3):
        return re.sub("(?i)phi-?3", "phi_3", name)
    return name
