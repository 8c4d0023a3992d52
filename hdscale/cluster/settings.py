"""Settings of the cluster (`cluster.*`)."""

from dataclasses import dataclass

from hdscale.settings import setting


@dataclass
class ClusterSettings:
    """How `hdscale launch` asks SLURM for machines."""

    nodes: int = setting(1, "nodes")
    gpus_per_node: int = setting(8, "GPUs, and so ranks, of a node (0: one CPU rank a node)")
