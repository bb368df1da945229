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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtune.errors import TrainingError
from kdtune.losses.comparison import Compare, Settings, compare_
from kdtune.losses.contract import Divergence
from kdtune.losses.heads import Projection
from kdtune.losses.products import (
    Buffers,
    Logits,
    add_weight_gradient_,
    block_size,
    hidden_gradient,
    new_weight_gradient,
    project,
    rows_of,
    scaled_weight_gradient_,
    slices,
    sum_dtype,
)
from kdtune.losses.signal import SampledSignal, Signal
from kdtune.losses.sparse import SampledRows, SparseRows, TeacherTargets
from kdtune.losses.vocab_shards import VocabShards

# Logits of a chunk, for each of the two models, chosen with bench/loss.py: more makes the matrix products a little faster.
CHUNK_BYTES = 168 * 2**20


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
    class_weights_N: Tensor | None = None  # of each token's cross entropy, besides; None: all 1
    teacher_targets: TeacherTargets | None = None  # what the loss keeps of dense teacher rows; None: all
    num_compared: int | None = None  # the first tokens, which alone have a teacher's row; None: all
    logits_dtype: torch.dtype | None = None  # of logits in memory and their gradient; None: fp32 or wider
    with_log_ratio: bool = False
    compare_: Compare = compare_  # or a compiled one


@dataclass(frozen=True)
class Sums:
    """Sums over the valid tokens. kd and agreement are None without a teacher; only total has a gradient."""

    total: Tensor  # (1 - kd_ratio) * ce + kd_ratio * kd
    ce: Tensor
    kd: Tensor | None
    agreement: Tensor | None
    """Tokens to which both models give the same most likely id; None: the teacher's is not known."""
    outside: Tensor | None
    """Probability that the student gives to ids that the teacher's head does not have; None: it has all."""
    log_ratio: Tensor | None = None
    """log q - log p of the labels, q the student's and p the teacher's probability, without weights; None: not asked for."""


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
        dtype, num_tokens = sum_dtype(hidden_TD), len(task.labels_N)
        grad_weight_VD = new_weight_gradient(weight_VD, dtype, num_tokens) if needs_weight else None
        student = Projection(hidden_TD, weight_VD, shards, softcap)
        with torch.autocast(hidden_TD.device.type, enabled=False), Buffers() as buffers:
            sums = _run_chunks(student, task, buffers, grad_hidden_TD, grad_weight_VD)
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        parts = (sums.ce, sums.kd, sums.agreement, sums.outside, sums.log_ratio)
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
            # In place. Autograd's version check then refuses a second backward through the same graph.
            grad_weight_VD = scaled_weight_gradient_(grad_weight_VD, grad_total, ctx.weight_dtype)
        return grad_hidden_TD, grad_weight_VD, None, None, None, None


def _run_chunks(
    student: Projection, task: Task, buffers: Buffers, grad_hidden_TD: Tensor | None, grad_weight_VD: Tensor | None
) -> Sums:
    """Return the sums over all chunks. The gradients of the total are written into the given tensors, if any."""
    num_tokens, vocab_size, shards = len(task.labels_N), student.vocab_size, student.shards
    dtype = sum_dtype(student.hidden_TD)
    # For a sharded head, the largest number of ids on any process: all must use the same chunks.
    num_ids = max(shards.num_ids(vocab_size)) if shards else vocab_size
    chunk_size = chunk_tokens(num_ids, task.logits_dtype or dtype, task.chunk_size)
    # Reused by every chunk: on a CPU, touching fresh pages costs about as much as computing on them.
    rows = min(chunk_size, num_tokens)
    student_buffers, teacher_buffers = _logits_of_chunk(student, task, buffers, rows, dtype)
    ce_N = student.hidden_TD.new_zeros(num_tokens, dtype=dtype)
    kd_N, agreement_N, outside_N, log_ratio_N = (torch.zeros_like(ce_N) for _ in range(4))

    needs_grad = grad_hidden_TD is not None or grad_weight_VD is not None
    num_teacher_ids = None if task.teacher is None else task.teacher.vocab_size
    settings = Settings(task.divergence, task.kd_ratio, num_teacher_ids, task.teacher_targets, student.softcap, needs_grad,
                        task.with_log_ratio)  # fmt: skip
    teacher_rows: Logits | SparseRows | None = None
    for chunk, is_compared in _task_chunks(task, chunk_size):
        positions_C, labels_C = task.positions_N[chunk], task.labels_N[chunk]
        hidden_CD = student.hidden_TD[positions_C]
        # The tokens whose full rows of logits are here: all of the chunk, or a share with a sharded head.
        own = shards.own_tokens(len(labels_C)) if shards else slice(0, len(labels_C))
        logits = _project_rows(student, positions_C, own, student_buffers, vocab_size)
        if isinstance(task.teacher, Projection):
            teacher_rows = _project_rows(task.teacher, positions_C, own, teacher_buffers, vocab_size)
        elif isinstance(task.teacher, Signal) and is_compared:
            teacher_rows = _signal_rows(task.teacher, positions_C[own], vocab_size, dtype)
        for block in slices(len(logits[0]), block_size(logits[0])):
            compared = _block_of(teacher_rows, block) if is_compared else None
            given = (task.weights_N, task.class_weights_N)
            weights = tuple(None if one is None else one[chunk][own][block].to(dtype) for one in given)
            parts = task.compare_(rows_of(logits, block), compared, labels_C[own][block], weights, settings)
            for values_N, part in zip((ce_N, kd_N, agreement_N, outside_N, log_ratio_N), parts, strict=True):
                values_N[chunk][own][block] = part
        if not needs_grad:
            continue
        grad_logits_CV = logits[0]  # overwritten by now
        if shards:
            grad_logits_CV = shards.to_ids(grad_logits_CV, len(labels_C))
        if grad_hidden_TD is not None:
            grad_hidden_TD[positions_C] = hidden_gradient(grad_logits_CV, hidden_CD, student)
        if grad_weight_VD is not None:
            is_first = chunk.start == 0
            add_weight_gradient_(grad_weight_VD, grad_logits_CV, hidden_CD, student.weight_VD, is_first=is_first)

    sums = torch.stack([one.sum() for one in (ce_N, kd_N, agreement_N, outside_N, log_ratio_N)])
    ce, kd, agreement, outside, log_ratio = shards.sum_(sums) if shards else sums
    # A part with weight 0 is skipped, not multiplied by 0: it may be infinite.
    total = sum((w * part for w, part in ((1 - task.kd_ratio, ce), (task.kd_ratio, kd)) if w), ce.new_zeros(()))
    if task.teacher is None:
        return Sums(total, ce, None, None, None)
    is_drawn = isinstance(task.teacher, SampledSignal) or isinstance(teacher_rows, SampledRows)
    known = None if is_drawn else agreement
    return Sums(total, ce, kd, known, outside if task.teacher.vocab_size < vocab_size else None,
                log_ratio if task.with_log_ratio else None)  # fmt: skip


