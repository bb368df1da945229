"""From a teacher's hidden states to what a cache keeps of them, and from that back to distributions.

Shapes: N positions, C positions of a chunk, V ids, D width of the hidden states, K ids kept of a position.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kdtune.losses.fused_linear import chunk_slices, project_logits
from kdtune.losses.heads import Projection, project
from kdtune.losses.sparse import log1mexp, rest
from kdtune.teachers.cache.header import Header
from kdtune.teachers.cache.kinds import columns

_INT8_MAX = 127


def head_weight(head: nn.Module) -> Tensor:
    """Return the weight [V, D] whose product with what `encode` keeps is the logits; on the meta device too.

    With an adapter on the head, D is wider than the model (`kdtune.losses.Head.projection`).
    """
    weight = head.get_parameter("weight")
    nothing = weight.new_zeros(1, 1, int(getattr(head, "in_features")))  # noqa: B009 - of any kind of linear
    return project("teacher", nothing, head).weight_VD


def encode(
    header: Header, hidden_ND: Tensor, head: nn.Module, labels_N: Tensor, uniforms_NK: npt.NDArray[np.float64] | None
) -> dict[str, Tensor]:
    """Return the columns of a header's kind, on the CPU.

    Log-probabilities are computed in fp32 or wider, as the loss computes them, a chunk of positions at a time.

    Args:
        header: of the cache.
        hidden_ND: the teacher's last hidden states, after its final norm.
        head: its output head, on the same device, not in shards.
        labels_N: int64 ids of the next tokens; for path.
        uniforms_NK: numbers from [0, 1), one for each draw; for sampled.
    """
    head_of = project("teacher", hidden_ND[None], head)
    if header.kind == "hidden":
        return _numbers(header, head_of.hidden_TD)
    parts = []
    for chunk in chunk_slices(head_of, len(hidden_ND), None):
        logp_CV = live_log_probs(head_of, chunk, header.temperature)
        if header.kind == "topk":
            part = _top(header, logp_CV)
        elif header.kind == "sampled":
            assert uniforms_NK is not None
            part = _drawn(header, logp_CV, torch.from_numpy(uniforms_NK[chunk]))
        else:
            part = {"logp": logp_CV.gather(1, labels_N[chunk, None]).squeeze(1)}
        parts.append(part)
    expected = columns(header)
    if not parts:
        return {name: torch.zeros(0, *column.shape, dtype=column.dtype) for name, column in expected.items()}
    return {name: torch.cat([part[name] for part in parts]).to("cpu", one.dtype) for name, one in expected.items()}


def live_log_probs(head: Projection, rows: slice, temperature: float = 1.0) -> Tensor:
    """Return log-probabilities [C, V] of some of a projection's positions, in fp32 or wider."""
    index_C = torch.arange(rows.start, rows.stop, device=head.hidden_TD.device)
    return project_logits(head, index_C).div_(temperature).log_softmax(-1)


def decode(header: Header, values: Mapping[str, Tensor], weight_VD: Tensor | None) -> Tensor:
    """Return the distributions that the columns of C positions stand for, as natural log-probabilities [C, V].

    Where only some ids are known, the others share the rest of the probability evenly: all that a cache knows of them.

    Args:
        header: of the cache.
        values: its columns, on one device; for path also ``labels`` [C], the ids that the log-probabilities are of.
        weight_VD: the head, for hidden.
    """
    if header.kind == "hidden":
        assert weight_VD is not None
        hidden_CD = values["hidden"]
        if header.dtype == "int8":
            hidden_CD = hidden_CD * values["scale"][:, None]
        projection = Projection(hidden_CD.to(weight_VD.dtype), weight_VD, softcap=header.softcap)
        return live_log_probs(projection, slice(0, len(hidden_CD)))
    is_path = header.kind == "path"
    ids_CK = (values["labels"][:, None] if is_path else values["ids"]).long()
    logp_CK = (values["logp"][:, None] if is_path else values["logp"]).float()
    dense_CV = logp_CK.new_full((len(ids_CK), header.vocab_size), -torch.inf).scatter_(1, ids_CK, logp_CK)
    tail_C = values["log_tail"] if "log_tail" in values else log1mexp(dense_CV.logsumexp(-1))
    is_unknown = dense_CV == -torch.inf
    share_C = tail_C - is_unknown.sum(-1).clamp(min=1).log()
    return torch.where(is_unknown, share_C[:, None], dense_CV).log_softmax(-1)


def uniforms(header: Header, example_id: int, num_rows: int) -> npt.NDArray[np.float64]:
    """Return the random numbers [N, K] of an example's draws: they depend on the header's seed and the example alone."""
    return np.random.default_rng([header.seed, example_id]).random((num_rows, header.num_ids or 0))


def _numbers(header: Header, hidden_ND: Tensor) -> dict[str, Tensor]:
    if header.dtype != "int8":
        return {"hidden": hidden_ND.to("cpu", columns(header)["hidden"].dtype)}
    hidden_ND = hidden_ND.float()
    scale_N = hidden_ND.abs().amax(-1) / _INT8_MAX
    # A state of zeros has the scale 0.
    whole = (hidden_ND / scale_N.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
    return {"hidden": whole.to(torch.int8).cpu(), "scale": scale_N.cpu()}


def _top(header: Header, logp_CV: Tensor) -> dict[str, Tensor]:
    logp_CK, ids_CK = logp_CV.topk(header.num_ids or 0, dim=1, sorted=True)
    return {"ids": ids_CK, "logp": logp_CK, "log_tail": rest(logp_CV, ids_CK)}


def _drawn(header: Header, logp_CV: Tensor, uniforms_CK: Tensor) -> dict[str, Tensor]:
    """Draw by the inverse of the cumulative distribution, in float64: a cumulative sum in fp32 would lose unlikely ids."""
    logp_CV = logp_CV.cpu() if logp_CV.is_mps else logp_CV  # which has no float64
    scaled_CV = (header.exponent * logp_CV).double()
    cumulative_CV = scaled_CV.softmax(-1).cumsum(-1)
    at_CK = uniforms_CK.to(cumulative_CV.device) * cumulative_CV[:, -1:]
    # To the right: an id without probability is never drawn.
    ids_CK = torch.searchsorted(cumulative_CV, at_CK, right=True).clamp(max=header.vocab_size - 1)
    return {"ids": ids_CK, "logp": logp_CV.gather(1, ids_CK), "log_normalizer": scaled_CV.logsumexp(-1)}
