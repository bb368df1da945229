"""What a teacher cache keeps of each token: four kinds, each a few columns of numbers.

Shapes: N positions of an example, D width of the teacher's hidden states, K ids kept of a position.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

if TYPE_CHECKING:
    from kdtune.teachers.cache.header import Header

Kind: TypeAlias = Literal["hidden", "topk", "sampled", "path"]

KINDS: dict[Kind, tuple[str, ...]] = {
    "hidden": ("bf16", "int8", "fp32"),
    "topk": ("fp16", "fp32"),
    "sampled": ("fp32", "fp16"),
    "path": ("fp32",),
}
"""Dtypes of each kind's numbers, the default first."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8}


@dataclass(frozen=True)
class Column:
    """The numbers that a kind keeps of each position under one name."""

    dtype: torch.dtype
    shape: tuple[int, ...] = ()
    """Shape of one position's."""

    @property
    def bytes(self) -> int:
        """Size of one position's."""
        return self.dtype.itemsize * math.prod(self.shape)


def columns(header: "Header") -> dict[str, Column]:
    """Return the columns of a header's kind, by name.

    - hidden: ``hidden`` [N, D], the last hidden states after the final norm; in int8, ``scale`` [N] too: a state is hidden * scale.
    - topk: ``ids`` [N, K], the most likely first; ``logp`` [N, K], their log-probabilities; ``log_tail`` [N], that of all other ids.
    - sampled: ``ids`` and ``logp`` [N, K] of draws with replacement in proportion to p^exponent; ``log_normalizer`` [N], the
      logarithm of the sum of p^exponent over all ids, where exponent is not 1. An id's importance weight is
      exp(log_normalizer - exponent * logp) / K.
    - path: ``logp`` [N], the log-probability of the text's own next token.
    """
    numbers, fp32 = Column(DTYPES[header.dtype]), Column(torch.float32)
    if header.kind == "hidden":
        hidden = Column(numbers.dtype, (header.dim or 0,))
        return {"hidden": hidden, "scale": fp32} if header.dtype == "int8" else {"hidden": hidden}
    if header.kind == "path":
        return {"logp": numbers}
    of_ids = {
        "ids": Column(torch.int32, (header.num_ids or 0,)),
        "logp": Column(numbers.dtype, (header.num_ids or 0,)),
    }
    if header.kind == "topk":
        return {**of_ids, "log_tail": fp32}
    return of_ids if header.exponent == 1 else {**of_ids, "log_normalizer": fp32}


def bytes_per_token(header: "Header") -> int:
    """Return the bytes of one stored position: its columns, and 4 of its place in the example."""
    return 4 + sum(column.bytes for column in columns(header).values())


def size_text(num_bytes: float) -> str:
    """Return a number of bytes with a unit, such as "1.25 GB"; the units are powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
