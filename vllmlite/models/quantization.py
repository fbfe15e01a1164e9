"""The quantisation scheme of each weight of a checkpoint, as data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

from vllmlite.weights.host import Scheme


@dataclass(frozen=True, slots=True)
class Modules:
    """A set of modules, given by parts of their dotted names."""

    names: frozenset[str] = frozenset()
    """Modules, or parts of names between dots: ``mlp.gate`` is in ``layers.1.mlp.gate``, but not in
    ``layers.1.mlp.gate_proj``."""
    patterns: tuple[re.Pattern[str], ...] = ()
    """Regular expressions to search for in the names."""

    def __contains__(self, module: str) -> bool:
        if self.names:
            words = module.split(".")
            bounds = combinations(range(len(words) + 1), 2)
            if any(".".join(words[first:last]) in self.names for first, last in bounds):
                return True
        return any(pattern.search(module) for pattern in self.patterns)


ALL = Modules(patterns=(re.compile(""),))
HEAD = Modules(frozenset({"lm_head"}))

Rule: TypeAlias = tuple[Modules, Scheme | None]


@dataclass(frozen=True, slots=True)
class Quantization:
    """The quantisation schemes of a checkpoint's weights."""

    method: str
    """The ``quant_method`` of the checkpoint, or the scheme of a checkpoint in vllmlite's own format."""
    rules: tuple[Rule, ...]
    """Modules and the scheme of their weights; None means floats. The first rule that matches a module applies; the
    weights of a module that no rule matches are floats."""
    own: bool = False
    """Whether the checkpoint has vllmlite's own format: parts of fused weights are stored separately, none is
    transposed, and a tied output layer has its own weight."""
    kv_cache_dtype: str | None = None
    """Dtype of the key/value cache that the checkpoint is made for; None: that of the model."""

    def scheme(self, key: str) -> Scheme | None:
        """Return the scheme of the weight ``key``, or None if it is stored as floats."""
        module = key.removesuffix(".weight")
        return next((scheme for modules, scheme in self.rules if module in modules), None)
