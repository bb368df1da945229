"""What two models have in common at the next tokens of a text that one of them has written.

Shapes: M positions that are looked at, V vocabulary, K most likely ids.
"""

import torch
from torch import Tensor

from kdtune.losses.fused_linear import project_logits
from kdtune.losses.heads import Projection
from kdtune.losses.signal import Signal, TextSignal
from kdtune.losses.targets import Targets

NUM_MOST_LIKELY = 16


def watched_parts(
    student: Projection, teacher: Projection | Signal, targets: Targets, log_ratio: Tensor
) -> dict[str, Tensor]:
    """Return the parts of the loss that watched targets add, sums: "log_ratio" and, if the teacher's most likely ids are known, "overlap".

    Args:
        student: hidden states and head; not in shards.
        teacher: hidden states and head, or another signal.
        targets: with `watched_M`.
        log_ratio: log q - log p of all labels, summed; of no meaning for a teacher of sparse rows, for which nothing is returned.
    """
    assert targets.watched_M is not None
    shared = shared_most_likely(student, teacher, targets.positions_N[targets.watched_M])
    if shared is not None:
        return {"log_ratio": log_ratio, "overlap": shared}
    return {"log_ratio": log_ratio} if isinstance(teacher, TextSignal) else {}


@torch.no_grad()
def shared_most_likely(student: Projection, teacher: Projection | Signal, positions_M: Tensor) -> Tensor | None:
    """Return the share of ids that are among the 16 most likely of both models, summed over positions: a 0-d tensor in fp32.

    In a smaller vocabulary all ids count. None if the teacher's signal lacks most ids. Whole rows of logits are computed for these
    positions, and their largest sought: for a few, not for all of a batch.

    Args:
        student: hidden states and head; not in shards.
        teacher: hidden states and head, or another signal.
        positions_M: int64.
    """
    with torch.autocast(positions_M.device.type, enabled=False):
        ours_MK = _most_likely(student, positions_M, student.vocab_size)
        theirs_MK = _most_likely(teacher, positions_M, student.vocab_size)
    if ours_MK is None or theirs_MK is None:
        return None
    is_shared_MK = (ours_MK[:, :, None] == theirs_MK[:, None, :]).any(-1)
    return is_shared_MK.sum(dtype=torch.float32) / ours_MK.shape[1]


def _most_likely(source: Projection | Signal, positions_M: Tensor, vocab_size: int) -> Tensor | None:
    """Return the most likely ids [M, K] among the first `vocab_size`; None if they are not known."""
    if isinstance(source, TextSignal):
        return None
    rows_MV = project_logits(source, positions_M) if isinstance(source, Projection) else source.log_probs(positions_M)
    if not isinstance(rows_MV, Tensor):
        return None
    rows_MV = rows_MV[:, :vocab_size]
    return rows_MV.topk(min(NUM_MOST_LIKELY, rows_MV.shape[1])).indices
