"""A node without an engine: runs the ranks of one host for node 0, which has the engine."""

from __future__ import annotations

import pickle
import signal
import threading
from dataclasses import replace

from vllmlite.config.engine_config import EngineConfig
from vllmlite.errors import EngineDeadError, ParameterError
from vllmlite.ranks.group import RankGroup
from vllmlite.ranks.host_messages import StepCommand, StepReply
from vllmlite.ranks.layout import Layout
from vllmlite.ranks.meeting import meet
from vllmlite.ranks.messages import Command, Reply
from vllmlite.ranks.start import check_split, local_setups
from vllmlite.runner.build import plan_for


def serve_node(config: EngineConfig, secret: bytes | None = None) -> None:
    """Run this node's ranks until node 0 shuts the engine down. Raises what their start raises, and EngineDeadError if
    a rank fails here or elsewhere, or if SIGTERM or SIGINT stops this node. ``secret`` replaces the
    secret that the options name."""
    layout = Layout.of(config)
    if layout.is_hub:
        raise ParameterError(
            "node_rank", 0, "node 0 has the engine and is not headless; others are 1 and more"
        )
    plan = plan_for(config)
    check_split(config, plan)
    (joined,) = meet(config, plan, layout, secret=secret)
    config = replace(config, seed=joined.seed)
    group = RankGroup(local_setups(config, plan, layout), layout, [joined])
    group.on_message(lambda message: _take_command(group, message))
    reporter = threading.Thread(target=_report, args=(group,), name="vllmlite-results")
    if config.reporting_rank in layout.local:
        reporter.start()
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        group.wait_for_end()
    except KeyboardInterrupt:
        group.stop(f"node {layout.node} was stopped by a signal")
    group.close()
    if group.is_failure:
        raise EngineDeadError(str(group.end))


def _take_command(group: RankGroup, message: object) -> None:
    """Pass a step of node 0's engine on to this host's ranks."""
    if isinstance(message, StepCommand):
        command: Command = message.step, message.schedule
        group.ranks.send(pickle.dumps(command, pickle.HIGHEST_PROTOCOL))


def _report(group: RankGroup) -> None:
    """Pass the results of this host's reporting rank on to node 0."""
    while group.end is None:
        message = group.ranks.receive(1.0)
        if message is not None:
            reply: Reply = pickle.loads(message)
            step, result = reply
            if isinstance(result, Exception):
                group.send(StepReply(step, None, f"{type(result).__name__}: {result}"))
            else:
                group.send(StepReply(step, result))
