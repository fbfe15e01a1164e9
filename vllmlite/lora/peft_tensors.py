"""The tensors of a PEFT adapter, by the module to which they belong.

https://huggingface.co/docs/peft/developer_guides/checkpoint has the names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from vllmlite.errors import ModelError
from vllmlite.weights.host import HostTensor

_PREFIX = "base_model.model."
_NAME = "(?:\\.default)?"
_TENSOR = re.compile(
    rf"(?P<module>.+?)\.(?:lora_(?P<factor>[AB]){_NAME}\.weight|lora_embedding_(?P<of_embedding>[AB]){_NAME}"
    rf"|(?P<magnitude>lora_magnitude_vector){_NAME}(?:\.weight)?|(?P<base>base_layer)\.weight"
    rf"|(?P<whole>(?:modules_to_save{_NAME}\.)?weight))"
)
_REFUSED = (
    (".bias", "lora_bias: biases are not supported"),
    (".token_adapter.", "trainable_token_indices: trained tokens are not supported"),
)
"""Parts of names of tensors that are not read, with the reason."""


@dataclass(slots=True)
class ModuleTensors:
    """The tensors of one module."""

    name: str
    """The module's name in the file."""
    factors: dict[str, HostTensor] = field(default_factory=dict)
    """``A`` and ``B``."""
    magnitude: HostTensor | None = None
    """The norms of the changed weight's rows (DoRA)."""
    base: HostTensor | None = None
    """A copy of the base model's weight."""
    whole: HostTensor | None = None
    """A weight that replaces the base model's."""

    @property
    def field(self) -> str:
        """Field of the configuration that lists the module."""
        return "target_modules" if self.factors else "modules_to_save"


def by_module(where: str, tensors: Iterable[tuple[str, HostTensor]]) -> dict[str, ModuleTensors]:
    """Return the tensors of each module. Raises ModelError, which begins with ``where``, for unknown names."""
    found: dict[str, ModuleTensors] = {}
    for name, tensor in tensors:
        for part, reason in _REFUSED:
            if part in name:
                raise ModelError(f"{where}: tensor {name[:200]!r}: {reason}")
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ModelError(f"{where}: tensor {name[:200]!r} is not part of a LoRA adapter")
        module = match["module"].removeprefix(_PREFIX)
        own = found.setdefault(module, ModuleTensors(module))
        if match["magnitude"]:
            own.magnitude = tensor
        elif match["base"]:
            own.base = tensor
        elif match["whole"]:
            own.whole = tensor
        else:
            own.factors[match["factor"] or match["of_embedding"]] = tensor
    return found
