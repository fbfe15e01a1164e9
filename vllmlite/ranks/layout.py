"""Which rank runs where."""

from __future__ import annotations

from dataclasses import dataclass

from vllmlite.config.engine_config import EngineConfig


@dataclass(frozen=True, slots=True)
class Layout:
    """The ranks of an engine and the nodes on which they run, as many on each; a node's ranks are adjacent."""

    world: int
    stage: int
    """Ranks of each stage of the pipeline."""
    nodes: int = 1
    node: int = 0
    """The node of this process; node 0 has the engine."""

    @classmethod
    def of(cls, config: EngineConfig) -> Layout:
        """Return the layout that the options ask for."""
        return cls(config.num_ranks, config.tensor_parallel_size, config.nnodes, config.node_rank)

    @property
    def per_node(self) -> int:
        """Ranks of each node."""
        return self.world // self.nodes

    @property
    def local(self) -> range:
        """The ranks of this node."""
        return self.ranks_of(self.node)

    @property
    def is_hub(self) -> bool:
        """Whether this is node 0, to which all others are connected."""
        return self.node == 0

    def ranks_of(self, node: int) -> range:
        """Return the ranks of a node."""
        return range(node * self.per_node, (node + 1) * self.per_node)
