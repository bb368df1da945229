"""Losses: divergences, their plain-logit forms, and the fused linear path from hidden states."""

from kdtune.losses.divergences import forward_kl
from kdtune.losses.fused_linear import Divergence
from kdtune.losses.kd_loss import (
    CrossEntropyLoss,
    DivergenceLoss,
    FactoredHead,
    ForwardKLLoss,
    KDLoss,
    check_head,
)
from kdtune.losses.signal import HiddenSignal, Signal

__all__ = [
    "CrossEntropyLoss",
    "Divergence",
    "DivergenceLoss",
    "FactoredHead",
    "ForwardKLLoss",
    "HiddenSignal",
    "KDLoss",
    "Signal",
    "check_head",
    "forward_kl",
]
