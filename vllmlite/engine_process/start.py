"""Starting an engine in a thread or process of its own."""

from __future__ import annotations

from dataclasses import replace

from vllmlite.config.engine_config import EngineConfig
from vllmlite.engine_process.client import EngineClient
from vllmlite.engine_process.host import EngineProcess, EngineThread
from vllmlite.hub import find_model
from vllmlite.runner.startup import Started, load_tokenizer, start


def start_thread(config: EngineConfig) -> Started[EngineClient]:
    """Start an engine in a thread of its own. Raises what :func:`start` raises."""
    started = start(config)
    bounds, stats = started.engine.bounds, replace(started.engine.stats)
    return started.with_engine(EngineClient(EngineThread(started), bounds, stats), started.tokenizer)


def start_process(config: EngineConfig) -> Started[EngineClient]:
    """Start an engine in a process of its own. Raises what :func:`start` raises there."""
    process = EngineProcess(config)
    try:
        tokenizer = None  # while the other process loads the model
        if not config.skip_tokenizer_init:
            path = find_model(config.model, revision=config.revision, download_dir=config.download_dir)
            tokenizer = load_tokenizer(config, path)
        bounds, stats, started = process.wait_until_ready()
    except BaseException:
        process.kill()
        raise
    return started.with_engine(EngineClient(process, bounds, stats), tokenizer)
