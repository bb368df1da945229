"""The micro-batches of an optimizer step: whether they are padded, and how examples are cut into them by numbers of tokens."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from kdtune.config.check import is_ours


def is_padding_free(cfg: Any) -> bool:
    """Return whether a training recipe's batches are without padding; `cfg` is its config."""
    if cfg.padding_free is not None:
        return bool(cfg.padding_free)
    teacher = getattr(cfg, "teacher", None)
    return teacher is None or is_ours(teacher)


def cut_by_tokens(
    lengths: Sequence[int], max_tokens: int, *, num_ranks: int = 1, is_padded: bool = False
) -> list[list[int]]:
    """Return the indices of the examples of each micro-batch, one for each rank after the other, longest examples first.

    There are as few rounds of `num_ranks` micro-batches as the limit allows; within this number, the largest micro-batch is
    as small as it can be with examples of similar length together. Only ranks of the last round may have none. The result
    depends on nothing else, so all ranks cut alike without asking each other.

    Args:
        lengths: number of tokens of each example.
        max_tokens: largest micro-batch, in tokens; a longer example is one by itself.
        num_ranks: number of ranks that share the micro-batches.
        is_padded: count padding too.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])

    def cut(limit: int) -> list[list[int]]:
        parts: list[list[int]] = []
        size = 0
        for index in order:
            if parts:
                size = (len(parts[-1]) + 1) * lengths[parts[-1][0]] if is_padded else size + lengths[index]
            if parts and size <= limit:
                parts[-1].append(index)
            else:
                parts.append([index])
                size = lengths[index]
        return parts

    num_parts = -(-len(cut(max_tokens)) // num_ranks) * num_ranks
    limit = bisect_left(range(max_tokens), True, key=lambda tokens: len(cut(tokens)) <= num_parts)
    parts = cut(limit)
    return parts + [[] for _ in range(-len(parts) % num_ranks)]
