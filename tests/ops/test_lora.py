"""Linear layers with adapters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from op_backends import check, host, numbers, put
from paged import host_batch

from vllmlite.backends.base import Backend
from vllmlite.backends.batch import ForwardBatch, GraphKey, SlotSpec
from vllmlite.backends.kv_cache import KVSpec
from vllmlite.errors import BackendError
from vllmlite.weights.adapter import EMBEDDING, GAIN, AdapterLimits, LowRank

SPEC = KVSpec(1, 1, 16, 4, "float32")
ROWS = (64, 32, 33)
"""Of the parts of a weight: of whole vectors, of one, and of neither."""
ADAPTERS = [0, 1, 2, 0, 3, 1, 4]
"""Of the rows of a batch; 3 leaves the weight as it is, and there is no 4."""
SCALE = 0.375
Changes = list[tuple[np.ndarray, np.ndarray] | None]


def changes(columns: int, ranks: tuple[int | None, ...], seed: int, shared: bool = False) -> Changes:
    """Factors a and b for each part of the weight that has a rank; with one a for all if ``shared``."""
    found: Changes = []
    for part, (rows, rank) in enumerate(zip(ROWS, ranks, strict=True)):
        if rank is None:
            found.append(None)
            continue
        a = numbers((rank, columns), seed if shared else seed + part, columns**-0.5)
        found.append((a, numbers((rows, rank), seed + 10 + part)))
    return found


def low_ranks(backend: Backend, given: Changes) -> list[LowRank | None]:
    hosts: dict[bytes, Any] = {}
    return [
        None
        if change is None
        else LowRank(
            hosts.setdefault(change[0].tobytes(), host(backend, change[0])), host(backend, change[1]), SCALE
        )
        for change in given
    ]


def product(x: np.ndarray, change: Changes) -> np.ndarray:
    parts = [
        np.zeros((len(x), rows)) if each is None else SCALE * (x @ each[0].T) @ each[1].T
        for rows, each in zip(ROWS, change, strict=True)
    ]
    return np.concatenate(parts, 1)


class Layer:
    """A weight of three parts with two adapters, one of which shares its a among the parts."""

    def __init__(self, backend: Backend, columns: int) -> None:
        self.backend = backend
        self.matrix = numbers((sum(ROWS), columns), 1, columns**-0.5)
        parts = np.split(self.matrix, np.cumsum(ROWS)[:-1])
        self.weight = backend.linear_weight([host(backend, part) for part in parts])
        try:
            self.table = backend.alloc_low_rank(ROWS, columns, AdapterLimits(4, 40))
        except BackendError as error:
            pytest.skip(str(error))
        self.changes = {
            1: changes(columns, (5, None, 40), 20),
            2: changes(columns, (16, 16, 16), 40, shared=True),
        }
        for index, change in self.changes.items():
            backend.set_low_rank(self.table, index, low_ranks(backend, change))
        backend.set_low_rank(self.table, 3, [None, None, None])

    def expected(self, x: np.ndarray, adapters: np.ndarray) -> np.ndarray:
        found = x @ self.matrix.T
        for index, change in self.changes.items():
            found[adapters == index] += product(x[adapters == index], change)
        return found


def adapted_batch(adapters: list[int], counts: list[int]) -> ForwardBatch:
    batch = host_batch(range(len(counts)), [0] * len(counts), counts)
    batch.token_ids = np.zeros(sum(counts), np.int32)
    batch.adapters = np.array(adapters, np.int32)
    return batch


def slots_of(backend: Backend) -> Any:
    return backend.alloc_slots(SlotSpec(len(ADAPTERS), 32, 128, 10, 32))


@pytest.mark.parametrize("counts", [[1] * 7, [3, 2, 5, 1, 1, 1, 4], [1, 70, 20, 3, 2, 33, 2]])
@pytest.mark.parametrize("columns", [96, 264, 1030])
def test_rows_have_their_own_adapters(backend: Backend, columns: int, counts: list[int]) -> None:
    layer, slots = Layer(backend, columns), slots_of(backend)
    x = numbers((sum(counts), columns), 2)
    batch = backend.upload(adapted_batch(ADAPTERS, counts), slots, SPEC)
    found = backend.lora_linear(put(backend, x), layer.weight, layer.table, batch)
    check(backend, found, layer.expected(x, np.repeat(ADAPTERS, counts)))


def test_a_rows_result_does_not_depend_on_other_rows(backend: Backend) -> None:
    """And rows without an adapter have the result of ``linear``, bit for bit where that does not depend on other
    rows."""
    if backend.name == "torch" or (backend.name == "cuda" and backend.dtype != "float32"):
        pytest.skip("the products of this backend depend on the number of rows")
    layer, slots, counts = Layer(backend, 264), slots_of(backend), [2, 40, 1, 3, 9, 1, 1]
    x = numbers((sum(counts), 264), 2)

    def run(rows: np.ndarray, adapters: list[int], lengths: list[int]) -> np.ndarray:
        batch = backend.upload(adapted_batch(adapters, lengths), slots, SPEC)
        return backend.to_host(backend.lora_linear(put(backend, rows), layer.weight, layer.table, batch))

    found = np.split(run(x, ADAPTERS, counts), np.cumsum(counts)[:-1])
    for rows, index, mixed in zip(np.split(x, np.cumsum(counts)[:-1]), ADAPTERS, found, strict=True):
        alone = run(rows, [index], [len(rows)])
        assert (alone == mixed).all()
        if index in (0, 3, 4):
            assert (backend.to_host(backend.linear(put(backend, rows), layer.weight)) == mixed).all()
        one = run(rows[:1], [index], [1])
        assert (one == mixed[:1]).all()


def test_gains_rescale_the_results_of_the_weight(backend: Backend) -> None:
    """Also to nothing, whatever the weight's results are."""
    if GAIN not in backend.adapter_abilities:
        pytest.skip("the backend has no gains")
    layer, slots = Layer(backend, 96), slots_of(backend)
    x, adapters = numbers((7, 96), 2), np.array(ADAPTERS)
    gains = [numbers((2, rows), 50 + part, 1.0).astype(np.float32) for part, rows in enumerate(ROWS)]
    gains[2][:] = 0
    change = changes(96, (5, 7, 40), 20)
    parts = low_ranks(backend, change)
    backend.set_low_rank(
        layer.table, 1, [part and replace(part, gain=gain) for part, gain in zip(parts, gains, strict=True)]
    )
    batch = backend.upload(adapted_batch(ADAPTERS, [1] * 7), slots, SPEC)
    found = backend.lora_linear(put(backend, x), layer.weight, layer.table, batch)
    expected = layer.expected(x, adapters)
    own = x[adapters == 1]
    factors, shift = np.concatenate(gains, 1)
    expected[adapters == 1] = own @ layer.matrix.T * factors + shift + product(own, change)
    check(backend, found, expected)


