"""Pooling parameters of an embedding request, under vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass

from vllmlite.errors import ParameterError
from vllmlite.tokenizers.truncation import check_truncation

POOLING_TYPES = ("LAST", "MEAN")
"""How a prompt's hidden states become one vector: the last token's, or the mean of all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """How to make a vector of a prompt. Raises :class:`ParameterError` on bad values."""

    pooling_type: str | None = None
    """One of :data:`POOLING_TYPES`; None: the engine's ``pooling_type``."""
    normalize: bool | None = None
    """Scale the vector to length 1; None: the engine's ``pooling_normalize``."""
    dimensions: int | None = None
    """Keep the first this many elements (Matryoshka embeddings, Kusupati et al. 2022), before it is scaled."""
    truncate_prompt_tokens: int | None = None
    """Keep only this many tokens of the prompt; -1: as many as fit the model's context."""
    truncation_side: str | None = None
    """Where ``truncate_prompt_tokens`` drops tokens: left, the default, keeps the prompt's end, right its start."""

    def __post_init__(self) -> None:
        """Check every field."""
        if self.pooling_type is not None and self.pooling_type not in POOLING_TYPES:
            raise ParameterError("pooling_type", self.pooling_type, f"must be {' or '.join(POOLING_TYPES)}")
        if self.normalize is not None and type(self.normalize) is not bool:
            raise ParameterError("normalize", self.normalize, "must be True or False")
        if self.dimensions is not None and (type(self.dimensions) is not int or self.dimensions < 1):
            raise ParameterError("dimensions", self.dimensions, "must be a whole number, at least 1")
        check_truncation(self.truncate_prompt_tokens, self.truncation_side)
