"""Detect updates lost in rounding: a half-precision weight does not move by less than half the distance to its neighbour."""

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from kdtune.log import get_logger
from kdtune.tensor_types import is_dtensor

_SAMPLE = 4096
_TOLD_FROM = 0.5


@torch.no_grad()
def lost_share(optimizer: Optimizer) -> float:
    """Return the share of trained weights that an update of the size of their learning rate leaves unchanged.

    Adam's updates have about that size. Up to 4,096 values of each tensor's local shard are tested.
    """
    lost, total = 0.0, 0
    for group in optimizer.param_groups:
        rate = float(group.get("initial_lr", group["lr"]))
        for weight in group["params"]:
            total += weight.numel()
            if weight.is_floating_point() and weight.dtype.itemsize < 4:
                lost += weight.numel() * _unmoved(weight, rate)
    return lost / total


def _unmoved(weight: Tensor, rate: float) -> float:
    values = (weight.to_local() if is_dtensor(weight) else weight).flatten()
    if len(values) == 0:
        return 0.0
    values = values[:: -(-len(values) // _SAMPLE)]
    return float(((values + rate == values) & (values - rate == values)).float().mean())


def warn_of_lost_updates(optimizer: Optimizer) -> None:
    """Log a warning if most weights would not move: half precision with a learning rate too small for it.

    Says nothing for SGD, whose update size is not the learning rate, and for optimizers that round stochastically.
    """
    if isinstance(optimizer, SGD) or getattr(optimizer, "bf16_stochastic_round", False):
        return
    share = lost_share(optimizer)
    if share >= _TOLD_FROM:
        rates = sorted({float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups})
        get_logger(__name__).warning(
            "the trained weights are in bf16, where an update of the size of optimizer.lr=%s leaves %.0f %% of them as they are; set "
            "weight_update=stochastic or fp32_master, dtype=fp32 (on several processes with parallelism.param_dtype=bf16, which still "
            "computes in bf16) or a larger optimizer.lr",
            ", ".join(f"{rate:g}" for rate in rates), 100 * share,
        )  # fmt: skip
