"""How well a cache keeps a teacher: forward KL from the live distributions to those that it stands for."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdtune.data import Example
from kdtune.losses import ForwardKL
from kdtune.losses.fused_linear import chunk_slices
from kdtune.losses.heads import project
from kdtune.models import Transformer
from kdtune.teachers.cache.capture import Source, draws_of, number, teacher_states
from kdtune.teachers.cache.encode import decode, encode, live_log_probs
from kdtune.teachers.cache.format import Cache
from kdtune.teachers.cache.header import Header
from kdtune.teachers.cache.kinds import bytes_per_token

QUALITY = "quality.json"


@torch.no_grad()
def measure_quality(
    model: Transformer,
    source: Source,
    headers: Sequence[Header],
    batches: Sequence[Sequence[Example]],
    written: Cache | None = None,
) -> list[dict[str, Any]]:
    """Return for each header its bytes a token and `forward_kl`, KL(live || stored) in nats, mean over the tokens.

    Both distributions are computed in fp32 or wider, as `kdtune.evaluation.evaluate_kd` computes them, at the header's
    temperature. Of a kind that knows only some ids, the others share the rest evenly (see `decode`), so it is finite.

    Args:
        model: the teacher, in eval mode, not in shards.
        source: the data set of the examples.
        headers: of caches with the same positions.
        batches: examples, numbered.
        written: a cache with these examples, of the one header: its numbers are read from the disk. None: the teacher's states are
            encoded anew.
    """
    sums, num_tokens = [0.0] * len(headers), 0
    for examples in batches:
        hidden_ND, labels_N, kept = teacher_states(model, headers[0].positions, source, examples)
        head = project("teacher", hidden_ND[None], model.output)
        for index, header in enumerate(headers):
            values = (
                encode(header, hidden_ND, model.output, labels_N, draws_of(header, examples, kept))
                if written is None
                else _read(written, examples)
            )
            on_device = {"labels": labels_N, **{name: one.to(hidden_ND.device) for name, one in values.items()}}
            for chunk in chunk_slices(head, len(hidden_ND), None):
                stored = decode(header, {name: one[chunk] for name, one in on_device.items()}, head.weight_VD)
                live = live_log_probs(head, chunk, header.temperature)
                sums[index] += float(ForwardKL()(stored, live).double().sum())
        num_tokens += len(hidden_ND)
    return [
        {"kind": header.kind, "dtype": header.dtype, "num_ids": header.num_ids, "bytes_per_token": bytes_per_token(header),
         "forward_kl": total / max(1, num_tokens), "num_tokens": num_tokens}
        for header, total in zip(headers, sums, strict=True)
    ]  # fmt: skip


def _read(cache: Cache, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return the columns of some examples, end to end, as they are on the disk."""
    rows = [cache.read(number(one), one.tokens) for one in examples]
    return {name: torch.cat([row.columns[name] for row in rows]) for name in cache.columns}


def described(quality: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a table for what `measure_quality` has found of a header."""
    kept = "" if quality["num_ids"] is None else f" {quality['num_ids']}"
    return {
        "kind": f"{quality['kind']}{kept}, {quality['dtype']}",
        "bytes a token": quality["bytes_per_token"],
        "KL (nats)": f"{quality['forward_kl']:.2g}",
    }
