"""Log-probabilities of given tokens or sets of tokens, from hidden states and an output head; logits are computed again in backward.

Shapes as in `fused_linear`.
"""

from typing import Any

import torch
from torch import Tensor

from kdtune.errors import ConfigError
from kdtune.losses.fused_linear import CHUNK_BYTES, chunk_slices, project_logits
from kdtune.losses.heads import Projection
from kdtune.losses.products import add_weight_gradient_, hidden_gradient, new_weight_gradient
from kdtune.losses.signal import Signal, TextSignal


def token_log_probs(head: Projection, positions_N: Tensor, labels_N: Tensor, chunk_size: int | None = None) -> Tensor:
    """Return log softmax(logits)[label] of each position, [N], in fp32 or, for float64 hidden states, in float64.

    Gradients flow to hidden states and weight. Neither pass holds more logits than those of a chunk.

    Args:
        head: hidden states and the head's weight; not in shards.
        positions_N: int64, each at most once.
        labels_N: int64 ids.
        chunk_size: tokens whose logits exist at a time; None: as many as fit a fixed number of bytes.
    """
    found: Tensor = _LogProbs.apply(
        head.hidden_TD, head.weight_VD, head.softcap, positions_N, labels_N, None, chunk_size
    )
    return found


def set_log_probs(head: Projection, positions_N: Tensor, ids_U: Tensor, chunk_size: int | None = None) -> Tensor:
    """Return the logarithm of the probability that all of `ids_U` have together, of each position, [N], as `token_log_probs`.

    Args:
        head: hidden states and the head's weight; not in shards.
        positions_N: int64, each at most once.
        ids_U: int64 ids, each once.
        chunk_size: tokens whose logits exist at a time; None: as many as fit a fixed number of bytes.
    """
    found: Tensor = _LogProbs.apply(head.hidden_TD, head.weight_VD, head.softcap, positions_N, None, ids_U, chunk_size)
    return found


@torch.no_grad()
def signal_token_log_probs(
    teacher: Projection | Signal, positions_N: Tensor, labels_N: Tensor, chunk_size: int | None = None
) -> Tensor:
    """Return a teacher's log-probability [N] of the label of each position, in fp32 or wider; a constant.

    Args:
        teacher: hidden states and the head's weight, or another signal.
        positions_N: int64.
        labels_N: int64 ids, of the teacher.
        chunk_size: as of `token_log_probs`.

    Raises:
        ConfigError: the signal lacks most ids.
    """
    if isinstance(teacher, Projection):
        return token_log_probs(teacher, positions_N, labels_N, chunk_size)
    if isinstance(teacher, TextSignal):
        return teacher.text_log_probs(positions_N)
    size = chunk_size or max(1, CHUNK_BYTES // (teacher.vocab_size * torch.float32.itemsize))
    pieces = zip(positions_N.split(size), labels_N.split(size), strict=True)
    found = [dense_rows(teacher, at).gather(1, labels[:, None]).squeeze(1) for at, labels in pieces]
    return torch.cat(found)


@torch.no_grad()
def signal_set_log_probs(
    teacher: Projection | Signal, positions_N: Tensor, ids_U: Tensor, chunk_size: int | None = None
) -> Tensor:
    """Return the logarithm of the probability that a teacher gives to all of `ids_U` together, as `signal_token_log_probs`.

    Args:
        teacher: hidden states and the head's weight, or another signal.
        positions_N: int64.
        ids_U: int64 ids of the teacher, each once.
        chunk_size: as of `token_log_probs`.

    Raises:
        ConfigError: the signal lacks most ids.
    """
    if isinstance(teacher, Projection):
        return set_log_probs(teacher, positions_N, ids_U, chunk_size)
    if isinstance(teacher, TextSignal):
        raise ConfigError(
            "the teacher gives the probabilities of the text alone: this loss needs every probability of the teacher"
        )
    size = chunk_size or max(1, CHUNK_BYTES // (teacher.vocab_size * torch.float32.itemsize))
    return torch.cat([dense_rows(teacher, at)[:, ids_U].logsumexp(-1) for at in positions_N.split(size)])


def dense_rows(signal: Signal, positions_C: Tensor) -> Tensor:
    """Return a signal's log-probabilities [C, V].

    Raises:
        ConfigError: it lacks most ids.
    """
    rows = signal.log_probs(positions_C)
    if not isinstance(rows, Tensor):
        raise ConfigError(
            f"the teacher's {type(rows).__name__} lack most ids: this loss needs every probability of the teacher, or those of the text"
        )
    return rows


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        softcap: float | None,
        positions_N: Tensor,
        labels_N: Tensor | None,
        ids_U: Tensor | None,
        chunk_size: int | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden_TD, weight_VD, positions_N, labels_N, ids_U)
        ctx.softcap, ctx.chunk_size = softcap, chunk_size
        head = Projection(hidden_TD, weight_VD, softcap=softcap)
        found = hidden_TD.new_zeros(len(positions_N), dtype=torch.promote_types(hidden_TD.dtype, torch.float32))
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for chunk in chunk_slices(head, len(positions_N), chunk_size):
                logits_CV = project_logits(head, positions_N[chunk])
                chosen = logits_CV[:, ids_U] if labels_N is None else logits_CV.gather(1, labels_N[chunk, None])
                found[chunk] = chosen.logsumexp(-1) - logits_CV.logsumexp(-1)
        return found

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, positions_N, labels_N, ids_U = ctx.saved_tensors
        head = Projection(hidden_TD, weight_VD, softcap=ctx.softcap)
        grad_hidden_TD = torch.zeros_like(hidden_TD) if ctx.needs_input_grad[0] else None
        grad_weight_VD: Tensor | None = None
        if ctx.needs_input_grad[1]:
            grad_weight_VD = new_weight_gradient(weight_VD, grad_N.dtype, len(positions_N))
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for chunk in chunk_slices(head, len(positions_N), ctx.chunk_size):
                logits_CV = project_logits(head, positions_N[chunk])
                slope_CV = None if head.softcap is None else 1 - (logits_CV / head.softcap).square()
                grad_CV = logits_CV.softmax(-1).mul_(-grad_N[chunk, None])
                if labels_N is not None:
                    grad_CV[torch.arange(len(grad_CV), device=grad_CV.device), labels_N[chunk]] += grad_N[chunk]
                else:
                    grad_CV.index_add_(1, ids_U, logits_CV[:, ids_U].softmax(-1) * grad_N[chunk, None])
                if slope_CV is not None:
                    grad_CV.mul_(slope_CV)
                hidden_CD = hidden_TD[positions_N[chunk]]
                if grad_hidden_TD is not None:
                    grad_hidden_TD[positions_N[chunk]] = hidden_gradient(grad_CV, hidden_CD, head)
                if grad_weight_VD is not None:
                    add_weight_gradient_(grad_weight_VD, grad_CV, hidden_CD, weight_VD, is_first=chunk.start == 0)
        grad_weight = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_TD, grad_weight, None, None, None, None, None
