"""Sleep mode: frees the memory of a runner, and allocates it again or builds a new runner."""

from __future__ import annotations

import ctypes
import gc
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from vllmlite.config.engine_config import EngineConfig
from vllmlite.disk_tier.place_memory import PlaceMemory
from vllmlite.engine.sleeping import SleepMode
from vllmlite.errors import ModelError
from vllmlite.models.plan import Plan
from vllmlite.runner.build import build_runner
from vllmlite.runner.runner import ModelRunner

logger = logging.getLogger(__name__)


class ModelRunnerMemory:
    """The memory of a runner, which sleep mode frees and allocates again."""

    def __init__(
        self, runner: ModelRunner, rebuild: Callable[[], ModelRunner], drop: Callable[[], None]
    ) -> None:
        """Manage the memory of ``runner``. ``rebuild`` builds a new runner from the checkpoint; ``drop`` removes other
        references to the runner's memory."""
        self._runner: ModelRunner | None = runner
        self._rebuild, self._drop = rebuild, drop
        self._released = False

    def release(self, level: int) -> None:
        """Free the memory. At ``level`` 1 the backend keeps the weights in host memory; at level 2 the runner is
        dropped, with its model, graphs and backend."""
        if level == 1:
            assert self._runner is not None
            self._released = True
            self._runner.release()
        else:
            self._runner, self._released = None, False
            self._drop()
        _free_garbage()
        freed = (
            "the key/value cache is freed, weights are in host memory"
            if level == 1
            else "the model is unloaded"
        )
        logger.info("the engine sleeps at level %d: %s", level, freed)

    def restore(self) -> ModelRunner:
        """Allocate the memory again, or build a new runner. Raises VllmliteError if there is too little memory, or if
        the checkpoint cannot be read."""
        if self._runner is None:
            self._runner = self._rebuild()
        if self._released:
            self._runner.restore()
            self._released = False
        logger.info("the engine is awake")
        return self._runner


def sleep_mode(
    config: EngineConfig, plan: Plan, replica: int, runner: ModelRunner, memory: PlaceMemory, mark: bytes
) -> SleepMode:
    """Return the sleep mode of the engine of ``runner``. ``memory`` is the host memory through which blocks are copied
    to and from files, and ``mark`` the fingerprint of these files."""
    same_size = replace(config, num_gpu_blocks_override=runner.num_blocks, kv_cache_memory_bytes=None)

    def rebuild() -> ModelRunner:
        built = build_runner(same_size, plan, replica=replica)
        if built.host is not None and built.host.fingerprint != mark:
            raise ModelError(
                f"{plan.path}: the checkpoint has changed while the engine slept, and its saved keys and values are of "
                "the old one: restart the engine"
            )
        memory.parts = built.runner.host_memory()
        return built.runner

    def drop() -> None:
        memory.parts = []

    return SleepMode(ModelRunnerMemory(runner, rebuild, drop))


def _free_garbage() -> None:
    """Free a dropped runner, which is part of reference cycles, and give free memory of the heap back to the system."""
    frozen = gc.get_freeze_count() > 0
    gc.unfreeze()  # an engine's process exempts old objects from collection
    gc.collect()
    if frozen:
        gc.freeze()
    with suppress(AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)
