"""Write teacher caches by the format alone, from dense log-probabilities that torch computes."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdtune.constants import IGNORE_INDEX
from kdtune.data import MapDataset
from kdtune.models import Transformer
from kdtune.teachers.cache import Header, Row, begin, finish, write_head, write_shard
from kdtune.tokenizers import Tokenizer, fingerprint


def columns_of(header: Header, hidden_ND: Tensor, logp_NV: Tensor, next_N: Tensor) -> dict[str, Tensor]:
    """What a cache keeps of positions with these states, distributions and next tokens."""
    if header.kind == "hidden":
        if header.dtype == "int8":
            scale = hidden_ND.abs().amax(-1).float() / 127
            return {"hidden": (hidden_ND / scale[:, None]).round().to(torch.int8), "scale": scale}
        return {"hidden": hidden_ND.to({"fp32": torch.float32, "bf16": torch.bfloat16}[header.dtype])}
    if header.kind == "path":
        return {"logp": logp_NV.gather(1, next_N[:, None]).squeeze(1).float()}
    numbers = {"fp32": torch.float32, "fp16": torch.float16}[header.dtype]
    if header.kind == "topk":
        tempered = (logp_NV / header.temperature).log_softmax(-1)
        logp, ids = tempered.topk(header.num_ids, dim=-1)
        tail = tempered.scatter(1, ids, -torch.inf).logsumexp(-1)
        return {"ids": ids.int(), "logp": logp.to(numbers), "log_tail": tail.float()}
    drawn = header.exponent * logp_NV
    generator = torch.Generator().manual_seed(header.seed)
    ids = drawn.softmax(-1).multinomial(header.num_ids, replacement=True, generator=generator)
    found = {"ids": ids.int(), "logp": logp_NV.gather(1, ids).to(numbers)}
    return found if header.exponent == 1 else {**found, "log_normalizer": drawn.logsumexp(-1).float()}


def positions_of(header: Header, labels: Any) -> Tensor:
    kept = np.arange(len(labels) - 1) if header.positions == "all" else np.flatnonzero(labels != IGNORE_INDEX)
    return torch.from_numpy(kept.astype(np.int32))


@torch.no_grad()
def computed_rows(header: Header, teacher: Transformer, dataset: MapDataset) -> Iterable[Row]:
    """One example at a time."""
    for index in header.example_ids:
        example = dataset[index]
        positions, tokens = positions_of(header, example.labels), torch.from_numpy(example.tokens)
        hidden = teacher(tokens[None], return_hidden=True)[0][positions.long()]
        logp = teacher.output(hidden).double().log_softmax(-1)
        yield Row(index, example.tokens, positions, columns_of(header, hidden, logp, tokens[positions.long() + 1]))


def write_rows(folder: Path, header: Header, rows: Iterable[Row], head: Tensor | None = None) -> None:
    rows = list(rows)
    begin(folder, header)
    first = header.first_example
    for shard in range(header.num_shards):
        own = header.examples_of(shard)
        write_shard(folder, header, shard, rows[own.start - first : own.stop - first])
    if header.kind == "hidden":
        write_head(folder, head)
    finish(folder)


def write_cache(
    folder: Path,
    teacher: Transformer,
    dataset: MapDataset,
    tokenizer: Tokenizer,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Capture a dataset, of kind hidden in fp32 unless the settings of the header say otherwise."""
    kind = (settings or {}).get("kind", "hidden")
    of_kind = {"dim": teacher.config.embed_dim} if kind == "hidden" else {"num_ids": 8} if kind != "path" else {}
    header = Header(**{
        "kind": "hidden", "dtype": "fp32", "vocab_size": teacher.config.vocab_size, "num_examples": dataset.size,
        "dataset_size": dataset.size, "examples_per_shard": 7, "max_seq_len": tokenizer.max_seq_len,
        "tokenizer": fingerprint(tokenizer), "dataset": dataset.fingerprint(), **of_kind, **(settings or {}),
    })  # fmt: skip
    write_rows(folder, header, computed_rows(header, teacher, dataset), teacher.output.weight)
    return folder
