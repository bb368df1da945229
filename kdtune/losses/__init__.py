"""Losses: divergences, their plain-logit forms, and the fused linear path from hidden states."""

from kdtune.losses.contract import Divergence, check_divergence, covers_extra_ids, divergence_name, divergence_of
from kdtune.losses.divergences import ForwardKL, forward_kl
from kdtune.losses.heads import FactoredHead, check_head
from kdtune.losses.kd_loss import KDLoss, signal_cross_entropy
from kdtune.losses.plain import CrossEntropyLoss, DivergenceLoss, ForwardKLLoss
from kdtune.losses.signal import DenseSignal, HiddenSignal, Signal, TopKSignal
from kdtune.losses.targets import Targets

__all__ = [
    "CrossEntropyLoss",
    "DenseSignal",
    "Divergence",
    "DivergenceLoss",
    "FactoredHead",
    "ForwardKL",
    "ForwardKLLoss",
    "HiddenSignal",
    "KDLoss",
    "Signal",
    "Targets",
    "TopKSignal",
    "check_divergence",
    "check_head",
    "covers_extra_ids",
    "divergence_name",
    "divergence_of",
    "forward_kl",
    "signal_cross_entropy",
]
