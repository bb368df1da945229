"""Output projection, softmax, loss and gradient, chunk by chunk: the [tokens, vocabulary] logits never exist.

For each chunk, student and teacher are projected, the loss is differentiated with respect to the student's logits while
they are still there, and the result is multiplied straight back into the gradients of hidden states and head. The
backward pass only scales what the forward pass has stored, and memory does not grow with the number of tokens.

With g the gradient of a token's loss with respect to its log-probabilities, by the divergence's formula or by autograd on the
divergence alone, the gradient with respect to its logits z is g - softmax * sum(g); under a soft-cap, 1 - (z / softcap)^2
times that. Therefore any differentiable divergence works, and one of sparse targets too.

Shapes: T positions of the batch, N valid tokens among them, C tokens of a chunk, R tokens of a block of a chunk,
V the student's vocabulary, D embedding width (the student's and the teacher's may differ). The teacher gives no probability
to ids that it lacks; its rows for ids that the student lacks are dropped before its softmax.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtune.errors import TrainingError
from kdtune.losses.contract import Divergence, value_and_gradient
from kdtune.losses.heads import Projection
from kdtune.losses.signal import Signal
from kdtune.losses.sparse import SampledRows, SparseRows, TeacherTargets, sparse_value_and_gradient
from kdtune.losses.vocab_shards import VocabShards

# The sizes below were chosen with bench/loss.py.
# Logits of a chunk, for each of the two models: more makes the matrix products a little faster.
CHUNK_BYTES = 128 * 2**20
# On a CPU, softmax and divergence run on blocks of a chunk's rows, small enough for their temporaries to stay in cache.
CPU_BLOCK_BYTES = 8 * 2**20
# Where half-precision products cannot be summed in fp32, a head is raised to fp32 by tiles of its rows.
TILE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Task:
    """Loss inputs that are not differentiated: the targets, the teacher's distributions and the settings."""

    positions_N: Tensor  # the valid tokens among the T positions
    labels_N: Tensor  # their targets, ids that both heads have
    teacher: Projection | Signal | None  # None: cross entropy only, with kd_ratio 0
    divergence: Divergence  # of log-probabilities of the student's ids; the teacher's are -inf where it has no row
    kd_ratio: float
    chunk_size: int | None  # tokens; None: as many as CHUNK_BYTES hold
    weights_N: Tensor | None = None  # of each token's loss; None: all 1
    teacher_targets: TeacherTargets | None = None  # what the loss keeps of dense teacher rows; None: all
    num_compared: int | None = None  # the first tokens, which alone have a teacher's row; None: all


@dataclass(frozen=True)
class Sums:
    """Sums over the valid tokens. kd and agreement are None without a teacher; only total has a gradient."""

    total: Tensor  # (1 - kd_ratio) * ce + kd_ratio * kd
    ce: Tensor
    kd: Tensor | None
    agreement: (
        Tensor | None
    )  # tokens to which both models give the same most likely id; None: the teacher's is not known
    outside: (
        Tensor | None
    )  # probability that the student gives to ids that the teacher's head does not have; None: it has all


def fused_linear_kd(student: Projection, task: Task) -> Sums:
    """Compute the loss and its parts, in fp32 or, for float64 hidden states, in float64.

    Gradients flow to the student's hidden states and, if it requires one, to its weight; not to the teacher.
    """
    sums = _FusedLinear.apply(
        student.hidden_TD, student.weight_VD, student.shards, student.softcap, task, torch.is_grad_enabled()
    )
    return Sums(*sums)


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        shards: VocabShards | None,
        softcap: float | None,
        task: Task,
        with_grad: bool,
    ) -> tuple[Tensor | None, ...]:
        needs_hidden, needs_weight = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden_TD = torch.zeros_like(hidden_TD) if needs_hidden else None
        # Summed over all chunks, hence not in half precision.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=_sum_dtype(hidden_TD)) if needs_weight else None
        with torch.autocast(hidden_TD.device.type, enabled=False):
            sums = _run_chunks(Projection(hidden_TD, weight_VD, shards, softcap), task, grad_hidden_TD, grad_weight_VD)
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        parts = (sums.ce, sums.kd, sums.agreement, sums.outside)
        ctx.mark_non_differentiable(*(part for part in parts if part is not None))
        return sums.total, *parts

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # that is, create_graph=True: the result would silently be taken for a constant
            raise TrainingError(
                "the fused loss has no second derivative: backward got create_graph=True; allowed is False; "
                "for second derivatives use CrossEntropyLoss and ForwardKLLoss on plain logits"
            )
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        if grad_hidden_TD is not None:
            grad_hidden_TD = grad_hidden_TD * grad_total
        if grad_weight_VD is not None:
            # In place, for a second matrix would cost as much as the head. Autograd's version check then refuses a
            # second backward through the same graph.
            grad_weight_VD = grad_weight_VD.mul_(grad_total).to(ctx.weight_dtype)
        return grad_hidden_TD, grad_weight_VD, None, None, None, None


