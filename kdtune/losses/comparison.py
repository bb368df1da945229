"""Softmax, divergence and gradient of a block of logits: the part of the fused loss that is not a matrix product.

It runs as it is, or compiled. Shapes: R tokens of a block, V the student's vocabulary.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from kdtune.log import get_logger
from kdtune.losses.contract import Divergence, value_and_gradient
from kdtune.losses.divergences.base import first_id, most_likely
from kdtune.losses.products import Logits, joined
from kdtune.losses.sparse import SampledRows, SparseRows, TeacherTargets, sparse_value_and_gradient

log = get_logger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a block's loss depends on besides its logits and labels."""

    divergence: Divergence
    kd_ratio: float
    num_teacher_ids: int | None  # None: no teacher
    teacher_targets: TeacherTargets | None
    softcap: float | None  # the student's
    needs_grad: bool
    with_log_ratio: bool = False
    label_in_one_pass: bool = True
    """In compiled code, subtract the label's part in the gradient's own pass over the ids."""


Weights: TypeAlias = tuple[Tensor | None, ...]
"""Two tensors: factors [R] of the tokens' losses, and of their cross entropy besides; None: all 1."""
Parts: TypeAlias = tuple[Tensor, Tensor | float, Tensor | float, Tensor | float, Tensor | float]
Compare: TypeAlias = Callable[[Logits, Logits | SparseRows | None, Tensor, Weights, Settings], Parts]


def compare_(
    logits: Logits,
    teacher: Logits | SparseRows | None,
    labels_R: Tensor,
    weights: Weights,
    settings: Settings,
) -> Parts:
    """Return cross entropy, divergence, agreement, probability outside and, with_log_ratio, log q - log p of the label, of each token.

    The last needs all of the teacher's probabilities, and is 0 without them; no weights apply to it, q is the student's, p the teacher's.
    If needs_grad, the first tensor of the logits becomes the loss's gradient, in its dtype. Given soft-capped logits z, it is
    the gradient with respect to the product before the cap: 1 - (z / softcap)^2 times z's.
    """
    given_RV, logits_RV = logits[0], joined(logits)
    weights_R, class_weights_R = weights
    logp_RV, best_R = _log_softmax(logits_RV)
    ce_R = -logp_RV.gather(1, labels_R[:, None]).squeeze(1)
    kd_R: Tensor | float = 0.0
    agreement_R: Tensor | float = 0.0
    outside_R: Tensor | float = 0.0
    log_ratio_R: Tensor | float = 0.0
    grad_logp_RV = None
    if settings.num_teacher_ids is not None and teacher is not None:
        teacher_logp: Tensor | SparseRows
        if isinstance(teacher, tuple):
            teacher_logp, teachers_best_R = _log_softmax(joined(teacher).to(logp_RV.dtype))
            agreement_R = (best_R == teachers_best_R).to(logp_RV.dtype)
            if settings.with_log_ratio:
                log_ratio_R = -ce_R - teacher_logp.gather(1, labels_R[:, None]).squeeze(1)
        else:
            teacher_logp = teacher
            if not isinstance(teacher, SampledRows):
                agreement_R = (best_R == teacher.most_likely()).to(logp_RV.dtype)
        outside_R = logp_RV[:, settings.num_teacher_ids :].exp().sum(-1)
        kd_R, grad_logp_RV = _divergence(logp_RV, teacher_logp, settings)
        if settings.kd_ratio != 1:
            grad_logp_RV.mul_(settings.kd_ratio)
    if settings.needs_grad:
        softcap = settings.softcap
        slope_RV = None if softcap is None else 1 - (logits_RV / softcap).square()
        in_one_pass = settings.label_in_one_pass and torch.compiler.is_compiling()
        class_weight = (
            1 - settings.kd_ratio if class_weights_R is None else (1 - settings.kd_ratio) * class_weights_R[:, None]
        )
        _logit_grad(logp_RV, grad_logp_RV, labels_R, class_weight, out_RV=logits_RV, in_one_pass=in_one_pass)
        for scale in (slope_RV, None if weights_R is None else weights_R[:, None]):
            if scale is not None:
                logits_RV.mul_(scale)
        if given_RV.dtype != logits_RV.dtype:
            given_RV.copy_(logits_RV)
    if class_weights_R is not None:
        ce_R = ce_R * class_weights_R
    if weights_R is not None:
        ce_R, kd_R = ce_R * weights_R, kd_R * weights_R
    return ce_R, kd_R, agreement_R, outside_R, log_ratio_R


