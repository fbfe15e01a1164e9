"""AWQ (Lin et al. 2023): scales the input channels of products, so that channels with large inputs are rounded finely.

The factor of a channel multiplies the column of each weight that reads it, and divides what produces it: the weight of
the norm before, or the rows of the product before. In floats, the results of the layer do not change. The scaled
weights are then rounded by :mod:`vllmlite.quantize.gptq`, which loses less than the paper's rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vllmlite.models.spec import DecoderSpec
from vllmlite.quantize.calibration import Moments
from vllmlite.quantize.rounding import Grid, channel_error, nearest
from vllmlite.weights.host import Floats, HostTensor, float_tensor, float_values

TRIES = 20
"""Number of exponents of the inputs' mean magnitude to try, from 0 on."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Products that read the same channels, and the tensors that produce these channels."""

    readers: tuple[str, ...]
    """The weights to quantise."""
    producers: tuple[str, ...]
    """The weight and bias of a norm or of a product, whose rows are divided."""
    other_readers: tuple[str, ...] = ()
    """The weights that stay in floats: those of a router and of a shared expert's gate."""


def folds(spec: DecoderSpec, layer: int, names: Mapping[str, HostTensor]) -> list[Fold]:
    """Return the places in a layer where factors can be folded exactly. ``names`` are the layer's tensors."""
    prefix = f"{layer}."

    def known(*wanted: str) -> tuple[str, ...]:
        return tuple(name for name in (prefix + one for one in wanted) if name in names)

    def norm(name: str) -> tuple[str, ...]:
        return known(f"{name}.weight", f"{name}.bias")

    found = []
    gate_up = known("gate.weight", "up.weight")
    experts = tuple(
        name
        for name in names
        if name.startswith((f"{prefix}experts.", f"{prefix}shared."))
        and name.endswith(("gate.weight", "up.weight"))
    )
    gates = known("router.weight", "shared_gate.weight")
    qkv = known("q.weight", "k.weight", "v.weight")
    if not spec.post_norm:
        shares_norm = spec.parallel and not spec.mlp_norm
        if spec.attn_norm:
            found.append(Fold(qkv + (gate_up if shares_norm else ()), norm("attn_norm")))
        if spec.mlp_norm:
            found.append(Fold(gate_up + experts, norm("mlp_norm"), gates))
    if spec.num_heads == spec.num_kv_heads:
        found.append(Fold(known("o.weight"), known("v.weight", "v.bias")))
    if spec.gated_mlp and spec.layers[layer].moe is None:
        found.append(Fold(known("down.weight"), known("up.weight", "up.bias")))
    for name in names:
        if name.startswith((f"{prefix}experts.", f"{prefix}shared.")) and name.endswith("down.weight"):
            found.append(Fold((name,), (name.replace("down.weight", "up.weight"),)))
    return found


def fold_factors(
    tensors: dict[str, HostTensor],
    dtypes: Mapping[str, str],
    moments: Mapping[str, Moments],
    places: Sequence[Fold],
    grids: Mapping[str, Grid],
    unit_offset: bool,
) -> set[str]:
    """Scale the float32 ``tensors`` of a layer in place, and return the names of those that changed.

    ``dtypes`` are those in which the checkpoint stores tensors that stay in floats. ``unit_offset``: norm weights are
    stored minus one."""
    changed: set[str] = set()
    for place in places:
        read = [name for name in place.readers if moments[name].rows]
        if not read:
            continue
        factors = _best_factors({name: float_values(tensors[name]) for name in read}, moments, grids)
        if factors is None:
            continue
        factors = _divide(tensors, dtypes, place.producers, factors, unit_offset)
        for name in (*place.readers, *place.other_readers):
            tensors[name] = float_tensor(float_values(tensors[name]) * factors, "float32")
        changed.update(place.readers, place.other_readers, place.producers)
        _rescale(moments, place, factors)
    return changed


def _best_factors(
    weights: Mapping[str, Floats], moments: Mapping[str, Moments], grids: Mapping[str, Grid]
) -> Floats | None:
    """Return the factors that give the least error of the outputs, or None if none are better than ones."""
    unique = {id(moments[name]): moments[name] for name in weights}.values()
    mean = sum(one.magnitude for one in unique) / sum(one.rows for one in unique)
    best, least = None, np.inf
    for attempt in range(TRIES):
        powers = np.maximum(mean, 1e-8) ** (attempt / TRIES)
        factors = np.clip(powers / np.sqrt(powers.max() * powers.min()), 1e-4, 1e4).astype(np.float32)
        error = 0.0
        for name, weight in weights.items():
            rounded = nearest(weight * factors, grids[name], search=False).values() / factors
            error += channel_error(weight, rounded, moments[name].gram)
        if error < least:
            best, least = (None if attempt == 0 else factors), error
    return best


def _divide(
    tensors: dict[str, HostTensor],
    dtypes: Mapping[str, str],
    producers: Sequence[str],
    factors: Floats,
    unit_offset: bool,
) -> Floats:
    """Divide the rows of ``producers`` by ``factors``. Norm weights are rounded to their stored dtype; the factors by
    which they were actually divided are returned, so that this rounding changes no results."""
    for name in producers:
        before = float_values(tensors[name])
        if before.ndim == 2:
            after = before / factors[:, None]
        elif name == producers[0]:
            offset = np.float32(unit_offset)
            divided = float_values(float_tensor((before + offset) / factors - offset, dtypes[name]))
            found = np.divide(
                before + offset, divided + offset, out=np.zeros_like(before), where=divided != -offset
            )
            usable = np.isfinite(found) & (found > 0)
            after, factors = np.where(usable, divided, before), np.where(usable, found, 1).astype(np.float32)
        else:
            after = before / factors
        tensors[name] = float_tensor(np.asarray(after, np.float32), "float32")
    return factors


def _rescale(moments: Mapping[str, Moments], place: Fold, factors: Floats) -> None:
    """Change ``moments`` to those of the divided inputs."""
    for one in {id(moments[name]): moments[name] for name in place.readers}.values():
        one.gram /= np.outer(factors, factors)
        one.magnitude /= factors
