"""The rotary embedding of a Hugging Face ``config.json``."""

from __future__ import annotations

import math

from vllmlite.models.hf_config import HfConfig
from vllmlite.models.rope import KINDS
from vllmlite.models.spec import RopeSpec


def rope_spec(
    config: HfConfig, head_dim: int, *, theta: float = 10000.0, partial: float | None = None, kind: str = ""
) -> RopeSpec:
    """Return the rotary embedding, from ``rope_parameters``, or from the older ``rope_scaling`` and ``rope_theta``.

    ``theta`` is the family's default. ``partial`` is the family's default of ``partial_rotary_factor``; None means that
    whole heads are rotated. ``kind`` selects a layer type if the parameters are given per layer type."""
    _check_one_rope(config)
    section = config.section("rope_parameters") or config.section("rope_scaling") or HfConfig({}, "")
    if kind:
        section = section.section(kind) or HfConfig({}, "")
    else:
        for layer_type in ("full_attention", "sliding_attention"):
            if section.get(layer_type) is not None:
                raise section.error(layer_type, "one set of rotary parameters for all layers")
    rotated = head_dim
    if partial is not None:
        source = config if section.get("partial_rotary_factor") is None else section
        part = source.number("partial_rotary_factor", partial)
        if part > 1:
            raise source.error("partial_rotary_factor", "a number up to 1")
        rotated = int(head_dim * part)
    else:
        for source in (config, section):
            if source.number("partial_rotary_factor", 1.0) != 1.0:
                raise source.error("partial_rotary_factor", "1")
    if rotated % 2 or not 0 < rotated <= head_dim:
        raise config.error(
            "head_dim", f"a size of which an even number of elements is rotated, not {rotated}"
        )
    theta = section.number("rope_theta", theta if kind else config.number("rope_theta", theta))
    key = "rope_type" if section.get("rope_type") is not None else "type"
    kind = section.choice(key, {name: name for name in KINDS}, "default")
    if kind == "default":
        config.without_effect("original_max_position_embeddings")
        return RopeSpec(rotary_dim=rotated, theta=theta)
    trained = config.integer("max_position_embeddings")
    if kind in ("yarn", "llama3", "longrope"):
        trained = section.integer("original_max_position_embeddings", trained)
        trained = config.integer("original_max_position_embeddings", trained)
    if kind == "yarn":
        return _yarn_spec(config, section, rotated, theta, trained)
    if kind == "longrope":
        return _longrope_spec(config, section, rotated, theta, trained)
    if kind == "dynamic" and rotated == 2:
        raise config.error("head_dim", "at least 4 with dynamic rotary embedding")
    factor = section.number("factor")
    if kind != "llama3":
        return RopeSpec(rotated, theta, kind, factor, trained)
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if high <= low:
        raise section.error("high_freq_factor", f"a number above low_freq_factor, {low:g}")
    return RopeSpec(rotated, theta, kind, factor, trained, low_freq_factor=low, high_freq_factor=high)


def _check_one_rope(config: HfConfig) -> None:
    """Raise ModelError if ``rope_scaling`` contradicts ``rope_parameters``, for example because it was added by
    hand."""
    newer, older = config.get("rope_parameters"), config.get("rope_scaling")
    if not newer or not older or not isinstance(newer, dict) or not isinstance(older, dict):
        return
    wanted = {"rope_type" if key == "type" else key: value for key, value in older.items()}
    by_kind = [part for part in newer.values() if isinstance(part, dict)]
    if not any(wanted.items() <= part.items() for part in by_kind or [newer]):
        raise config.error(
            "rope_scaling", "the same as rope_parameters; change that instead, or leave it out"
        )


def _longrope_spec(config: HfConfig, section: HfConfig, size: int, theta: float, trained: int) -> RopeSpec:
    stretch = config.integer("max_position_embeddings") / trained
    attention = math.sqrt(1 + math.log(stretch) / math.log(trained)) if stretch > 1 and trained > 1 else 1.0

    def factors(key: str) -> tuple[float, ...]:
        values = section.get(key)
        if (
            not isinstance(values, list)
            or len(values) != size // 2
            or not all(type(value) in (int, float) and 0 < value < math.inf for value in values)
        ):
            raise section.error(key, f"a list of {size // 2} numbers above 0")
        return tuple(map(float, values))

    return RopeSpec(
        size,
        theta,
        "longrope",
        stretch,
        trained,
        attention_factor=section.number("attention_factor", attention),
        short_factors=factors("short_factor"),
        long_factors=factors("long_factor"),
    )


def _yarn_spec(config: HfConfig, section: HfConfig, head_dim: int, theta: float, trained: int) -> RopeSpec:
    factor = section.number("factor", config.integer("max_position_embeddings") / trained)

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention = magnitude(1.0)
    if section.get("mscale") and section.get("mscale_all_dim"):
        attention = magnitude(section.number("mscale")) / magnitude(section.number("mscale_all_dim"))
    if theta <= 1:
        raise section.error("rope_theta", "a number above 1 with yarn")
    return RopeSpec(
        head_dim,
        theta,
        "yarn",
        factor,
        trained,
        attention_factor=section.number("attention_factor", attention),
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        truncate=section.boolean("truncate", True),
    )