def _run_chunks(student: Projection, task: Task, grad_hidden_TD: Tensor | None, grad_weight_VD: Tensor | None) -> Sums:
    """Return the sums over all chunks. The gradients of the total are written into the given tensors, if any."""
    num_tokens, dtype = len(task.labels_N), _sum_dtype(student.hidden_TD)
    shards, vocab_size = student.shards, student.vocab_size
    # For a sharded head, the largest number of ids on any process: all must use the same chunks.
    num_ids = max(shards.num_ids(vocab_size)) if shards else vocab_size
    chunk_size = task.chunk_size or max(1, CHUNK_BYTES // (num_ids * dtype.itemsize))
    # Reused by every chunk: on a CPU, touching fresh pages costs about as much as computing on them.
    rows = min(chunk_size, num_tokens)
    student_buffer = student.hidden_TD.new_empty(rows, student.num_ids(vocab_size), dtype=dtype)
    teacher_buffer = None
    if isinstance(task.teacher, Projection):
        # A full head beside a sharded student head is used only for this process's share of the tokens.
        rows = -(-rows // shards.group.size()) if shards and not task.teacher.shards else rows
        teacher_buffer = _teacher_buffer(task.teacher, student_buffer, rows, vocab_size)
    ce_N = student_buffer.new_zeros(num_tokens)
    kd_N, agreement_N, outside_N = (torch.zeros_like(ce_N) for _ in range(3))

    teacher_CV: Tensor | SparseRows | None = None
    for chunk, is_compared in _task_chunks(task, chunk_size):
        positions_C, labels_C = task.positions_N[chunk], task.labels_N[chunk]
        hidden_CD = student.hidden_TD[positions_C]
        # The tokens whose full rows of logits are here: all of the chunk, or a share with a sharded head.
        own = shards.own_tokens(len(labels_C)) if shards else slice(0, len(labels_C))
        logits_CV = _project_rows(student, positions_C, own, student_buffer, vocab_size)
        if isinstance(task.teacher, Projection) and teacher_buffer is not None:
            teacher_CV = _project_rows(task.teacher, positions_C, own, teacher_buffer, vocab_size)
        elif isinstance(task.teacher, Signal) and is_compared:
            teacher_CV = _signal_rows(task.teacher, positions_C[own], vocab_size, dtype)
        needs_grad = grad_hidden_TD is not None or grad_weight_VD is not None
        for block in _slices(len(logits_CV), _block_size(logits_CV)):
            teacher_RV = teacher_CV[block] if teacher_CV is not None and is_compared else None
            weights_R = None if task.weights_N is None else task.weights_N[chunk][own][block].to(dtype)
            parts = _compare_(
                logits_CV[block], teacher_RV, labels_C[own][block], weights_R, task, needs_grad, student.softcap
            )
            for values_N, part in zip((ce_N, kd_N, agreement_N, outside_N), parts, strict=True):
                values_N[chunk][own][block] = part
        # From here on, logits_CV holds the gradient with respect to the logits.
        if needs_grad and shards:
            logits_CV = shards.to_ids(logits_CV, len(labels_C))
        if grad_hidden_TD is not None:
            grad_hidden_TD[positions_C] = hidden_grad(logits_CV, hidden_CD, student)
        if grad_weight_VD is not None:
            add_weight_grad_(grad_weight_VD, logits_CV, hidden_CD, student.weight_VD)

    sums = torch.stack((ce_N.sum(), kd_N.sum(), agreement_N.sum(), outside_N.sum()))
    ce, kd, agreement, outside = shards.sum_(sums) if shards else sums
    # A part with weight 0 is skipped, not multiplied by 0: it may be infinite.
    total = sum((w * part for w, part in ((1 - task.kd_ratio, ce), (task.kd_ratio, kd)) if w), ce.new_zeros(()))
    if task.teacher is None:
        return Sums(total, ce, None, None, None)
    return Sums(
        total,
        ce,
        kd,
        None if isinstance(teacher_CV, SampledRows) else agreement,
        outside if task.teacher.vocab_size < vocab_size else None,
    )


def _compare_(
    logits_RV: Tensor,
    teacher: Tensor | SparseRows | None,
    labels_R: Tensor,
    weights_R: Tensor | None,
    task: Task,
    needs_grad: bool,
    softcap: float | None,
) -> tuple[Tensor, Tensor | float, Tensor | float, Tensor | float]:
    """Return the parts of each token, as `Sums` names them. If needs_grad, logits_RV becomes the loss's gradient.

    Given soft-capped logits z, it is the gradient with respect to the product before the cap: 1 - (z / softcap)^2 times z's.
    """
    logp_RV = logits_RV.log_softmax(-1)
    ce_R = -logp_RV.gather(1, labels_R[:, None]).squeeze(1)
    kd_R: Tensor | float = 0.0
    agreement_R: Tensor | float = 0.0
    outside_R: Tensor | float = 0.0
    grad_logp_RV = None
    if task.teacher is not None and teacher is not None:
        agreement_R = _agreement(logits_RV, teacher)
        outside_R = logp_RV[:, task.teacher.vocab_size :].exp().sum(-1)
        kd_R, grad_logp_RV = _divergence(logp_RV, teacher, task)
        grad_logp_RV.mul_(task.kd_ratio)
    if needs_grad:
        slope_RV = None if softcap is None else 1 - (logits_RV / softcap).square()
        _logit_grad(logp_RV, grad_logp_RV, labels_R, task.kd_ratio, out_RV=logits_RV)
        for scale in (slope_RV, None if weights_R is None else weights_R[:, None]):
            if scale is not None:
                logits_RV.mul_(scale)
    if weights_R is not None:
        ce_R, kd_R = ce_R * weights_R, kd_R * weights_R
    return ce_R, kd_R, agreement_R, outside_R


def _divergence(logp_RV: Tensor, teacher: Tensor | SparseRows, task: Task) -> tuple[Tensor, Tensor]:
    """Return the divergence [R] from the teacher's rows and its partial derivatives [R, V] with respect to logp_RV."""
    if isinstance(teacher, Tensor):
        teacher = teacher.log_softmax(-1)
        teacher = task.teacher_targets.of(teacher) if task.teacher_targets else teacher
    if isinstance(teacher, Tensor):
        return value_and_gradient(task.divergence, logp_RV, teacher)
    return sparse_value_and_gradient(task.divergence, logp_RV, teacher)


def _agreement(logits_RV: Tensor, teacher: Tensor | SparseRows) -> Tensor:
    """Return 1 for tokens to which both give the same most likely id, else 0, [R]; 0 if the teacher's is not known."""
    if isinstance(teacher, SampledRows):
        return logits_RV.new_zeros(len(logits_RV))
    best_R = teacher.argmax(-1) if isinstance(teacher, Tensor) else teacher.most_likely()
    return (logits_RV.argmax(-1) == best_R).to(logits_RV.dtype)


def _logit_grad(
    logp_RV: Tensor, grad_logp_RV: Tensor | None, labels_R: Tensor, kd_ratio: float, *, out_RV: Tensor
) -> None:
    """Write g - softmax * sum(g) into out_RV, where g is the divergence's gradient plus the cross entropy's.

    The cross entropy's is -(1 - kd_ratio) at the label and 0 elsewhere.
    """
    p_RV = logp_RV.exp()
    if grad_logp_RV is None:
        torch.mul(p_RV, 1 - kd_ratio, out=out_RV)
    else:
        sum_R1 = grad_logp_RV.sum(-1, keepdim=True) - (1 - kd_ratio)
        torch.addcmul(grad_logp_RV, p_RV, sum_R1, value=-1, out=out_RV)
    out_RV[torch.arange(len(labels_R), device=out_RV.device), labels_R] -= 1 - kd_ratio


# ---- Matrix products: operands as they are where torch sums them in the wanted dtype, else raised to it tile by tile.


def _sum_dtype(hidden_TD: Tensor) -> torch.dtype:
    """Return fp32, or the wider dtype of the hidden states."""
    return torch.promote_types(hidden_TD.dtype, torch.float32)


def _operand_dtype(hidden: Tensor, weight: Tensor, sum_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which hidden states and weight must be multiplied for a result exact to `sum_dtype`.

    CUDA multiplies bf16 into an fp32 result; other devices round the result to bf16, so both are upcast there.
    """
    half = hidden.dtype == weight.dtype == torch.bfloat16 and sum_dtype == torch.float32
    return torch.bfloat16 if half and hidden.is_cuda and torch.version.hip is None else sum_dtype


def _mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Return the product of two matrices, computed to the precision of out's dtype."""
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else torch.mm(a, b, out_dtype=out.dtype, out=out)


def _addmm_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add the product of two matrices to out, computed to the precision of out's dtype."""
    return out.addmm_(a, b) if a.dtype == out.dtype else out.add_(torch.mm(a, b, out_dtype=out.dtype))


def _tiles(weight_VD: Tensor, vocab_size: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the first vocab_size rows of a head in `dtype`, and their slice: all at once if that takes no copy, else by tiles."""
    if weight_VD.dtype == dtype:
        yield slice(0, vocab_size), weight_VD[:vocab_size]
        return
    rows = _tile_rows(weight_VD, dtype)
    buffer = weight_VD.new_empty(min(rows, vocab_size), weight_VD.shape[1], dtype=dtype)
    for tile in _slices(vocab_size, rows):
        yield tile, buffer[: tile.stop - tile.start].copy_(weight_VD[tile])


def _tile_rows(weight_VD: Tensor, dtype: torch.dtype) -> int:
    """Return the number of rows of a head that take TILE_BYTES in `dtype`."""
    return max(1, TILE_BYTES // (weight_VD.shape[1] * dtype.itemsize))


def _teacher_buffer(teacher: Projection, like: Tensor, rows: int, vocab_size: int) -> Tensor:
    """Allocate the buffer for the teacher's logits, -inf beyond its vocabulary: [rows, V], or [rows, local ids] for a sharded head."""
    if teacher.shards:
        return like.new_empty(rows, teacher.num_ids(min(teacher.vocab_size, vocab_size)))
    buffer = like.new_empty(rows, vocab_size)
    buffer[:, teacher.vocab_size :] = -torch.inf
    return buffer


def _project_rows(head: Projection, positions_C: Tensor, own: slice, buffer: Tensor, vocab_size: int) -> Tensor:
    """Return logits [R, V] of the chunk's own tokens, -inf for ids beyond the head's rows."""
    num_ids = min(head.vocab_size, vocab_size)
    if head.shards is None:
        hidden_RD = head.hidden_TD[positions_C[own]]
        _project(hidden_RD, head, buffer[:, :num_ids])
        return buffer[: len(hidden_RD)]
    logits_RV = head.shards.to_rows(_project(head.hidden_TD[positions_C], head, buffer), num_ids)
    return logits_RV if num_ids == vocab_size else F.pad(logits_RV, (0, vocab_size - num_ids), value=-torch.inf)


def _signal_rows(signal: Signal, positions_R: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor | SparseRows:
    """Return a signal's rows; dense ones [R, V] cut to the student's ids, or -inf for those that the teacher lacks."""
    rows = signal.log_probs(positions_R)
    if not isinstance(rows, Tensor):
        return rows.to(dtype)
    rows = rows[:, :vocab_size].to(dtype)
    num_lacking = vocab_size - rows.shape[1]
    return F.pad(rows, (0, num_lacking), value=-torch.inf) if num_lacking else rows


def _project(hidden_CD: Tensor, head: Projection, buffer: Tensor) -> Tensor:
    """Return logits [C, V] of a chunk, in the first rows of the buffer."""
    logits_CV = buffer[: len(hidden_CD)]
    dtype = _operand_dtype(hidden_CD, head.weight_VD, buffer.dtype)
    hidden_CD = hidden_CD.to(dtype)
    for tile, weight in _tiles(head.weight_VD, logits_CV.shape[1], dtype):
        _mm(hidden_CD, weight.T, out=logits_CV[:, tile])
    return logits_CV if head.softcap is None else logits_CV.div_(head.softcap).tanh_().mul_(head.softcap)


def hidden_grad(grad_logits_CV: Tensor, hidden_CD: Tensor, head: Projection) -> Tensor:
    """Return the gradient [C, D] of the hidden states, in their dtype."""
    dtype = _operand_dtype(hidden_CD, head.weight_VD, grad_logits_CV.dtype)
    grad_CD = torch.zeros_like(hidden_CD, dtype=grad_logits_CV.dtype)
    for tile, weight in _tiles(head.weight_VD, grad_logits_CV.shape[1], dtype):
        _addmm_(grad_CD, grad_logits_CV[:, tile].to(dtype), weight)
    if head.shards:
        head.shards.sum_(grad_CD)
    return grad_CD.to(hidden_CD.dtype)


def add_weight_grad_(grad_weight_VD: Tensor, grad_logits_CV: Tensor, hidden_CD: Tensor, weight_VD: Tensor) -> None:
    """Add a chunk's share to the gradient of the head's rows."""
    dtype = _operand_dtype(hidden_CD, weight_VD, grad_weight_VD.dtype)
    hidden_CD = hidden_CD.to(dtype)
    for tile in _slices(grad_logits_CV.shape[1], _tile_rows(grad_weight_VD, grad_weight_VD.dtype)):
        _addmm_(grad_weight_VD[tile], grad_logits_CV[:, tile].T.to(dtype), hidden_CD)


def _task_chunks(task: Task, chunk_size: int) -> Iterator[tuple[slice, bool]]:
    """Yield the chunks of a task's tokens, and whether they are compared with the teacher."""
    length = len(task.labels_N)
    num_compared = length if task.num_compared is None else task.num_compared
    for start, stop in ((0, num_compared), (num_compared, length)):
        for part in _slices(stop - start, chunk_size):
            yield slice(start + part.start, start + part.stop), start == 0


def project_logits(head: Projection, positions_C: Tensor) -> Tensor:
    """Return fp32 logits [C, V] of some positions, float64 for float64 hidden states, for a head that is not in shards."""
    buffer = head.hidden_TD.new_empty(len(positions_C), len(head.weight_VD), dtype=_sum_dtype(head.hidden_TD))
    return _project(head.hidden_TD[positions_C], head, buffer)


def chunk_slices(head: Projection, num_tokens: int, chunk_size: int | None) -> Iterator[slice]:
    """Return the chunks of some tokens; chunk_size None: by the bytes of their logits."""
    row_bytes = head.vocab_size * _sum_dtype(head.hidden_TD).itemsize
    return _slices(num_tokens, chunk_size or max(1, CHUNK_BYTES // row_bytes))


def _slices(length: int, size: int) -> Iterator[slice]:
    """Return consecutive slices of about equal length, none longer than size, that cover range(length)."""
    count = math.ceil(length / size)
    return (slice(i * length // count, (i + 1) * length // count) for i in range(count))


def _block_size(logits_CV: Tensor) -> int:
    """Return the rows of a chunk that softmax and divergence process at once: all of them, except on a CPU; at least one."""
    if logits_CV.device.type != "cpu":
        return max(1, len(logits_CV))  # with a head in shards, a process may have none of a short chunk's rows
    return max(1, CPU_BLOCK_BYTES // (logits_CV.shape[1] * logits_CV.element_size()))
