"""Key-value cache of the tokens a model has already processed, for generation.

Shape suffixes: B batch, S new tokens, K key/value heads, C capacity of the cache, P cached tokens, E head dim.
"""

import torch
from torch import Tensor

from kdtune.models.architecture import TransformerConfig

# Tokens that a cache begins with room for; it then doubles.
_FIRST_ROOM = 1024
# Tokens that a layer with a window has room for beside those in it: so often they are moved to the front.
_SLACK = 256


class LayerCache:
    """Keys and values of one layer, allocated on first use: a process may hold only some of the heads.

    Of a layer with a window, those of the last tokens alone, which a later one attends to.
    """

    def __init__(self, capacity: int, window: int | None = None) -> None:
        self._window = capacity if window is None else window
        self._capacity = min(capacity, self._window + _SLACK)
        self._first = 0  # the token that the first held keys are of
        self._keys_BKCE = self._values_BKCE = torch.empty(0)

    def store(self, start: int, keys_BKSE: Tensor, values_BKSE: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values, of tokens from ``start`` on; return those that these attend to, up to their end.

        That is all of them, views [B, K, start + S, E], or of a layer with a window at least those in the new tokens' windows.
        """
        if start == 0:
            self._first = 0
        held, num_new = start - self._first, keys_BKSE.shape[2]
        if held + num_new > self._capacity:
            kept = min(held, self._window - 1)
            if kept:
                before = [tensor[:, :, held - kept : held] for tensor in (self._keys_BKCE, self._values_BKCE)]
                if kept + num_new > self._capacity:
                    keys_BKSE, values_BKSE = (
                        torch.cat(pair, 2) for pair in zip(before, (keys_BKSE, values_BKSE), strict=True)
                    )
                else:
                    self._keys_BKCE[:, :, :kept], self._values_BKCE[:, :, :kept] = (one.clone() for one in before)
            self._first, held = start - kept, kept
            if kept + num_new > self._capacity:
                return self._store_last(keys_BKSE, values_BKSE)
        end = held + num_new
        room = self._keys_BKCE.shape[2] if self._keys_BKCE.numel() else 0
        if end > room:
            more = min(self._capacity, max(end, _FIRST_ROOM, 2 * room))
            self._keys_BKCE = _grown(self._keys_BKCE, keys_BKSE, held, more)
            self._values_BKCE = _grown(self._values_BKCE, values_BKSE, held, more)
        self._keys_BKCE[:, :, held:end] = keys_BKSE
        self._values_BKCE[:, :, held:end] = values_BKSE
        return self._keys_BKCE[:, :, :end], self._values_BKCE[:, :, :end]

    def _store_last(self, keys_BKSE: Tensor, values_BKSE: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the last of more tokens than there is room for, of which the first is ``_first``; return all of them."""
        kept = min(self._window - 1, keys_BKSE.shape[2])
        last = keys_BKSE.shape[2] - kept
        self._first += last
        self._keys_BKCE = _grown(keys_BKSE[:, :, last:], keys_BKSE, kept, self._capacity)
        self._values_BKCE = _grown(values_BKSE[:, :, last:], values_BKSE, kept, self._capacity)
        return keys_BKSE, values_BKSE

    def keeps(self, length: int) -> bool:
        """Return whether it still holds what a token after the first ``length`` attends to."""
        return length == 0 or self._first == 0 or length - self._first >= self._window - 1

    def keep_sequences(self, rows: list[int], length: int) -> None:
        """Move the first ``length`` tokens of these sequences, given in order, to the front; discard the others."""
        held = max(length - self._first, 0)
        for tensor_BKCE in (self._keys_BKCE, self._values_BKCE):
            for new, old in enumerate(rows):
                if new != old:  # always new < old: nothing is overwritten before it is moved
                    tensor_BKCE[new, :, :held] = tensor_BKCE[old, :, :held]
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

    Its memory grows on demand, doubling when full, because most texts end long before ``max_seq_len``. Layers with a window hold
    the tokens in it, and a few more.
    Pass it to ``Transformer.forward`` with only the new tokens; forward appends them and advances ``length``.
    ``config`` is the model's, ``batch_size`` the number of sequences.
    For inference only: the writes are in place, so gradients cannot flow through them.
    """

    def __init__(self, config: TransformerConfig, batch_size: int, max_seq_len: int) -> None:
        self.batch_size = batch_size
        self.max_seq_len = max_seq_len
        self.length = 0
        self.layers = [LayerCache(max_seq_len, config.window(index)) for index in range(config.num_layers)]

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
        """Discard all tokens from position ``length`` on. ValueError if a layer with a window no longer holds what precedes it."""
        if not 0 <= length <= self.length:
            raise ValueError(f"KVCache.truncate: length={length}; allowed: 0 to {self.length}, the tokens held")
        if not all(layer.keeps(length) for layer in self.layers):
            raise ValueError(
                f"KVCache.truncate: length={length} of {self.length}: a layer with a window no longer holds the tokens before it; "
                "truncate to 0, and pass the text again"
            )
        self.length = length

    def keep_sequences(self, rows: list[int]) -> None:
        """Discard all sequences of the batch but these, given by ascending index; the rest move up, in place."""
        if not rows or rows != sorted(set(rows)) or not 0 <= rows[0] <= rows[-1] < self.batch_size:
            raise ValueError(f"KVCache.keep_sequences: rows={rows}; ascending indices below {self.batch_size} expected")
        for layer in self.layers:
            layer.keep_sequences(rows, self.length)
        self.batch_size = len(rows)
