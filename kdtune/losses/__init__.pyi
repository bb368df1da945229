from .alignment import Alignment, align
from .contract import (
    Divergence,
    check_divergence,
    covers_extra_ids,
    divergence_name,
    divergence_of,
    is_of_text,
    value_and_gradient,
)
from .cross_tokenizer import ALM, ULD, HybridULD
from .divergences.adaptive_kl import AdaptiveKL
from .divergences.alpha_beta import AlphaBeta
from .divergences.arg_max import ArgMaxCrossEntropy
from .divergences.concrete_score import ConcreteScore
from .divergences.jensen_shannon import JensenShannon, TotalVariation
from .divergences.kl import ForwardKL, ReverseKL, SkewForwardKL, SkewReverseKL, SymmetricKL, forward_kl
from .divergences.mixture import BySource, Mixture, WeightedSum
from .divergences.taid import TAID
from .heads import Head, check_head
from .hidden_states import HiddenStateLoss
from .kd_loss import KDLoss, StatefulLoss, signal_cross_entropy
from .plain import CrossEntropyLoss, DivergenceLoss, ForwardKLLoss, compare_logits
from .sampled import SampledReverseKL
from .signal import DenseSignal, HiddenSignal, PendingSignal, SampledSignal, Signal, TextSignal, TopKSignal
from .sparse import SampledTargets, SparseRows, TeacherTargets, TopKTargets, check_targets
from .targets import Targets
from .token_log_probs import signal_token_log_probs, token_log_probs

__all__ = [
    "ALM",
    "TAID",
    "ULD",
    "AdaptiveKL",
    "Alignment",
    "AlphaBeta",
    "ArgMaxCrossEntropy",
    "BySource",
    "ConcreteScore",
    "CrossEntropyLoss",
    "DenseSignal",
    "Divergence",
    "DivergenceLoss",
    "ForwardKL",
    "ForwardKLLoss",
    "Head",
    "HiddenSignal",
    "HiddenStateLoss",
    "HybridULD",
    "JensenShannon",
    "KDLoss",
    "Mixture",
    "PendingSignal",
    "ReverseKL",
    "SampledReverseKL",
    "SampledSignal",
    "SampledTargets",
    "Signal",
    "SkewForwardKL",
    "SkewReverseKL",
    "SparseRows",
    "StatefulLoss",
    "SymmetricKL",
    "Targets",
    "TeacherTargets",
    "TextSignal",
    "TopKSignal",
    "TopKTargets",
    "TotalVariation",
    "WeightedSum",
    "align",
    "check_divergence",
    "check_head",
    "check_targets",
    "compare_logits",
    "covers_extra_ids",
    "divergence_name",
    "divergence_of",
    "forward_kl",
    "is_of_text",
    "signal_cross_entropy",
    "signal_token_log_probs",
    "token_log_probs",
    "value_and_gradient",
]
