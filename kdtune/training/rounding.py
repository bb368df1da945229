"""Updates that are lost in rounding: a weight in half precision does not move by less than half the distance to its neighbour."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Optimizer

from kdtune.log import get_logger

_SAMPLE = 4096
_TOLD_FROM = 0.5


@torch.no_grad()
def lost_share(optimizer: Optimizer) -> float:
    """Share of the trained weights that an update of the size of their learning rate leaves as they are.

    Adam's updates have about that size. Each tensor is looked at in up to 4,096 places of this process's share.
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
    values = (weight.to_local() if isinstance(weight, DTensor) else weight).flatten()
    if len(values) == 0:
        return 0.0
    values = values[:: -(-len(values) // _SAMPLE)]
    return float(((values + rate == values) & (values - rate == values)).float().mean())


def warn_of_lost_updates(optimizer: Optimizer) -> None:
    """Logs a line where most weights would not move: trained in half precision, at a learning rate too small for it.

    SGD's updates have no size of their own, and optimizers that round stochastically lose none: of these nothing is said.
    """
    if isinstance(optimizer, SGD) or getattr(optimizer, "bf16_stochastic_round", False):
        return
    share = lost_share(optimizer)
    if share >= _TOLD_FROM:
        rates = sorted({float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups})
        get_logger(__name__).warning(
            "the trained weights are in bf16, where an update of the size of optimizer.lr=%s leaves %.0f %% of them as they are; set "
            "dtype=fp32 (on several processes with parallelism.param_dtype=bf16, which still computes in bf16) or a larger optimizer.lr",
            ", ".join(f"{rate:g}" for rate in rates), 100 * share,
        )  # fmt: skip
