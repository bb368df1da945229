"""Texts that grow side by side, one a slot; a slot whose text has ended is given the next one.

Shape suffixes: B rows of a forward, N slots in use, S new tokens, D embedding, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from kdtune.distributed import broadcast_object
from kdtune.generation.generate import eval_mode
from kdtune.generation.sampling import Sampling, sample_tokens
from kdtune.models import KVCache, Transformer, TransformerConfig
from kdtune.models.kv_cache import SlotCache
from kdtune.tensor_types import is_fsdp_module


@dataclass
class Text:
    """A prompt with its new ids."""

    number: int
    """Of the prompt."""
    ids: list[int]
    """Those of the prompt, and the new ones as they come."""
    generator: torch.Generator
    """That its ids are drawn with."""
    log_probs: list[float] = field(default_factory=list)
    """Of the new ids, if they are asked for."""


def grow(
    model: Transformer,
    texts: Iterable[Text],
    has_ended: Callable[[Text], bool],
    *,
    sampling: Sampling,
    slots: int,
    rows: int = 1,
    longest: int,
    with_log_probs: bool = False,
    sync_tokens: bool = False,
) -> None:
    """Append ids to each text until it has ended.

    Args:
        model: on any device; its mode is restored.
        texts: each with at least one id.
        has_ended: called with a text after each new id; for the last time when it returns true.
        sampling: how each id is chosen.
        slots: number of texts that grow at a time.
        rows: number that the linear layers compute at least in a forward. Kernels round differently for different numbers of rows: where it
            is no less than ``slots``, a text does not depend on its neighbours, to the bit in fp32 on a CPU.
        longest: tokens of the longest text, at most.
        with_log_probs: fill in ``log_probs``.
        sync_tokens: every process continues with rank 0's ids.
    """
    waiting = deque(texts)
    if is_fsdp_module(model):
        model.unshard()  # only then have its weights the dtype and device that they compute in
    with eval_mode(model), _uncompiled(model):
        served = (
            _Slots(model, min(slots, len(waiting)), rows, longest) if _has_slots(model) else _OneByOne(model, longest)
        )
        active = [waiting.popleft() for _ in range(min(served.num_slots, len(waiting)))]
        for slot, text in enumerate(active):
            served.put(slot, text.ids)
        while active:
            logits_BV = served.logits(active)
            tokens = sample_tokens(logits_BV[: len(active)], sampling, [text.generator for text in active])
            tokens = broadcast_object(tokens) if sync_tokens else tokens
            if with_log_probs:
                for text, log_prob in zip(active, _log_probs(logits_BV, tokens), strict=True):
                    text.log_probs.append(log_prob)
            ended = []
            for slot, (text, token) in enumerate(zip(active, tokens, strict=True)):
                text.ids.append(token)
                if has_ended(text):
                    ended.append(slot)
                elif len(text.ids) - 1 == model.config.rope_switch:
                    # From here on all tokens of that text are rotated otherwise: the keys that are held are of no more use.
                    served.put(slot, text.ids)
            # From the last on, so that what moves into a free slot has not ended.
            for slot in reversed(ended):
                if waiting:
                    active[slot] = waiting.popleft()
                    served.put(slot, active[slot].ids)
                    continue
                last = active.pop()
                if slot < len(active):
                    served.move(len(active), slot)
                    active[slot] = last


class _Served(Protocol):
    """A model with caches of the texts that grow."""

    num_slots: int

    def put(self, slot: int, ids: Sequence[int]) -> None:
        """Compute the keys and values of a text whose last token comes next, for a slot."""

    def move(self, source: int, target: int) -> None:
        """Move the text of one slot to another."""

    def logits(self, texts: Sequence[Text]) -> Tensor:
        """Append the last token of each text, that of the first slots; return the next one's logits [B, V], in the first rows."""


class _Slots:
    """kdtune's decoder, with a `SlotCache`."""

    def __init__(self, model: Transformer, num_slots: int, num_rows: int, longest: int) -> None:
        self._model, self.num_slots, self._num_rows = model, num_slots, num_rows
        # Attention that is not kdtune's own computes all rows.
        self._has_idle_slots = not isinstance(model.config, TransformerConfig)
        num_kept = max(num_slots, num_rows) if self._has_idle_slots else num_slots
        self._cache = SlotCache(model.config, num_kept, longest)
        # Texts that begin alike one after the other share what is computed of the beginning.
        self._prefix: list[int] = []
        self._prefix_cache: KVCache | None = None

    def put(self, slot: int, ids: Sequence[int]) -> None:
        # The last token goes through the model with those of the other slots. With it a text may be so long that all of its
        # tokens are rotated otherwise, which the model can only tell if it is among them.
        prefix = list(ids) if len(ids) - 1 == self._model.config.rope_switch else list(ids[:-1])
        if not prefix:
            return
        if prefix != self._prefix or self._prefix_cache is None:
            self._prefix_cache = _cache_of(self._model, prefix, len(prefix))
            self._prefix = prefix
        self._cache.write(slot, self._prefix_cache)

    def move(self, source: int, target: int) -> None:
        self._cache.move(source, target)

    def logits(self, texts: Sequence[Text]) -> Tensor:
        idle = [0] * (self._num_rows - len(texts))  # any id will do: nothing sees it
        positions = [len(text.ids) - 1 for text in texts]
        tokens = [text.ids[-1] for text in texts]
        device = self._model.device
        self._cache.place(positions + idle if self._has_idle_slots else positions, device)
        inputs_2B = torch.tensor([tokens + idle, positions + idle], device=device)
        hidden_B1D = self._model(
            inputs_2B[0, :, None], input_pos=inputs_2B[1, :, None], kv_cache=self._cache, return_hidden=True
        )
        return self._model.output(hidden_B1D[:, 0])


class _OneByOne:
    """Any model, one text after the other."""

    num_slots = 1

    def __init__(self, model: Transformer, longest: int) -> None:
        self._model, self._longest = model, longest
        self._cache: KVCache | None = None

    def put(self, _: int, ids: Sequence[int]) -> None:
        self._cache = _cache_of(self._model, ids[:-1], self._longest)

    def move(self, source: int, target: int) -> None:
        """Never called: there is one slot."""

    def logits(self, texts: Sequence[Text]) -> Tensor:
        token_11 = torch.tensor([[texts[0].ids[-1]]], device=self._model.device)
        return self._model.output(self._model(token_11, kv_cache=self._cache, return_hidden=True)[:, -1])


def _cache_of(model: Transformer, ids: Sequence[int], longest: int) -> KVCache:
    """Return a cache with these tokens, and room for texts of up to ``longest``."""
    cache = KVCache(model.config, 1, longest)
    if ids:
        model(torch.tensor([ids], device=model.device), kv_cache=cache, return_hidden=True)
    return cache


def _has_slots(model: Transformer) -> bool:
    # Some models of transformers take no mask.
    return not getattr(model, "has_foreign_windows", False)


def _uncompiled(model: Transformer) -> AbstractContextManager[object]:
    """Return a context in which layers that are compiled for training are not: each length would have code of its own."""
    if all(layer._compiled_call_impl is None for layer in model.layers):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _log_probs(logits_BV: Tensor, tokens: Sequence[int]) -> list[float]:
    """Return the logarithm of each token's probability, of those of the first rows, computed in fp32 or the logits' wider dtype."""
    wide_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)).log_softmax(dim=-1)
    found: list[float] = wide_BV[range(len(tokens)), tokens].tolist()
    return found