def compiled(device_type: str, problem: str | None = None) -> Compare:
    """Return `compare_` compiled, or itself with a problem or where there is no compiler for the device, and log which.

    Once for all numbers of tokens; each call of this function returns one with compiled code of its own.
    """
    if problem := problem or _lacking_compiler(device_type):
        log.warning("the loss is not compiled: %s", problem)
        return compare_
    from torch._inductor.exc import InductorError

    log.info("the loss is compiled at its first batch")
    # torch keeps what it compiled by the code object, up to a limit; a copy has a limit of its own.
    function = types.FunctionType(compare_.__code__.replace(), compare_.__globals__, compare_.__name__)
    function.__kwdefaults__ = compare_.__kwdefaults__
    run = torch.compile(function, dynamic=False)
    is_in_one_pass = True

    @functools.wraps(compare_)
    def compare(
        logits: Logits,
        teacher: Logits | SparseRows | None,
        labels_R: Tensor,
        weights: Weights,
        settings: Settings,
    ) -> Parts:
        of_teacher = () if teacher is None else teacher if isinstance(teacher, tuple) else vars(teacher).values()
        for tensor in (*logits, labels_R, *weights, *of_teacher):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        nonlocal is_in_one_pass
        block = (logits, teacher, labels_R, weights)
        try:
            parts: Parts = run(*block, replace(settings, label_in_one_pass=is_in_one_pass))
        except InductorError:
            # torch 2.13's compiler fails on that form after some divergences, such as a geometric mixture, and sparse targets.
            if not is_in_one_pass:
                raise
            is_in_one_pass = False
            parts = run(*block, replace(settings, label_in_one_pass=False))
        return parts

    return compare


@functools.cache
def _lacking_compiler(device_type: str) -> str | None:
    """Return what torch.compile lacks for code on a device; None if nothing."""
    if device_type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton is missing"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler; install g++ or clang++, or name one in the environment variable CXX"
    return None


def _divergence(logp_RV: Tensor, teacher: Tensor | SparseRows, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return the divergence [R] from the teacher's rows, dense ones normalized, and its slope [R, V], with respect to logp_RV."""
    if isinstance(teacher, Tensor) and settings.teacher_targets:
        teacher = settings.teacher_targets.of(teacher)
    if isinstance(teacher, Tensor):
        return value_and_gradient(settings.divergence, logp_RV, teacher)
    return sparse_value_and_gradient(settings.divergence, logp_RV, teacher)


def _log_softmax(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities [R, V], and each row's most likely id [R], the first of several."""
    if logits_RV.device.type != "cpu" or not torch.compiler.is_compiling():
        return logits_RV.log_softmax(-1), most_likely(logits_RV)
    # The compiler finds the largest value once, and sum and id in one pass.
    below_RV = logits_RV - logits_RV.amax(-1, keepdim=True)
    return below_RV - below_RV.exp().sum(-1, keepdim=True).log(), first_id(below_RV == 0)


def _logit_grad(
    logp_RV: Tensor,
    grad_logp_RV: Tensor | None,
    labels_R: Tensor,
    class_weight: Tensor | float,
    *,
    out_RV: Tensor,
    in_one_pass: bool,
) -> None:
    """Write g - softmax * sum(g) into out_RV, where g is the divergence's gradient plus the cross entropy's.

    The cross entropy's is -class_weight, a number or [R, 1], at the label and 0 elsewhere; in_one_pass: in a form for compiled code.
    """
    p_RV = logp_RV.exp()
    if grad_logp_RV is None:
        torch.mul(p_RV, class_weight, out=out_RV)
    else:
        sum_R1 = grad_logp_RV.sum(-1, keepdim=True) - class_weight
        torch.addcmul(grad_logp_RV, p_RV, sum_R1, value=-1, out=out_RV)
    if in_one_pass:
        ids_V = torch.arange(out_RV.shape[1], dtype=torch.int32, device=out_RV.device)
        is_label_RV = ids_V == labels_R[:, None].int()
        out_RV.copy_(torch.where(is_label_RV, out_RV - class_weight, out_RV))
    else:
        at_label = class_weight.squeeze(1) if isinstance(class_weight, Tensor) else class_weight
        out_RV[torch.arange(len(labels_R), device=out_RV.device), labels_R] -= at_label
