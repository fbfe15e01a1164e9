"""Pooling parameters of an embedding request, under vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass

from vllmlite.errors import ParameterError
from vllmlite.tokenizers.truncation import check_truncation

POOLING_TYPES = ("LAST", "MEAN")
"""Ways to turn a prompt's hidden states into one vector: the last token's state, or the mean of all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """Parameters of an embedding. Raises :class:`ParameterError` for invalid values."""

    pooling_type: str | None = None
    """One of :data:`POOLING_TYPES`; None: the engine's ``pooling_type``."""
    normalize: bool | None = None
    """Scale the vector to length 1; None: the engine's ``pooling_normalize``."""
    dimensions: int | None = None
    """Keep this many leading elements (Matryoshka embeddings, Kusupati et al. 2022), before normalisation."""
    truncate_prompt_tokens: int | None = None
    """Keep only this many tokens of the prompt; -1: as many as fit the context."""
    truncation_side: str | None = None
    """End at which ``truncate_prompt_tokens`` drops tokens: ``left`` (default) keeps the prompt's end, ``right`` its
    start."""

    def __post_init__(self) -> None:
        """Check every field."""
        if self.pooling_type is not None and self.pooling_type not in POOLING_TYPES:
            raise ParameterError("pooling_type", self.pooling_type, f"must be {' or '.join(POOLING_TYPES)}")
        if self.normalize is not None and type(self.normalize) is not bool:
            raise ParameterError("normalize", self.normalize, "must be True or False")
        if self.dimensions is not None and (type(self.dimensions) is not int or self.dimensions < 1):
            raise ParameterError("dimensions", self.dimensions, "must be an integer of at least 1")
        check_truncation(self.truncate_prompt_tokens, self.truncation_side)
