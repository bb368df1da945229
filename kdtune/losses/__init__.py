"""Losses: divergences, their plain-logit forms, and the fused linear path from hidden states."""

from kdtune.losses.contract import Divergence, check_divergence, covers_extra_ids
from kdtune.losses.divergences import forward_kl
from kdtune.losses.kd_loss import (
    CrossEntropyLoss,
    DivergenceLoss,
    FactoredHead,
    ForwardKLLoss,
    KDLoss,
    check_head,
    divergence_name,
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
    "check_divergence",
    "check_head",
    "covers_extra_ids",
    "divergence_name",
    "forward_kl",
]
