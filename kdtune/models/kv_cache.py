"""Key-value caches of the tokens a model has already processed, for generation.

Shape suffixes: B batch, N slots in use, S new tokens, T tokens attended to, K key/value heads, C capacity of the cache, E head dim.
"""

import weakref
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kdtune.models.architecture import TransformerConfig

# Tokens that a cache begins with room for; it then doubles.
_FIRST_ROOM = 1024
# Tokens that a layer with a window has room for beside those in it: so often they are moved to the front.
SLACK = 256
# Of so many places slots have whole blocks, and all of them are read.
_BLOCK = 64
# Places that a sum is taken over at a time, see `SlotCache.num_places`.
PART = 512
# Places that slots begin with; they then double.
_FIRST_PLACES = 256


class LayerCache:
    """Keys and values of one layer, allocated on first use: a process may hold only some of the heads.

    Of a layer with a window, those of the last tokens alone, which a later one attends to.
    """

    def __init__(self, capacity: int, window: int | None = None) -> None:
        self._window = capacity if window is None else window
        self._capacity = min(capacity, self._window + SLACK)
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

    def attended(
        self, start: int, keys_BKSE: Tensor, values_BKSE: Tensor, mask: Tensor | None, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None, int | None]:
        """Return ``store``'s keys and values, and the mask [B, 1, S, T] and the window that hold for them."""
        keys_BKTE, values_BKTE = self.store(start, keys_BKSE, values_BKSE)
        if mask is not None and mask.shape[-1] > keys_BKTE.shape[2]:  # a layer with a window holds the last ones
            mask = mask[..., -keys_BKTE.shape[2] :]
        return keys_BKTE, values_BKTE, mask, window

    def held(self, length: int) -> tuple[int, Tensor, Tensor]:
        """Return which token the first held keys are of, and the keys and values [B, K, held, E] of it and those before ``length``."""
        first = self._first
        return first, self._keys_BKCE[:, :, : length - first], self._values_BKCE[:, :, : length - first]

    def keeps(self, length: int) -> bool:
        """Return whether it still holds what a token after the first ``length`` attends to."""
        return length == 0 or self._first == 0 or length - self._first >= self._window - 1


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

    def advance(self, num_new: int) -> None:
        """Count the new tokens, whose keys all layers have stored."""
        self.length += num_new


