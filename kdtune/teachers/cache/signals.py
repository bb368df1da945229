"""The rows of a cache as a signal for the loss, and which divergences each kind can serve.

Shapes: N stored positions of a micro-batch, B batch, S sequence, K ids kept of a position, D width of the hidden states.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kdtune.losses import HiddenSignal, SampledSignal, Signal, TextSignal, TopKSignal, divergence_name, divergence_of
from kdtune.losses.sparse import KIND_OF, Outside, target_problem
from kdtune.models import OutputHead
from kdtune.teachers.cache.header import Header
from kdtune.teachers.cache.kinds import KINDS, Kind


def stored_signal(
    header: Header,
    positions_N: Tensor,
    columns: Mapping[str, Tensor],
    shape: tuple[int, int],
    *,
    head: OutputHead | None = None,
    outside: Outside = "tail",
) -> Signal:
    """Return the signal of a micro-batch from what a cache keeps of some of its positions; at the others it means nothing.

    Args:
        header: the cache's.
        positions_N: int64, places of the rows among the flattened [B, S].
        columns: the kind's, [N, ...] each, see `kdtune.teachers.cache.columns`; on the device of the positions.
        shape: (B, S).
        head: the teacher's head, of kind hidden; its dtype is that of the hidden states.
        outside: what becomes of the ids that topk does not keep, see `kdtune.losses.TopKTargets`.
    """

    def spread(values: Tensor) -> Tensor:
        whole = values.new_zeros(math.prod(shape), *values.shape[1:])
        return whole.index_copy_(0, positions_N, values).view(*shape, *values.shape[1:])

    if header.kind == "hidden":
        if head is None:
            raise ValueError("stored_signal: hidden states need the teacher's head")
        hidden = columns["hidden"]
        if "scale" in columns:
            hidden = hidden.float() * columns["scale"][:, None]
        return HiddenSignal(spread(hidden.to(head.weight.dtype)), head)
    logp = spread(columns["logp"].float())
    if header.kind == "path":
        return TextSignal(logp, header.vocab_size)
    ids = spread(columns["ids"].long())
    if header.kind == "sampled":
        log_weights = -header.exponent * columns["logp"].float()
        if header.exponent != 1:
            log_weights = log_weights + columns["log_normalizer"][:, None]
        return SampledSignal(ids, logp, spread(log_weights.exp() / logp.shape[-1]), header.vocab_size)
    if outside != "tail":
        return TopKSignal(ids, logp * header.temperature, header.vocab_size, outside)
    return TopKSignal(ids, logp, header.vocab_size, "tail", spread(columns["log_tail"]))


def kind_problem(kind: Kind, kd_loss: Any, outside: Outside = "tail") -> str | None:
    """Return why a kind cannot serve the loss of a `kd_loss` component; None if it can. `outside` as of `stored_signal`."""
    if kind == "hidden":
        return None
    is_of_text, is_cross = (getattr(kd_loss, name, False) for name in ("of_text", "is_cross_tokenizer"))
    if kind == "path":
        needs_others = not is_of_text or getattr(kd_loss, "debias_threshold", None) is not None
        return "it knows the probability of the text's own tokens alone" if needs_others else None
    if is_cross:
        return "a cross-tokenizer loss needs every probability of the teacher"
    if is_of_text:
        return "it needs the probability of the text's own tokens"
    if kind == "sampled":
        return target_problem(divergence_of(kd_loss), "sampled")
    return target_problem(divergence_of(kd_loss), KIND_OF[outside])


def able_kinds(kd_loss: Any) -> list[str]:
    """Return the kinds that can serve a loss, as they are written in a config."""
    found = []
    for kind in KINDS:
        if kind_problem(kind, kd_loss) is None:
            found.append(f"kind={kind}")
        elif kind == "topk":
            others: tuple[Outside, ...] = ("renormalize", "ignore")
            able = [one for one in others if kind_problem(kind, kd_loss, one) is None]
            found += [f'kind=topk with outside="{one}"' for one in able[:1]]
    return found


def loss_problem(header: Header, kd_loss: Any, outside: Outside) -> str | None:
    """Return why a cache cannot serve a loss, and what can; None if it can."""
    problem = kind_problem(header.kind, kd_loss, outside)
    if problem is None and header.kind == "topk" and outside == "tail" and header.temperature != 1:
        return (
            f"its log-probabilities, and that of all other ids together, are at temperature {header.temperature:g}, and only those at 1 "
            'make a tail; capture with temperature=1, or outside="renormalize" or "ignore"'
        )
    if problem is None:
        return None
    return (
        f"kind={header.kind} cannot serve {divergence_name(kd_loss)}: {problem}; allowed are {', '.join(able_kinds(kd_loss))}: "
        "capture another kind, or choose another kd_loss"
    )