@pytest.mark.parametrize("counts", [[1] * 7, [3, 2, 5, 1, 1, 1, 4]])
def test_embeddings_have_adapters(backend: Backend, counts: list[int]) -> None:
    """Ids stand for rows with a one in a column, and sampled positions have the adapters of their rows."""
    if EMBEDDING not in backend.adapter_abilities:
        pytest.skip("the backend has no adapters of embeddings")
    layer, slots = Layer(backend, 96), slots_of(backend)
    host_one = adapted_batch(ADAPTERS, counts)
    host_one.token_ids = (np.arange(sum(counts)) * 7 % 10).astype(np.int32)
    batch = backend.upload(host_one, slots, SPEC)
    base = numbers((sum(counts), sum(ROWS)), 3)
    found = backend.add_lora(
        backend.tensor(base.astype(np.float32)), batch.token_ids, layer.table, batch.token_adapters
    )
    x, adapters = np.eye(96)[host_one.token_ids], np.repeat(ADAPTERS, counts)
    check(backend, found, base + layer.expected(x, adapters) - x @ layer.matrix.T)
    x, base = numbers((7, 96), 2), numbers((7, sum(ROWS)), 3)
    for rows in (batch.sample_adapters, backend.adapter_rows(np.array(ADAPTERS, np.int32))):
        found = backend.add_lora(backend.tensor(base.astype(np.float32)), put(backend, x), layer.table, rows)
        check(backend, found, base + layer.expected(x, np.array(ADAPTERS)) - x @ layer.matrix.T)


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8_w8a8"])
def test_quantised_weights_have_adapters(backend: Backend, scheme: str) -> None:
    if scheme not in backend.schemes:
        pytest.skip("the backend dequantises the scheme")
    layer, slots, columns = Layer(backend, 128), slots_of(backend), 128
    parts = np.split(layer.matrix, np.cumsum(ROWS)[:-1])
    weight = backend.linear_weight([backend.quantize(host(backend, part), scheme) for part in parts])
    x = numbers((7, columns), 2)
    batch = backend.upload(adapted_batch(ADAPTERS, [1] * 7), slots, SPEC)
    base = backend.to_host(backend.linear(put(backend, x), weight))
    found = backend.lora_linear(put(backend, x), weight, layer.table, batch)
    check(backend, found, base + layer.expected(x, np.array(ADAPTERS)) - x @ layer.matrix.T)


