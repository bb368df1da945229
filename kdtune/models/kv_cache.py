"""Key-value cache of the tokens a model has already processed, for generation.

Shape suffixes: B batch, S new tokens, K key/value heads, C capacity of the cache, P cached tokens, E head dim.
"""

import torch
from torch import Tensor

from kdtune.models.architecture import TransformerConfig

# Tokens that a cache begins with room for; it then doubles.
_FIRST_ROOM = 1024


class LayerCache:
    """Keys and values of one layer, allocated on first use: a process may hold only some of the heads."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._keys_BKCE = self._values_BKCE = torch.empty(0)

    def store(self, start: int, keys_BKSE: Tensor, values_BKSE: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values at ``start``; return all up to their end, views [B, K, start + S, E]."""
        end = start + keys_BKSE.shape[2]
        held = self._keys_BKCE.shape[2] if self._keys_BKCE.numel() else 0
        if end > held:
            room = min(self._capacity, max(end, _FIRST_ROOM, 2 * held))
            self._keys_BKCE = _grown(self._keys_BKCE, keys_BKSE, start, room)
            self._values_BKCE = _grown(self._values_BKCE, values_BKSE, start, room)
        self._keys_BKCE[:, :, start:end] = keys_BKSE
        self._values_BKCE[:, :, start:end] = values_BKSE
        return self._keys_BKCE[:, :, :end], self._values_BKCE[:, :, :end]

    def keep_sequences(self, rows: list[int], length: int) -> None:
        """Move the first ``length`` tokens of these sequences, given in order, to the front; discard the others."""
        for tensor_BKCE in (self._keys_BKCE, self._values_BKCE):
            for new, old in enumerate(rows):
                if new != old:  # always new < old: nothing is overwritten before it is moved
                    tensor_BKCE[new, :, :length] = tensor_BKCE[old, :, :length]
        self._keys_BKCE = self._keys_BKCE[: len(rows)]
        self._values_BKCE = self._values_BKCE[: len(rows)]


def _grown(held_BKCE: Tensor, new_BKSE: Tensor, length: int, room: int) -> Tensor:
    """Return a tensor with this capacity that holds the first ``length`` cached tokens."""
    batch_size, heads, _, head_dim = new_BKSE.shape
    grown = new_BKSE.new_zeros(batch_size, heads, room, head_dim)
    if length:
        grown[:, :, :length] = held_BKCE[:, :, :length]
    return grown


class KVCache:
    """Keys and values of every layer, for up to ``max_seq_len`` tokens per sequence, in the first keys' dtype.

    Its memory grows on demand, doubling when full, because most texts end long before ``max_seq_len``.
    Pass it to ``Transformer.forward`` with only the new tokens; forward appends them and advances ``length``.
    ``config`` is the model's, ``batch_size`` the number of sequences.
    For inference only: the writes are in place, so gradients cannot flow through them.
    """

    def __init__(self, config: TransformerConfig, batch_size: int, max_seq_len: int) -> None:
        self.batch_size = batch_size
        self.max_seq_len = max_seq_len
        self.length = 0
        self.layers = [LayerCache(max_seq_len) for _ in range(config.num_layers)]

    def check_room(self, tokens_BS: Tensor) -> None:
        """Raise ValueError if the new tokens do not fit."""
        batch_size, num_new = tokens_BS.shape
        if batch_size != self.batch_size:
            raise ValueError(f"KVCache: a batch of {batch_size} sequences; this cache was made for {self.batch_size}")
        if self.length + num_new > self.max_seq_len:
            raise ValueError(
                f"KVCache: {self.length} tokens held and {num_new} new ones; it has room for {self.max_seq_len}: "
                "make it with a larger max_seq_len"
            )

    def truncate(self, length: int = 0) -> None:
        """Discard all tokens from position ``length`` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"KVCache.truncate: length={length}; allowed: 0 to {self.length}, the tokens held")
        self.length = length

    def keep_sequences(self, rows: list[int]) -> None:
        """Discard all sequences of the batch but these, given by ascending index; the rest move up, in place."""
        if not rows or rows != sorted(set(rows)) or not 0 <= rows[0] <= rows[-1] < self.batch_size:
            raise ValueError(f"KVCache.keep_sequences: rows={rows}; ascending indices below {self.batch_size} expected")
        for layer in self.layers:
            layer.keep_sequences(rows, self.length)
        self.batch_size = len(rows)
