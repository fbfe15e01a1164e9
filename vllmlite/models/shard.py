"""Choose the part of a model that each rank computes: heads and a part of each MLP in tensor parallelism (Shoeybi et
al. 2019), and layers in pipeline parallelism.
"""

from __future__ import annotations

from dataclasses import replace

from vllmlite.errors import ParameterError
from vllmlite.models.spec import DecoderSpec, Shard, Stage


def whole(spec: DecoderSpec) -> Shard:
    """Return the shard of a rank that computes the whole model."""
    return Shard(0, 1, (0, spec.num_heads), (0, spec.num_kv_heads))


def part_of(
    spec: DecoderSpec, rank: int, world: int, stages: int, last_has_table: bool = False
) -> DecoderSpec:
    """Return the spec of the part that rank ``rank`` of ``world`` computes in a pipeline of ``stages``, each of which
    has as many ranks as the others, one stage after the other; see :func:`staged` and :func:`sharded`."""
    ranks = world // stages
    return sharded(staged(spec, rank // ranks, stages, last_has_table), rank % ranks, ranks)


def staged(spec: DecoderSpec, stage: int, stages: int, last_has_table: bool = False) -> DecoderSpec:
    """Return the spec of stage ``stage`` of ``stages``: some layers of ``spec``. If the layers cannot be divided
    evenly, the last stages, which also have the output layer, have one layer less. ``last_has_table`` gives the last
    stage the table of embeddings too. Raises ParameterError for more stages than layers."""
    if stages == 1:
        return spec
    if stages > spec.num_layers:
        raise ParameterError(
            "pipeline_parallel_size",
            stages,
            f"must be at most {spec.num_layers}, the layers of {spec.architecture}",
        )
    is_last = stage == stages - 1
    each, more = divmod(spec.num_layers, stages)
    first, last = (number * each + min(number, more) for number in (stage, stage + 1))
    return replace(
        spec,
        layers=spec.layers[first:last],
        shard=whole(spec),
        stage=Stage(first, stage == 0, stage == 0 or (is_last and last_has_table), is_last),
        whole=spec,
    )


def sharded(spec: DecoderSpec, rank: int, world: int) -> DecoderSpec:
    """Return the spec of the part that rank ``rank`` of ``world`` computes: its sizes are the rank's own, and
    :attr:`DecoderSpec.whole` is ``spec``. ParameterError if the model cannot be split over this number of ranks."""
    if world == 1:
        return spec
    accepted = [count for count in range(1, spec.num_heads + 1) if _splits(spec, count)]
    if world not in accepted:
        raise ParameterError(
            "tensor_parallel_size",
            world,
            f"{spec.architecture} can be split over {', '.join(map(str, accepted))}",
        )
    if spec.qk_norm == "whole":
        raise ParameterError(
            "tensor_parallel_size", world, f"{spec.architecture} normalises all heads together: must be 1"
        )
    heads, kv = spec.num_heads // world, spec.num_kv_heads
    first_kv = rank * kv // world
    num_kv = max(kv // world, 1)
    shard = Shard(rank, world, (rank * heads, (rank + 1) * heads), (first_kv, first_kv + num_kv))
    layers = tuple(
        layer
        if layer.moe is None
        else replace(
            layer,
            moe=replace(
                layer.moe,
                intermediate_size=layer.moe.intermediate_size // world,
                shared_intermediate_size=layer.moe.shared_intermediate_size // world,
            ),
        )
        for layer in spec.layers
    )
    return replace(
        spec,
        num_heads=heads,
        num_kv_heads=num_kv,
        intermediate_size=spec.intermediate_size // world,
        layers=layers,
        alibi=spec.alibi[slice(*shard.heads)],
        shard=shard,
        whole=spec.whole or spec,
    )


def head_sizes(spec: DecoderSpec) -> list[int]:
    """Return how many rows of the output layer each rank has."""
    if spec.shard is None:
        return [spec.vocab_size]
    spans = (spec.shard.uneven_part(spec.vocab_size, rank) for rank in range(spec.shard.world))
    return [last - first for first, last in spans]


def _splits(spec: DecoderSpec, world: int) -> bool:
    """Return whether heads and MLPs can be split over ``world`` ranks."""
    sizes = [spec.num_heads]
    for layer in spec.layers:
        if layer.moe is None:
            sizes.append(spec.intermediate_size)
        else:
            sizes += [layer.moe.intermediate_size, layer.moe.shared_intermediate_size]
    kv = spec.num_kv_heads
    return all(size % world == 0 for size in sizes) and (kv % world == 0 or world % kv == 0)
