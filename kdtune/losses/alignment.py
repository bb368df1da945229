"""A teacher that reads the same text in tokens of its own: which positions of the two models belong together, and the loss there.

A chunk is a piece of the text that begins and ends between two tokens of both models (kdtune/data/alignment.py finds them, by
bytes). At its first position both models have read the same text; that is where whole distributions are compared.

Shapes: K chunks, N labelled positions of the student, M teacher tokens in chunks, C tokens of a chunk of the fused loss, V the
student's vocabulary, W the teacher's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdtune.errors import ConfigError, TrainingError
from kdtune.losses.contract import Divergence
from kdtune.losses.cross_tokenizer import ALM, cross_value_and_gradient, debiased
from kdtune.losses.fused_linear import CHUNK_BYTES, Task, fused_linear_kd, project_logits
from kdtune.losses.heads import Projection, project
from kdtune.losses.products import sum_dtype
from kdtune.losses.signal import HiddenSignal, Signal
from kdtune.losses.targets import Targets, check_positions, check_target_ids
from kdtune.losses.token_log_probs import (
    dense_rows,
    set_log_probs,
    signal_set_log_probs,
    signal_token_log_probs,
    token_log_probs,
)

if TYPE_CHECKING:
    from kdtune.losses.kd_loss import KDLoss


@dataclass(frozen=True)
class Alignment:
    """The chunks of a batch. The first K of the targets' positions are those that predict a chunk's first token."""

    teacher_positions_K: Tensor
    """int64: position that predicts the chunk's first teacher token, among the teacher's flattened [B, S]."""
    num_tokens_K: Tensor
    """int64: the student's tokens of the chunk, which it stands for."""
    is_exact_K: Tensor
    """bool: the tokens of both models are the same bytes. False where a template's blank belongs to one of them."""
    meets_next_K: Tensor
    """bool: the next chunk begins where this one ends, for both models."""
    last_labels_K: Tensor
    """int64: the student's id of the chunk's last token."""
    chunks_N: Tensor
    """int64: chunk of each of the student's targets; K for none."""
    teacher_text_M3: Tensor
    """int64: position, next token and chunk of each teacher token in a chunk."""
    teacher_shape: tuple[int, ...]
    """(B, S) of the teacher's tokens."""
    all_exact: bool

    @property
    def num_chunks(self) -> int:
        """K."""
        return len(self.num_tokens_K)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Alignment":
        """Return the alignment with a function applied to each tensor."""
        mapped: dict[str, Any] = {
            name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **mapped)

    def moved(self, teacher_index_T: Tensor, teacher_shape: Sequence[int]) -> "Alignment":
        """Return the alignment with another layout of the teacher's tokens, see `Targets.moved`."""
        positions_M, *others_M = self.teacher_text_M3.unbind(1)
        return replace(
            self,
            teacher_positions_K=teacher_index_T[self.teacher_positions_K],
            teacher_text_M3=torch.stack([teacher_index_T[positions_M], *others_M], dim=1),
            teacher_shape=tuple(teacher_shape),
        )


def align(targets: Targets, chunks_K5: Tensor, teacher_tokens_BS: Tensor) -> Targets:
    """Return the targets in the order that an `Alignment` needs, with it; on the CPU.

    Args:
        targets: the student's.
        chunks_K5: first and last boundary of each chunk in the flattened positions of the student, then of the teacher; and 1
            where `Alignment.is_exact_K` is true. The student's tokens of a chunk all have labels; no two chunks share any.
        teacher_tokens_BS: the teacher's ids.
    """
    first_K, last_K, teacher_first_K, teacher_last_K, exact_K = chunks_K5.unbind(1)
    num_chunks = len(chunks_K5)
    chunk_of = torch.full((max(1, int(torch.tensor(targets.shape).prod())),), num_chunks)
    chunk_of[_ranges(first_K, last_K)] = torch.arange(num_chunks).repeat_interleave(last_K - first_K)
    is_first_N = torch.isin(targets.positions_N, first_K)
    order_N = torch.cat([is_first_N.nonzero(), (~is_first_N).nonzero()]).squeeze(1)
    by_position_K = first_K.argsort()
    rank_K = torch.empty_like(by_position_K)
    rank_K[by_position_K] = torch.arange(num_chunks)
    rank = torch.cat([rank_K, torch.tensor([num_chunks])])  # chunks in the order of their first positions
    positions_N = targets.positions_N[order_N]
    ends = [one[by_position_K] for one in (first_K, last_K, teacher_first_K, teacher_last_K)]
    meets_next_K = torch.zeros(num_chunks, dtype=torch.bool)
    meets_next_K[:-1] = (ends[1][:-1] == ends[0][1:]) & (ends[3][:-1] == ends[2][1:])
    text_M = _ranges(teacher_first_K, teacher_last_K)
    text_chunk_M = rank_K.repeat_interleave(teacher_last_K - teacher_first_K)
    found = Alignment(
        ends[2],
        ends[1] - ends[0],
        exact_K[by_position_K] == 1,
        meets_next_K,
        targets.to_labels().flatten()[ends[1] - 1],
        rank[chunk_of[positions_N]],
        torch.stack([text_M, teacher_tokens_BS.flatten()[text_M + 1], text_chunk_M], dim=1),
        tuple(teacher_tokens_BS.shape),
        bool((exact_K == 1).all()),
    )
    weights_N = None if targets.weights_N is None else targets.weights_N[order_N]
    labels_N = targets.labels_N[order_N]
    return replace(targets, positions_N=positions_N, labels_N=labels_N, weights_N=weights_N, alignment=found)