def chunk_tokens(num_ids: int, dtype: torch.dtype, chunk_size: int | None) -> int:
    """Return the number of tokens whose logits, of so many ids in a dtype, are in memory at a time; `chunk_size` if it is given."""
    return chunk_size or max(1, CHUNK_BYTES // (num_ids * dtype.itemsize))


def _logits_of_chunk(
    student: Projection, task: Task, buffers: Buffers, rows: int, dtype: torch.dtype
) -> tuple[Logits, Logits]:
    """Return memory for the logits of a chunk of `rows` tokens of the student, and of a teacher of hidden states."""
    shards, vocab_size, teacher = student.shards, student.vocab_size, task.teacher
    ours = buffers.logits(student, rows, student.num_ids(vocab_size), _logits_dtype(student, task, dtype))
    if not isinstance(teacher, Projection):
        return ours, ()
    dtype = _logits_dtype(teacher, task, dtype)
    if teacher.shards:
        return ours, buffers.logits(teacher, rows, teacher.num_ids(min(teacher.vocab_size, vocab_size)), dtype)
    # A full head beside a sharded student head is used only for this process's share of the tokens.
    theirs = buffers.logits(teacher, -(-rows // shards.group.size()) if shards else rows, vocab_size, dtype)
    for part in theirs:
        part[:, teacher.vocab_size :] = -torch.inf
    return ours, theirs


def _logits_dtype(head: Projection, task: Task, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a head's logits: the task's if the head's operands are in it."""
    is_in_it = head.hidden_TD.dtype == head.weight_VD.dtype == task.logits_dtype
    return head.hidden_TD.dtype if is_in_it else dtype


def _project_rows(head: Projection, positions_C: Tensor, own: slice, buffers: Logits, vocab_size: int) -> Logits:
    """Return logits [R, V] of the chunk's own tokens, -inf for ids beyond the head's rows."""
    num_ids = min(head.vocab_size, vocab_size)
    if head.shards is None:
        hidden_RD = head.hidden_TD[positions_C[own]]
        project(hidden_RD, head, tuple(buffer[:, :num_ids] for buffer in buffers))
        return rows_of(buffers, slice(len(hidden_RD)))
    (logits_CU,) = project(head.hidden_TD[positions_C], head, buffers)
    logits_RV = head.shards.to_rows(logits_CU, num_ids)
    return (logits_RV if num_ids == vocab_size else F.pad(logits_RV, (0, vocab_size - num_ids), value=-torch.inf),)


def _signal_rows(signal: Signal, positions_R: Tensor, vocab_size: int, dtype: torch.dtype) -> Logits | SparseRows:
    """Return a signal's rows; dense ones [R, V] cut to the student's ids, or -inf for those that the teacher lacks."""
    rows = signal.log_probs(positions_R)
    if not isinstance(rows, Tensor):
        return rows.to(dtype)
    rows = rows[:, :vocab_size].to(dtype)
    num_lacking = vocab_size - rows.shape[1]
    return (F.pad(rows, (0, num_lacking), value=-torch.inf) if num_lacking else rows,)


def _block_of(rows: Logits | SparseRows | None, block: slice) -> Logits | SparseRows | None:
    """Return a block of the teacher's rows."""
    return rows_of(rows, block) if isinstance(rows, tuple) else rows and rows[block]


def _task_chunks(task: Task, chunk_size: int) -> Iterator[tuple[slice, bool]]:
    """Yield the chunks of a task's tokens, and whether they are compared with the teacher."""
    length = len(task.labels_N)
    num_compared = length if task.num_compared is None else task.num_compared
    for start, stop, is_compared in ((0, num_compared, True), (num_compared, length, False)):
        for part in slices(stop - start, chunk_size):
            yield slice(start + part.start, start + part.stop), is_compared


def project_logits(head: Projection, positions_C: Tensor) -> Tensor:
    """Return fp32 logits [C, V] of some positions, float64 for float64 hidden states, for a head that is not in shards."""
    buffer = head.hidden_TD.new_empty(len(positions_C), len(head.weight_VD), dtype=sum_dtype(head.hidden_TD))
    return project(head.hidden_TD[positions_C], head, (buffer,))[0]


def chunk_slices(head: Projection, num_tokens: int, chunk_size: int | None) -> Iterator[slice]:
    """Return the chunks of some tokens; chunk_size None: by the bytes of their logits."""
    return slices(num_tokens, chunk_tokens(head.vocab_size, sum_dtype(head.hidden_TD), chunk_size))
