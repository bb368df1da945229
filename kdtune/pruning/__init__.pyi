from .prune import (
    RemovalStep,
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
    "block_influence",
    "check_layers",
    "evenly_spaced",
    "greedy_removal",
    "keep_layers",
    "mean_loss",
    "most_influential",
]
