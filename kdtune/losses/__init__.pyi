from .contract import Divergence, check_divergence, covers_extra_ids, divergence_name, divergence_of, value_and_gradient
from .divergences.adaptive_kl import AdaptiveKL
from .divergences.alpha_beta import AlphaBeta
from .divergences.arg_max import ArgMaxCrossEntropy
from .divergences.concrete_score import ConcreteScore
from .divergences.jensen_shannon import JensenShannon, TotalVariation
from .divergences.kl import ForwardKL, ReverseKL, SkewForwardKL, SkewReverseKL, SymmetricKL, forward_kl
from .divergences.mixture import Mixture, WeightedSum
from .divergences.taid import TAID
from .heads import Head, check_head
from .hidden_states import HiddenStateLoss
from .kd_loss import KDLoss, StatefulLoss, signal_cross_entropy
from .plain import CrossEntropyLoss, DivergenceLoss, ForwardKLLoss, compare_logits
from .signal import DenseSignal, HiddenSignal, SampledSignal, Signal, TopKSignal
from .sparse import SampledTargets, SparseRows, TeacherTargets, TopKTargets, check_targets
from .targets import Targets

__all__ = [
    "TAID",
    "AdaptiveKL",
    "AlphaBeta",
    "ArgMaxCrossEntropy",
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
    "JensenShannon",
    "KDLoss",
    "Mixture",
    "ReverseKL",
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
    "TopKSignal",
    "TopKTargets",
    "TotalVariation",
    "WeightedSum",
    "check_divergence",
    "check_head",
    "check_targets",
    "compare_logits",
    "covers_extra_ids",
    "divergence_name",
    "divergence_of",
    "forward_kl",
    "signal_cross_entropy",
    "value_and_gradient",
]
