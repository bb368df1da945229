"""A vocabulary-sharded head: all-to-all between logits of all tokens for some ids and of some tokens for all ids.

Every process projects all tokens of a chunk to its own ids. Then each receives the full rows of its share of the tokens, so
that softmax and divergence, which may be any function of a row, are the same as on one process; the gradients go back the
same way.

Shapes: C tokens of a chunk, R of them this process's share, U ids of this process, V all ids that count.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class VocabShards:
    """Distribution of the vocabulary's ids over the processes of a group."""

    group: dist.ProcessGroup
    vocab_size: int
    """Rows of the full head, split into one shard per process."""

    def tokens(self, num_tokens: int) -> list[slice]:
        """Return each process's share of the tokens of a chunk."""
        size = self.group.size()
        return [slice(rank * num_tokens // size, (rank + 1) * num_tokens // size) for rank in range(size)]

    def own_tokens(self, num_tokens: int) -> slice:
        """Return this process's share of them."""
        return self.tokens(num_tokens)[self.group.rank()]

    def num_ids(self, limit: int) -> list[int]:
        """Return the number of the first `limit` ids on each process."""
        size = self.group.size()
        piece = -(-self.vocab_size // size)
        return [min(max(limit - rank * piece, 0), piece) for rank in range(size)]

    def own_num_ids(self, limit: int) -> int:
        """Return the number of the first `limit` ids on this process."""
        return self.num_ids(limit)[self.group.rank()]

    def to_rows(self, logits_CU: Tensor, limit: int) -> Tensor:
        """Return [R, V]: all of the first `limit` ids for this process's tokens."""
        num_tokens, num_own = logits_CU.shape
        own = self.own_tokens(num_tokens)
        sent = [(tokens.stop - tokens.start) * num_own for tokens in self.tokens(num_tokens)]
        received = [(own.stop - own.start) * ids for ids in self.num_ids(limit)]
        parts = self._exchange(logits_CU.flatten(), sent, received)
        pieces = zip(parts, self.num_ids(limit), strict=True)
        return torch.cat([part.view(own.stop - own.start, ids) for part, ids in pieces], dim=1)

    def to_ids(self, rows_RV: Tensor, num_tokens: int) -> Tensor:
        """Return [C, U]: the inverse of `to_rows`, for a tensor of its result's shape."""
        limit = rows_RV.shape[1]
        ids = self.num_ids(limit)
        sent = [len(rows_RV) * one for one in ids]
        received = [(tokens.stop - tokens.start) * self.own_num_ids(limit) for tokens in self.tokens(num_tokens)]
        flat = torch.cat([part.flatten() for part in rows_RV.split(ids, dim=1)])
        return torch.cat(self._exchange(flat, sent, received)).view(num_tokens, self.own_num_ids(limit))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def _exchange(self, flat: Tensor, sent: list[int], received: list[int]) -> tuple[Tensor, ...]:
        output = flat.new_empty(sum(received))
        dist.all_to_all_single(output, flat.contiguous(), received, sent, group=self.group)
        return output.split(received)
