"""Building the cache tiers of an engine from its configuration."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from vllmlite.backends.base import API
from vllmlite.config.engine_config import EngineConfig
from vllmlite.disk_tier.block_file import BlockFile
from vllmlite.disk_tier.disk import DiskTier
from vllmlite.disk_tier.fingerprint import fingerprint, module_digest
from vllmlite.disk_tier.place_memory import PlaceMemory
from vllmlite.disk_tier.private_directory import PrivateDirectory
from vllmlite.disk_tier.slot_files import SlotFiles
from vllmlite.engine.engine import Engine
from vllmlite.engine.saved_prefixes import SavedPrefixes
from vllmlite.engine.tiers import Tiers, TransferCost
from vllmlite.errors import ParameterError
from vllmlite.models.plan import Plan
from vllmlite.runner.kv_transfer import seconds_per_load
from vllmlite.runner.runner import ModelRunner

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HostPlaces:
    """The host memory of a rank for blocks, of each of which it holds the rank's part."""

    num_places: int
    block_bytes: int
    """Bytes of the rank's part of a block."""
    seconds_per_load: float
    """Measured seconds to copy a block from host memory to the device."""
    fingerprint: bytes
    """Fingerprint of everything, besides their hashes, that the contents of blocks in files depend on; empty if there
    are no files."""


def host_places(
    config: EngineConfig, plan: Plan, runner: ModelRunner, num_blocks: int, max_model_len: int
) -> HostPlaces | None:
    """Return the host memory of a runner for blocks, or None if it has none."""
    host = runner.host_blocks
    if host is None:
        return None
    count, block_bytes = host.memory.shape
    mark = b""
    if config.keeps_block_files():
        mark = cache_fingerprint(config, plan, runner, max_model_len)
    return HostPlaces(count, block_bytes, seconds_per_load(host, num_blocks), mark)


def cache_fingerprint(config: EngineConfig, plan: Plan, runner: ModelRunner, max_model_len: int) -> bytes:
    """Return a fingerprint of everything, besides their hashes, that the contents of blocks in files depend on."""
    backend = runner.backend
    return fingerprint(
        plan.path,
        API,
        module_digest(f"vllmlite._{backend.name}"),
        (backend.name, getattr(backend, "isa", backend.details), backend.dtype, runner.model.kv_spec),
        (config.quantization, config.quantize_head, config.activation_dtype, config.batch_invariant),
        (config.model_impl, config.load_format, config.seed if config.load_format == "dummy" else None),
        max_model_len,
        (config.tensor_parallel_size, config.pipeline_parallel_size),
    )


def cache_tiers(
    config: EngineConfig, places: HostPlaces, memory: PlaceMemory, num_blocks: int, replica: int
) -> Tiers:
    """Return the cache tiers behind a pool of ``num_blocks`` blocks. ``memory`` is the host memory of ``places``, which
    is needed only if there are files."""
    cost = TransferCost(config.block_size, places.seconds_per_load)
    disk = None
    if config.kv_disk_path is not None:
        file = _block_file(config, config.kv_disk_path, places.fingerprint, memory.block_bytes, replica)
        logger.info("%d blocks are on disk, %d fit there", len(file), file.num_slots)
        disk = DiskTier(file, memory)
    return Tiers(num_blocks, places.num_places, cost, config.preemption_mode, disk)


def saved_prefixes(config: EngineConfig, mark: bytes, memory: PlaceMemory, engine: Engine) -> SavedPrefixes:
    """Return the object that saves prompts in the directory ``config.slot_save_path`` and restores them."""
    assert config.slot_save_path is not None and engine.scheduler.tiers is not None
    directory = PrivateDirectory(config.slot_save_path, "slot_save_path")
    files = SlotFiles(directory, memory, mark, config.slot_save_size)
    return SavedPrefixes(
        engine.scheduler.tiers, files, engine.prefix_root(), config.block_size, engine.run_copies
    )


def _block_file(config: EngineConfig, path: str, mark: bytes, block_bytes: int, replica: int) -> BlockFile:
    """Open the file of the disk tier. Each replica has a file of its own, with an equal share of
    ``config.kv_disk_size``."""
    directory = PrivateDirectory(path, "kv_disk_path")
    try:
        fd = directory.open(f"blocks-{replica}" if replica else "blocks")
    except OSError as error:
        raise ParameterError("kv_disk_path", path, str(error.strerror)) from None
    finally:
        directory.close()
    try:
        return BlockFile(fd, config.kv_disk_size // config.data_parallel_size, block_bytes, mark)
    except (ValueError, OSError) as error:
        os.close(fd)
        raise ParameterError("kv_disk_size", config.kv_disk_size, str(error)) from None