def _ranges(first_K: Tensor, last_K: Tensor) -> Tensor:
    """Return the integers of all half-open ranges, one range after the other."""
    sizes_K = last_K - first_K
    starts = torch.cat([sizes_K.new_zeros(1), sizes_K.cumsum(0)[:-1]])
    return torch.arange(int(sizes_K.sum())) + (first_K - starts).repeat_interleave(sizes_K)


def aligned_loss(
    loss: "KDLoss", student: Projection, signal: Signal | None, targets: Targets, alignment: Alignment
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what `KDLoss` does, for a teacher with tokens of its own: the parts "class_loss" and "kd_loss".

    Raises:
        ConfigError: the teacher is missing, or its signal cannot serve the loss.
        TrainingError: the signal is not of the teacher's positions.
    """
    check_target_ids(targets.id_range, student.vocab_size)
    if targets.class_weights_N is not None:
        raise TrainingError("targets.class_weights_N: of a teacher with another tokenizer; allowed is None")
    if loss.logits_dtype is not None:
        raise ConfigError("loss_logits_dtype: a cross-tokenizer loss has its logits in fp32; set null")
    task = Task(
        targets.positions_N, targets.labels_N, None, loss.divergence, loss.kd_ratio, loss.chunk_size, targets.weights_N
    )
    if loss.kd_ratio == 0:
        sums = fused_linear_kd(student, task)
        return sums.total, {"class_loss": sums.ce}
    if signal is None:
        raise ConfigError(f"a teacher is missing: kd_ratio is {loss.kd_ratio}; without a teacher it must be 0")
    check_positions("the teacher's log-probabilities", signal.shape, alignment.teacher_shape)
    teacher: Projection | Signal = signal
    if isinstance(signal, HiddenSignal):
        with torch.no_grad():
            teacher = project("teacher", signal.hidden_BSD, signal.output)
    for head in (student, teacher):
        if isinstance(head, Projection) and head.shards:
            raise ConfigError("a cross-tokenizer loss needs the whole heads of both models; set tp=1")
    if isinstance(loss.divergence, ALM):
        return _likelihood_loss(loss, loss.divergence, student, teacher, targets, alignment)
    if not getattr(loss.divergence, "is_cross_tokenizer", False):
        raise ConfigError(
            f"kd_loss: {type(loss.divergence).__name__} compares distributions over the same ids, and the teacher has tokens of its "
            "own; allowed are kdtune.losses.ULD, HybridULD and ALM"
        )
    source = _AlignedTeacher(teacher, targets, alignment, student.vocab_size)
    if task.chunk_size is None:  # the teacher's rows are as long as its own vocabulary
        row_bytes = max(student.vocab_size, teacher.vocab_size) * sum_dtype(student.hidden_TD).itemsize
        task = replace(task, chunk_size=max(1, CHUNK_BYTES // row_bytes))
    sums = fused_linear_kd(student, replace(task, teacher=source, num_compared=alignment.num_chunks))
    return sums.total, {"class_loss": sums.ce, "kd_loss": sums.ce.new_zeros(()) if sums.kd is None else sums.kd}


def _likelihood_loss(
    loss: "KDLoss",
    alm: ALM,
    student: Projection,
    teacher: Projection | Signal,
    targets: Targets,
    alignment: Alignment,
) -> tuple[Tensor, dict[str, Tensor]]:
    if targets.weights_N is not None:
        raise TrainingError("targets.weights_N: ALM compares pieces of text, not tokens; allowed is None")
    logp_N = token_log_probs(student, targets.positions_N, targets.labels_N, loss.chunk_size)
    positions_M, labels_M, chunks_M = alignment.teacher_text_M3.unbind(1)
    teacher_logp_M = signal_token_log_probs(teacher, positions_M, labels_M, loss.chunk_size)
    empty = logp_N.new_zeros(alignment.num_chunks + 1)  # one more for tokens in no chunk
    student_K = empty.index_add(0, alignment.chunks_N, logp_N)[:-1]
    teacher_K = empty.index_add(0, chunks_M, teacher_logp_M.to(logp_N.dtype))[:-1]
    ce = -logp_N.sum()
    if alm.debias_threshold is None:
        kd = alm(student_K, teacher_K).sum()
    else:
        our_ids, their_ids, special_ids = alm.word_starts(logp_N.device)
        starts_K = set_log_probs(student, targets.positions_N[: alignment.num_chunks], our_ids, loss.chunk_size)
        teacher_starts_K = signal_set_log_probs(teacher, alignment.teacher_positions_K, their_ids, loss.chunk_size)
        kd = debiased(
            alm,
            (student_K, teacher_K),
            (starts_K, teacher_starts_K.to(logp_N.dtype)),
            alignment.meets_next_K,
            (alignment.last_labels_K[:, None] == special_ids).any(1),
        )
    # A part with weight 0 is left out, not multiplied by 0: it may be infinite.
    total = loss.kd_ratio * kd if loss.kd_ratio == 1 else (1 - loss.kd_ratio) * ce + loss.kd_ratio * kd
    return total, {"class_loss": ce.detach(), "kd_loss": kd.detach()}


class _AlignedTeacher:
    """The teacher's rows for the student's positions at which a chunk begins."""

    def __init__(self, teacher: Projection | Signal, targets: Targets, alignment: Alignment, vocab_size: int) -> None:
        self._teacher, self._all_exact = teacher, alignment.all_exact
        self.shape, self.vocab_size = targets.shape, vocab_size
        first_K = targets.positions_N[: alignment.num_chunks]
        # By the student's position: the teacher's, the tokens it stands for, and whether it is exact.
        self._at_T3 = first_K.new_zeros((max(1, torch.Size(targets.shape).numel()), 3))
        self._at_T3[first_K] = torch.stack(
            [alignment.teacher_positions_K, alignment.num_tokens_K, alignment.is_exact_K.long()], dim=1
        )

    def log_probs(self, positions_C: Tensor) -> Any:
        """Return the rows for some of the student's positions."""
        teacher_C, num_tokens_C, exact_C = self._at_T3[positions_C].unbind(1)
        if isinstance(self._teacher, Projection):
            logits_CW = project_logits(self._teacher, teacher_C)
        else:
            logits_CW = dense_rows(self._teacher, teacher_C)
        return _AlignedRows(logits_CW, num_tokens_C, None if self._all_exact else exact_C == 1)


@dataclass(frozen=True)
class _AlignedRows:
    logits_RW: Tensor
    weights_R: Tensor
    is_exact_R: Tensor | None  # None: all are

    def __getitem__(self, rows: slice) -> "_AlignedRows":
        exact_R = None if self.is_exact_R is None else self.is_exact_R[rows]
        return _AlignedRows(self.logits_RW[rows], self.weights_R[rows], exact_R)

    def to(self, dtype: torch.dtype) -> "_AlignedRows":
        return _AlignedRows(self.logits_RW.to(dtype), self.weights_R.to(dtype), self.is_exact_R)

    def most_likely(self) -> Tensor:
        return self.logits_RW.argmax(-1)

    def value_and_gradient(self, divergence: Divergence, s_RV: Tensor) -> tuple[Tensor, Tensor]:
        values_R, slope_RV = cross_value_and_gradient(divergence, s_RV, self.logits_RW.log_softmax(-1), self.is_exact_R)
        return values_R * self.weights_R, slope_RV * self.weights_R[:, None]
