from .contract import Divergence, check_divergence, covers_extra_ids, divergence_name, divergence_of
from .divergences import ForwardKL, forward_kl
from .heads import Head, check_head
from .kd_loss import KDLoss, signal_cross_entropy
from .plain import CrossEntropyLoss, DivergenceLoss, ForwardKLLoss
from .signal import DenseSignal, HiddenSignal, Signal, TopKSignal
from .targets import Targets

__all__ = [
    "CrossEntropyLoss",
    "DenseSignal",
    "Divergence",
    "DivergenceLoss",
    "ForwardKL",
    "ForwardKLLoss",
    "Head",
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
