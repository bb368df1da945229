from .prune import (
    RemovalStep,
    architecture_problems,
    block_influence,
    check_layers,
    evenly_spaced,
    greedy_removal,
    keep_layers,
    mean_loss,
    most_influential,
)
from .record import RemovalRecord

__all__ = [
    "RemovalRecord",
    "RemovalStep",
    "architecture_problems",
    "block_influence",
    "check_layers",
    "evenly_spaced",
    "greedy_removal",
    "keep_layers",
    "mean_loss",
    "most_influential",
]
