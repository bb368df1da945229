"""What a capture will take, before it runs: bytes from the data alone, seconds from a part of it."""

import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdtune.data import Example
from kdtune.models import Transformer, dtype_from_name
from kdtune.paths import user_path
from kdtune.teachers.cache.capture import Source, draws_of, kept_positions, split_rows, teacher_states
from kdtune.teachers.cache.encode import encode
from kdtune.teachers.cache.format import write_shard
from kdtune.teachers.cache.header import Header
from kdtune.teachers.cache.shard import Row, shard_tensors

# The part that is timed takes the teacher about so long.
SECONDS = 8.0
# Of that many examples at least, if there are so many: a part whose lengths are those of the whole.
_LEAST_EXAMPLES = 16

# As safetensors writes them: tensors by dtype, in this order, then by name, which decides the digits of their offsets.
_NAMES = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_Tensors: TypeAlias = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
_States: TypeAlias = tuple[Sequence[Example], Tensor, Tensor, list[npt.NDArray[np.int64]]]


@dataclass(frozen=True)
class Amount:
    """How much a capture has to do: positions that are kept of each example [E], and tokens that the teacher reads."""

    rows_E: npt.NDArray[np.int64]
    num_tokens: int

    @property
    def num_rows(self) -> int:
        """Number of positions that are kept."""
        return int(self.rows_E.sum())


def amount_of(header: Header, source: Source) -> Amount:
    """Count the examples of the header's range in a data set; no weights are read."""
    counts = [
        (len(kept_positions(one, header.positions)), len(one.tokens))
        for one in map(source.dataset.__getitem__, header.example_ids)
    ]
    rows_E, tokens_E = (np.array(one) for one in zip(*counts, strict=True))
    return Amount(rows_E, int(tokens_E.sum()))


def cache_bytes(header: Header, amount: Amount) -> int:
    """Return the bytes of all shards and the head, as `finish` counts them; `amount`: of the range.

    The head is in the dtype that the header's teacher computes in.
    """
    shards = [header.examples_of(number) for number in range(header.num_shards)]
    rows = [int(amount.rows_E[ids.start - header.first_example :][: len(ids)].sum()) for ids in shards]
    files: list[_Tensors] = [shard_tensors(header, len(ids), count) for ids, count in zip(shards, rows, strict=True)]
    if header.kind == "hidden":
        files.append({"weight": (dtype_from_name(header.teacher["dtype"]), (header.vocab_size, header.dim or 0))})
    return sum(map(_file_bytes, files))


@torch.no_grad()
def capture_seconds(
    model: Transformer, source: Source, headers: Sequence[Header], amount: Amount, folder: str | Path
) -> list[float]:
    """Return for each header how long one process would take for the whole range: a part of it is captured and timed.

    The part is spread evenly over the range. What it writes goes to a temporary folder beside `folder`, and is removed.

    Args:
        model: the teacher, in eval mode, not in shards.
        source: the examples.
        headers: of the same range and positions.
        amount: of the range.
        folder: that of the capture, of which only the disk counts.
    """
    first = headers[0]
    sample = _sample(first, source, _tokens_in_time(model, source, first), amount)
    batches, states, started = source.batches(sample), [], time.perf_counter()
    for examples in batches:
        states.append((examples, *teacher_states(model, first.positions, source, examples)))
    of_token = (time.perf_counter() - started) / sum(len(one.tokens) for batch in batches for one in batch)
    parent = next(one for one in user_path(folder).absolute().parents if one.is_dir())
    of_row: dict[str, float] = {}
    # The dtype of what a head has computed makes no difference beside that.
    names = [header.dtype if header.kind == "hidden" else header.kind for header in headers]
    for name, header in zip(names, headers, strict=True):
        if name not in of_row:
            of_row[name] = _row_seconds(model, header, states, parent)
    return [of_token * amount.num_tokens + of_row[name] * amount.num_rows for name in names]


def _row_seconds(model: Transformer, header: Header, states: Sequence[_States], parent: Path) -> float:
    """Return how long it takes to make a row from hidden states, and to write it into a folder in `parent`."""
    started = time.perf_counter()
    rows: list[Row] = []
    for examples, hidden_ND, labels_N, kept in states:
        values = encode(header, hidden_ND, model.output, labels_N, draws_of(header, examples, kept))
        rows += split_rows(examples, kept, values)
    small = replace(header, first_example=0, num_examples=len(rows), examples_per_shard=len(rows))
    with tempfile.TemporaryDirectory(dir=parent, prefix=".kdtune-dry-run-") as temporary:
        write_shard(temporary, small, 0, [replace(row, example_id=index) for index, row in enumerate(rows)])
        seconds = time.perf_counter() - started
    return seconds / max(1, sum(len(row.positions) for row in rows))


def _tokens_in_time(model: Transformer, source: Source, header: Header) -> float:
    """Return how many tokens the teacher reads in `SECONDS`, after a batch that is not timed."""
    batch = source.batches(_spread(header, 4))[0]
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        teacher_states(model, header.positions, source, batch)
        seconds = time.perf_counter() - started
    return SECONDS * sum(len(one.tokens) for one in batch) / seconds


def _sample(header: Header, source: Source, num_tokens: float, amount: Amount) -> list[int]:
    """Return the examples to time: about so many tokens, but a few examples at least, and a shard at most."""
    wanted = math.ceil(num_tokens * header.num_examples / max(1, amount.num_tokens))
    return _spread(header, min(max(wanted, _LEAST_EXAMPLES), header.examples_per_shard))


def _spread(header: Header, count: int) -> list[int]:
    """Return the indices of some examples of the range, evenly spread."""
    ids = header.example_ids
    return [ids[index] for index in sorted({*np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(int).tolist()})]


def _file_bytes(tensors: _Tensors) -> int:
    """Return the size of a safetensors file: 8 bytes, a header in JSON that is filled up to a multiple of 8, and the numbers."""
    described, end, order = {}, 0, list(_NAMES)
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda one: (order.index(one[1][0]), one[0])):
        start, end = end, end + dtype.itemsize * math.prod(shape)
        described[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(described, separators=(",", ":"))
    return 8 + -(-len(text) // 8) * 8 + end
