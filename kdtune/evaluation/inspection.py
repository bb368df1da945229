"""What teacher and student expect at each token of a few examples."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdtune.data import Batch
from kdtune.generation import eval_mode
from kdtune.losses import Divergence, compare_logits
from kdtune.models import Transformer

# Positions whose logits exist at a time.
_CHUNK = 64


@torch.no_grad()
def inspect_tokens(
    student: Transformer,
    teacher: Transformer,
    divergence: Divergence,
    batch: Batch,
    text_of: Callable[[int], str],
    *,
    top: int = 5,
) -> list[list[dict[str, Any]]]:
    """Return the tokens of each row of a batch as objects with their text; those that are trained on are compared.

    A compared token also has `divergence`; of each model `NAME_loss`, its cross entropy on this token, and `NAME_entropy`, all
    in nats; and `NAME_top`, its most likely tokens instead: lists of text, the teacher's and the student's probability.

    Args:
        student: on one process, with its weights whole.
        teacher: likewise.
        divergence: between them, the run's own.
        batch: on the models' device.
        text_of: text of a token id.
        top: number of likely tokens of each model.
    """
    with eval_mode(student):
        hidden = [model(**batch.inputs, return_hidden=True).flatten(0, 1) for model in (student, teacher)]
    targets = batch.targets
    compared: dict[int, dict[str, Any]] = {}
    for positions, labels in zip(targets.positions_N.split(_CHUNK), targets.labels_N.split(_CHUNK), strict=True):
        logits = [model.output(states[positions]) for model, states in zip((student, teacher), hidden, strict=True)]
        logq, logp, values = compare_logits(divergence, *logits)
        for row, (position, label) in enumerate(zip(positions.tolist(), labels.tolist(), strict=True)):
            numbers = {"text": text_of(label), "divergence": float(values[row])}
            for name, logs in (("teacher", logp[row]), ("student", logq[row])):
                numbers |= _of_model(name, logs, label) | {
                    f"{name}_top": _top(logs, logp[row], logq[row], text_of, top)
                }
            compared[position] = numbers
    ids, rows = batch.tokens.flatten().tolist(), zip(batch.row_starts, batch.lengths, strict=True)
    return [_row(ids[start : start + length], start, compared, text_of) for start, length in rows]


def _row(ids: list[int], start: int, compared: dict[int, Any], text_of: Callable[[int], str]) -> list[dict[str, Any]]:
    """Return the tokens of a row: what a position is compared for is the token after it, which may be a label alone."""
    tokens = [{"text": text_of(one)} for one in ids]
    following = [compared.get(start + i) or (tokens[i + 1] if i + 1 < len(ids) else None) for i in range(len(ids))]
    return [*tokens[:1], *(token for token in following if token is not None)]


def _of_model(name: str, logs: Tensor, label: int) -> dict[str, float]:
    entropy = -(logs.exp() * logs.masked_fill(logs == -torch.inf, 0.0)).sum()
    return {f"{name}_loss": -float(logs[label]), f"{name}_entropy": float(entropy)}


def _top(of: Tensor, logp: Tensor, logq: Tensor, text_of: Callable[[int], str], top: int) -> list[list[Any]]:
    ids = of.topk(min(top, len(of))).indices
    return [[text_of(i), float(logp[i].exp()), float(logq[i].exp())] for i in ids.tolist()]