class SlotLayer:
    """Keys and values of one layer in slots, each with a text of its own length: token number p of a text is in place p.

    A layer with a window begins again at place 0 when it has gone through the places it has, which are at least the window and the new
    tokens of a forward.
    """

    def __init__(self, slots: "SlotCache", window: int | None, *, is_capped: bool) -> None:
        # The cache has its layers: were it theirs too, keys and values would stay until Python looks for garbage.
        self._slots: SlotCache = weakref.proxy(slots)
        self.window, self._is_capped = window, is_capped
        self._keys_RKCE = self._values_RKCE = torch.empty(0)

    def store(self, _: int, keys_BKSE: Tensor, values_BKSE: Tensor) -> tuple[Tensor, Tensor]:
        """Write the next tokens of each slot in use; return their keys and values [N, K, T, E].

        ``keys_BKSE`` and ``values_BKSE`` may have more rows than slots are in use.
        """
        rows_N, places_NS, num_places = self._slots.places(self.window)
        self.make_room(num_places, keys_BKSE)
        self._keys_RKCE[rows_N[:, None], :, places_NS] = keys_BKSE[: len(rows_N)].transpose(1, 2)
        self._values_RKCE[rows_N[:, None], :, places_NS] = values_BKSE[: len(rows_N)].transpose(1, 2)
        return self._keys_RKCE[: len(rows_N), :, :num_places], self._values_RKCE[: len(rows_N), :, :num_places]

    def attended(
        self, start: int, keys_BKSE: Tensor, values_BKSE: Tensor, *_: object
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return ``store``'s keys and values, their mask [N, 1, S, T], and None: the mask knows of the window."""
        keys_NKTE, values_NKTE = self.store(start, keys_BKSE, values_BKSE)
        # Of a bool one torch's kernels would make the same in every layer.
        dtype = torch.bool if self._is_capped else keys_NKTE.dtype
        return keys_NKTE, values_NKTE, self._slots.mask(self.window, keys_NKTE.shape[2], dtype), None

    def write(self, slot: int, layer: LayerCache, row: int, length: int) -> None:
        """Put the first ``length`` tokens of a row of another cache into a slot."""
        first, keys_BKPE, values_BKPE = layer.held(length)
        num_places = self._slots.num_places(self.window, length)
        skipped = max(keys_BKPE.shape[2] - num_places, 0)
        self.make_room(num_places, keys_BKPE)
        places_P = torch.arange(first + skipped, length, device=keys_BKPE.device) % num_places
        self._keys_RKCE[slot, :, places_P] = keys_BKPE[row, :, skipped:]
        self._values_RKCE[slot, :, places_P] = values_BKPE[row, :, skipped:]

    def move(self, source: int, target: int) -> None:
        """Copy the text of one slot to another."""
        for tensor_RKCE in (self._keys_RKCE, self._values_RKCE):
            if tensor_RKCE.numel():
                tensor_RKCE[target] = tensor_RKCE[source]

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The keys and values [R, K, C, E]."""
        return self._keys_RKCE, self._values_RKCE

    def make_room(self, num_places: int, like_BKSE: Tensor) -> None:
        """Hold at least so many places of keys and values as ``like_BKSE``."""
        room = self._keys_RKCE.shape[2] if self._keys_RKCE.numel() else 0
        if num_places <= room:
            return
        _, heads, _, head_dim = like_BKSE.shape
        most = self._slots.num_places(self.window, self._slots.max_seq_len)
        more = min(max(num_places, _FIRST_PLACES, 2 * room), most)
        for name in ("_keys_RKCE", "_values_RKCE"):
            grown = like_BKSE.new_zeros(self._slots.num_slots, heads, more, head_dim)
            if room:
                grown[:, :, :room] = getattr(self, name)
            setattr(self, name, grown)


class FixedLayer:
    """Keys and values of a `SlotLayer` with all of its room, for forwards that are compiled: its tensors are always the same.

    ``now`` says by window, for the forward that comes next, the rows, the next tokens' places, the number of places and the mask.
    """

    def __init__(
        self, keys_RKCE: Tensor, values_RKCE: Tensor, window: int | None, now: dict[int | None, "Placed"]
    ) -> None:
        self.keys_RKCE, self.values_RKCE, self._window, self._now = keys_RKCE, values_RKCE, window, now

    def attended(
        self, _: int, keys_RKSE: Tensor, values_RKSE: Tensor, *__: object
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """Write the next tokens of all slots; return the same as `SlotLayer.attended`."""
        rows_R1, places_RS, num_places, mask = self._now[self._window]
        self.keys_RKCE[rows_R1, :, places_RS] = keys_RKSE.transpose(1, 2)
        self.values_RKCE[rows_R1, :, places_RS] = values_RKSE.transpose(1, 2)
        return self.keys_RKCE[:, :, :num_places], self.values_RKCE[:, :, :num_places], mask, None


Placed: TypeAlias = tuple[Tensor, Tensor, int, Tensor]


class SlotCache:
    """Keys and values of every layer for texts of different lengths, one a slot, to which each forward appends one token or a few.

    Args:
        config: The model's.
        num_slots: Number of texts that it has room for.
        max_seq_len: Tokens of the longest text. Memory grows on demand, doubling when full.
        num_new: Largest number of tokens that a forward appends, and by which a text may become shorter again.
        block: Places are used by so many, a divisor of 512; None: 64.

    For one forward, call ``place`` and pass this as ``kv_cache`` of ``Transformer.forward``, with tokens [B, S] and ``input_pos``
    [B, S]: the first rows are the slots in use, the rest belong to no slot. Attention to a slot does not depend on the others, to
    the bit in fp32 on a CPU. ``length`` is the number of tokens before the next one, in the longest of the texts.
    """

    def __init__(
        self, config: TransformerConfig, num_slots: int, max_seq_len: int, *, num_new: int = 1, block: int | None = None
    ) -> None:
        self.num_slots, self.max_seq_len, self.length = num_slots, max_seq_len, 0
        self._most_new, self._block = num_new, _BLOCK if block is None else block
        self._is_capped = config.score_softcap is not None
        windows = [config.window(index) for index in range(config.num_layers)]
        self.layers = [SlotLayer(self, window, is_capped=self._is_capped) for window in windows]
        self._rows_N = torch.empty(0, dtype=torch.int64)
        self._positions_NS = torch.empty(0, 1, dtype=torch.int64)
        self._places: dict[int | None, tuple[Tensor, Tensor, int]] = {}
        self._masks: dict[tuple[int | None, int, torch.dtype], Tensor] = {}
        self._now: dict[int | None, Placed] = {}

    def fixed(self, like_BKSE: Tensor) -> list[FixedLayer]:
        """Return the layers for compiled forwards, with room for texts of ``max_seq_len``; ``like_BKSE`` is as new keys are.

        For such a forward of one token of all slots, call ``place`` for all of them, and ``fix``.
        """
        for layer in self.layers:
            layer.make_room(self.num_places(layer.window, self.max_seq_len), like_BKSE)
        return [FixedLayer(*layer.tensors, layer.window, self._now) for layer in self.layers]

    def fix(self, dtype: torch.dtype) -> None:
        """Compute what `FixedLayer` needs for the placed tokens; ``dtype`` is the keys'."""
        dtype = torch.bool if self._is_capped else dtype
        for window in {layer.window for layer in self.layers}:
            rows_R, places_RS, num_places = self.places(window)
            self._now[window] = rows_R[:, None], places_RS, num_places, self.mask(window, num_places, dtype)

    def place(self, positions: Sequence[int], device: torch.device, num_new: int = 1) -> None:
        """Say which token of its text comes next in each of the first slots, from 0, and how many in all.

        What a slot holds of that token and later ones is overwritten, or never seen.
        """
        self._positions_NS = torch.tensor(positions, device=device)[:, None] + torch.arange(num_new, device=device)
        self._rows_N = torch.arange(len(positions), device=device)
        self.length = max(positions)
        self._places, self._masks = {}, {}

    def places(self, window: int | None) -> tuple[Tensor, Tensor, int]:
        """Return the slots in use [N], the next tokens' places in each [N, S], and the number of places in use, T."""
        if window not in self._places:
            num_places = self.num_places(window, self.length + self._positions_NS.shape[1])
            self._places[window] = self._rows_N, self._positions_NS % num_places, num_places
        return self._places[window]

    def num_places(self, window: int | None, length: int) -> int:
        """Return the number of places that texts of up to ``length`` tokens take in a layer with this window."""
        # Tokens that were taken back must not seem to be old ones in the window.
        needed = length if window is None else min(window + self._most_new - 1, length)
        # Kernels take a sum over the places in parts. Where the parts begin must not depend on the longest of the texts, so that
        # masked places at the end only add zeros: torch's attention has parts of 512, of which MKL's product takes up to 256 at once
        # (384 on some processors), and 512 in halves.
        full, rest = divmod(needed, PART)
        rest = -(-rest // self._block) * self._block
        return full * PART + (PART if rest > PART // 2 else rest)

    def mask(self, window: int | None, num_places: int, dtype: torch.dtype = torch.bool) -> Tensor:
        """Return the mask [N, 1, S, T] of the next tokens, True where they see a place; of another dtype it is added to scores."""
        key = window, num_places, dtype
        if key not in self._masks:
            places_T = torch.arange(num_places, device=self._positions_NS.device)
            positions_NS1 = self._positions_NS[:, :, None]
            # How many tokens ago each place was written, were all of them written in turn.
            ago_NST = (positions_NS1 - places_T) % num_places
            is_seen_NST = ago_NST <= positions_NS1
            if window is not None:
                is_seen_NST &= ago_NST < window
            mask_NST = is_seen_NST
            if dtype != torch.bool:
                mask_NST = torch.zeros_like(is_seen_NST, dtype=dtype).masked_fill_(~is_seen_NST, float("-inf"))
            self._masks[key] = mask_NST[:, None]
        return self._masks[key]

    def write(self, slot: int, cache: KVCache, row: int, length: int) -> None:
        """Put the first ``length`` tokens of a row of another cache into a slot; whatever was there is gone."""
        for own, layer in zip(self.layers, cache.layers, strict=True):
            own.write(slot, layer, row, length)

    def move(self, source: int, target: int) -> None:
        """Copy the text of one slot to another."""
        for layer in self.layers:
            layer.move(source, target)

    def check_room(self, tokens_BS: Tensor) -> None:
        """Raise ValueError if there are not the tokens that were placed for each slot in use."""
        num_used, num_new = self._positions_NS.shape
        if tokens_BS.shape[1] != num_new or len(tokens_BS) < num_used:
            raise ValueError(f"SlotCache: tokens {list(tokens_BS.shape)}; [{num_used} or more, {num_new}] expected")

    def advance(self, _: int) -> None:
        """Do nothing: ``place`` counts."""