def test_adapters_are_replaced_and_removed(backend: Backend) -> None:
    layer, slots = Layer(backend, 96), slots_of(backend)
    x = numbers((7, 96), 2)
    replaced: list[tuple[int, Changes]] = [
        (1, changes(96, (None, 7, 33), 60)),
        (2, [None, None, None]),
        (1, changes(96, (4, 4, 4), 70)),
    ]
    for index, change in replaced:
        layer.changes[index] = change
        backend.set_low_rank(layer.table, index, low_ranks(backend, change))
        batch = backend.upload(adapted_batch(ADAPTERS, [1] * 7), slots, SPEC)
        found = backend.lora_linear(put(backend, x), layer.weight, layer.table, batch)
        check(backend, found, layer.expected(x, np.array(ADAPTERS)))


def test_captured_steps_take_each_batchs_adapters(exact: Backend) -> None:
    """Also fewer rows than were captured, and adapters that were loaded after the capture."""
    if not exact.graph_rows(8):
        pytest.skip("the backend captures nothing")
    layer, slots = Layer(exact, 96), slots_of(exact)
    x = numbers((10, 96), 2)
    table = put(exact, x)

    def step(batch: Any) -> list[Any]:
        inputs = exact.rows(table, batch.token_ids)
        return [exact.rows(exact.lora_linear(inputs, layer.weight, layer.table, batch), batch.logits_rows)]

    steps = {
        rows: exact.capture(GraphKey(rows, 1, adapted=True), step, slots, SPEC)
        for rows in exact.graph_rows(7)
    }
    for adapters in ([1], [0, 2, 1], [2, 2, 1, 1, 0, 2, 1], [3, 1], [1]):
        rows = min(rows for rows in steps if rows >= len(adapters))
        batch = adapted_batch(adapters, [1] * len(adapters))
        batch.token_ids = (np.arange(len(adapters)) * 3 % 10).astype(np.int32)
        (found,) = steps[rows](exact.upload(batch, slots, SPEC, GraphKey(rows, 1, adapted=True)))
        check(exact, found, layer.expected(x[batch.token_ids], np.array(adapters)))
        layer.changes[1] = changes(96, (9, 2, None), len(adapters))
        exact.set_low_rank(layer.table, 1, low_ranks(exact, layer.changes[1]))


def test_factors_that_do_not_fit_are_refused(exact: Backend) -> None:
    if exact.name == "torch":
        pytest.skip("the reference trusts its caller")
    layer = Layer(exact, 96)
    wide, long = changes(97, (4, None, None), 1), changes(96, (41, None, None), 1)
    for given, message in ((wide, r"\[rank up to 40, 96\], not"), (long, r"\[rank up to 40, 96\], not")):
        with pytest.raises(ValueError, match=message):
            exact.set_low_rank(layer.table, 1, low_ranks(exact, given))
    with pytest.raises(IndexError, match="adapter 5 of 4"):
        exact.set_low_rank(layer.table, 5, low_ranks(exact, layer.changes[1]))
