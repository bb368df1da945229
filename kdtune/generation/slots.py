"""Texts that grow side by side, one a slot; a slot whose text has ended is given the next one.

Shape suffixes: B rows of a forward, N slots in use, S new tokens, D embedding, V vocabulary.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kdtune.distributed import broadcast_object
from kdtune.generation.compiled import can_compile, compiled_step, fixed_cache
from kdtune.generation.generate import eval_mode
from kdtune.generation.sampling import Sampling, sample_tokens
from kdtune.models import KVCache, Transformer, TransformerConfig
from kdtune.models.kv_cache import FixedLayer, SlotCache
from kdtune.tensor_types import is_fsdp_module, is_plain

# Tokens of prompts that are read in a forward, with their padding: more of them save nothing.
TOKENS_READ = 2048


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
    partner_log_probs: list[float] = field(default_factory=list)
    """Those by the partner, if there is one."""
    partner_hidden: list[Tensor] = field(default_factory=list)
    """The partner's last hidden states [D] that predict the new ids."""
    num_rejected: int = 0
    """Tokens that were drafted and taken back."""

    def hidden_of_partner(self) -> Tensor:
        """Return the partner's hidden states [A, D] on the CPU, and keep them no longer."""
        hidden_AD, self.partner_hidden = torch.stack(self.partner_hidden).cpu(), []
        return hidden_AD


@dataclass(frozen=True)
class Partner:
    """A second model that texts are written with: each id is drawn from a mixture of both models' distributions."""

    model: Transformer
    share: float
    """Its part of the mixture, between 0 and 1."""

    def mixed(self, logits_BV: Tensor, partner_logits_BV: Tensor) -> Tensor:
        """Return the logarithm of the mixture [B, V], over the first model's ids, of which the partner has all or the first ones."""
        ours_BV, theirs_BV = log_softmax(logits_BV), log_softmax(partner_logits_BV)
        lacking = ours_BV.shape[1] - theirs_BV.shape[1]
        theirs_BV = functional.pad(theirs_BV, (0, lacking), value=-torch.inf)
        return torch.logaddexp(ours_BV + math.log1p(-self.share), theirs_BV + math.log(self.share))


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
    partner: Partner | None = None,
    num_ids: int | None = None,
    compile: bool = False,
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
        partner: a second model to write with.
        num_ids: draw from the first so many ids alone; None: from all that the models share.
        compile: compile the forward of the texts' next tokens.
    """
    waiting = deque(texts)
    models = [model] if partner is None else [model, partner.model]
    for one in models:
        if is_fsdp_module(one):
            one.unshard()  # only then have its weights the dtype and device that they compute in
    with eval_mode(*models), uncompiled(models):
        compile = compile and all(map(can_compile, models))
        num_slots = slots if compile else min(slots, len(waiting))  # always as many: each number has code of its own
        served = Together([served_by(one, num_slots, rows, longest, compile=compile) for one in models])
        active = [waiting.popleft() for _ in range(min(served.num_slots, len(waiting)))]
        served.put({slot: text.ids for slot, text in enumerate(active)})
        while active:
            states = served.hidden(active)
            logits = [one.output(hidden_BD)[: len(active)] for one, hidden_BD in zip(models, states, strict=True)]
            if partner is not None:
                logits[1] = logits[1][:, : logits[0].shape[1]]
                num_ids = min(num_ids or logits[1].shape[1], logits[1].shape[1])
            drawn_from = logits[0] if partner is None else partner.mixed(*logits)
            tokens = sample_tokens(drawn_from[:, :num_ids], sampling, [text.generator for text in active])
            tokens = broadcast_object(tokens) if sync_tokens else tokens
            if with_log_probs:
                _note(active, tokens, logits, states)
            ended = []
            for slot, (text, token) in enumerate(zip(active, tokens, strict=True)):
                text.ids.append(token)
                if has_ended(text):
                    ended.append(slot)
                elif any(len(text.ids) - 1 == one.config.rope_switch for one in models):
                    # From here on all tokens of that text are rotated otherwise: the keys that are held are of no more use.
                    served.put({slot: text.ids})
            refill(active, ended, waiting, served)


def refill(active: list[Text], ended: Sequence[int], waiting: deque[Text], served: "Together") -> None:
    """Give the slots of texts that have ended to those that wait, or move the last texts there; ``ended`` ascends."""
    # From the last on, so that what moves into a free slot has not ended.
    new: set[int] = set()
    for slot in reversed(ended):
        if waiting:
            active[slot] = waiting.popleft()
            new.add(active[slot].number)
            continue
        last = active.pop()
        if slot < len(active):
            served.move(len(active), slot)
            active[slot] = last
    if new:
        served.put({slot: text.ids for slot, text in enumerate(active) if text.number in new})


class Served(Protocol):
    """A model with caches of the texts that grow."""

    num_slots: int

    def put(self, texts: Mapping[int, Sequence[int]]) -> None:
        """Compute the keys and values of texts whose last tokens come next, by their slots."""

    def move(self, source: int, target: int) -> None:
        """Move the text of one slot to another."""

    def hidden(self, texts: Sequence[Text], num_new: int = 1) -> Tensor:
        """Append the last ``num_new`` tokens of each text, those of the first slots; return hidden states [B, S, D], theirs first.

        What a slot held of these places and beyond is gone.
        """


class _Slots:
    """kdtune's decoder, with a `SlotCache`."""

    def __init__(
        self, model: Transformer, num_slots: int, num_rows: int, longest: int, num_new: int, compile: bool
    ) -> None:
        self._model, self.num_slots = model, num_slots
        self._num_rows = max(num_slots, num_rows) if compile else num_rows
        # Attention that is not kdtune's own computes all rows, and so does a compiled forward.
        self._has_idle_slots = compile or not isinstance(model.config, TransformerConfig)
        # torch does less for each operation than under no_grad. Tensors that are made in it could not be trained on: other modules may
        # keep some, and FSDP gathers weights.
        is_plain_model = (
            not self._has_idle_slots and not is_fsdp_module(model) and all(map(is_plain, model.parameters()))
        )
        self._mode = torch.inference_mode if is_plain_model else torch.no_grad
        num_kept = max(num_slots, num_rows) if self._has_idle_slots else num_slots
        self._cache = SlotCache(model.config, num_kept, longest, num_new=num_new)
        self._fixed: list[FixedLayer] = []
        if compile:
            self._cache, self._fixed = fixed_cache(model, num_kept, longest)
        # Texts that begin alike one after the other share what is computed of the beginning.
        self._read: list[tuple[int, ...]] = []
        self._read_cache: KVCache | None = None
        self._most_read = most_read(model.config, model.dtype, model.device.type, longest)

    def put(self, texts: Mapping[int, Sequence[int]]) -> None:
        slots: dict[tuple[int, ...], list[int]] = {}
        for slot, ids in texts.items():
            # The last token goes through the model with those of the other slots. With it a text may be so long that all of its
            # tokens are rotated otherwise, which the model can only tell if it is among them.
            prefix = tuple(ids if len(ids) - 1 == self._model.config.rope_switch else ids[:-1])
            if prefix:
                slots.setdefault(prefix, []).append(slot)
        for group in together(slots, self._most_read):
            with self._mode():
                if group != self._read or self._read_cache is None:
                    self._read_cache = None  # or there would be two for a moment
                    self._read_cache, self._read = _cache_of(self._model, group, len(group[-1])), group
                for row, prefix in enumerate(group):
                    for slot in slots[prefix]:
                        self._cache.write(slot, self._read_cache, row, len(prefix))
        if len(self._read) > 1:
            self._read, self._read_cache = [], None

    def move(self, source: int, target: int) -> None:
        with self._mode():
            self._cache.move(source, target)

    def hidden(self, texts: Sequence[Text], num_new: int = 1) -> Tensor:
        idle = [0] * (self._num_rows - len(texts))  # any id will do: nothing sees it
        positions = [len(text.ids) - num_new for text in texts]
        tokens = [text.ids[-num_new:] for text in texts] + [[0] * num_new for _ in idle]
        device = self._model.device
        with self._mode():
            self._cache.place(positions + idle if self._has_idle_slots else positions, device, num_new)
            tokens_BS, firsts_B = torch.tensor(tokens, device=device), torch.tensor(positions + idle, device=device)
            positions_BS = firsts_B[:, None] + torch.arange(num_new, device=device)
            if self._fixed:
                self._cache.fix(self._model.dtype)
                # Whatever `uncompiled` says of layers that training has compiled.
                with torch.compiler.set_stance("default"):
                    return compiled_step(device.type)(self._model, tokens_BS, positions_BS, self._fixed)
            hidden_BSD: Tensor = self._model(
                tokens_BS, input_pos=positions_BS, kv_cache=self._cache, return_hidden=True
            )
        return hidden_BSD.clone() if hidden_BSD.is_inference() else hidden_BSD  # a loss may be computed from it


class _OneByOne:
    """Any model, one text after the other."""

    num_slots = 1

    def __init__(self, model: Transformer, longest: int) -> None:
        self._model, self._longest = model, longest
        self._cache: KVCache | None = None

    def put(self, texts: Mapping[int, Sequence[int]]) -> None:
        (ids,) = texts.values()
        self._cache = _cache_of(self._model, [ids[:-1]], self._longest)

    def move(self, source: int, target: int) -> None:
        """Never called: there is one slot."""

    def hidden(self, texts: Sequence[Text], num_new: int = 1) -> Tensor:
        tokens_1S = torch.tensor([texts[0].ids[-num_new:]], device=self._model.device)
        hidden_1SD: Tensor = self._model(tokens_1S, kv_cache=self._cache, return_hidden=True)
        return hidden_1SD


class Together:
    """Models that write the same texts."""

    def __init__(self, served: Sequence[Served]) -> None:
        self._served = served
        self.num_slots = min(one.num_slots for one in served)

    def put(self, texts: Mapping[int, Sequence[int]]) -> None:
        """See `Served.put`."""
        for one in self._served:
            one.put(texts)

    def move(self, source: int, target: int) -> None:
        """See `Served.move`."""
        for one in self._served:
            one.move(source, target)

    def hidden(self, texts: Sequence[Text]) -> list[Tensor]:
        """Return the hidden states [B, D] of each, for the last token of each text."""
        return [one.hidden(texts)[:, -1] for one in self._served]


def served_by(
    model: Transformer, slots: int, rows: int, longest: int, num_new: int = 1, *, compile: bool = False
) -> Served:
    """Return a model with caches of texts of up to ``longest`` tokens, to which up to ``num_new`` are appended at a time; see `grow`."""
    if not has_slots(model):
        return _OneByOne(model, longest)
    return _Slots(model, slots, rows, longest, num_new, compile and can_compile(model))


def most_read(config: Any, dtype: torch.dtype, device_type: str, longest: int) -> int:
    """Return how many tokens of prompts go through a model in a forward; 0: each prompt alone, whatever its length.

    Alone where a text must not depend on others to the bit, where the model tells a text's length, and where a layer holds the last tokens
    of texts of up to ``longest`` alone.
    """
    is_exact = device_type == "cpu" and dtype.itemsize >= 4
    if is_exact or not isinstance(config, TransformerConfig) or config.rope_switch is not None:
        return 0
    holds_all = all((config.window(index) or longest) >= longest for index in range(config.num_layers))
    return TOKENS_READ if holds_all else 0


def together(prefixes: Iterable[tuple[int, ...]], most: int) -> Iterator[list[tuple[int, ...]]]:
    """Yield the beginnings of texts that are read in one forward: alike in length, the longest last, up to ``most`` tokens with padding."""
    group: list[tuple[int, ...]] = []
    for prefix in sorted(prefixes, key=len) if most else prefixes:
        if group and (len(group) + 1) * len(prefix) > most:
            yield group
            group = []
        group.append(prefix)
    if group:
        yield group


def _cache_of(model: Transformer, texts: Sequence[Sequence[int]], longest: int) -> KVCache:
    """Return a cache with the tokens of texts, the longest last, padded at their ends, and room for texts of up to ``longest``."""
    cache, most = KVCache(model.config, len(texts), longest), len(texts[-1])
    if most:
        tokens = [[*ids, *[0] * (most - len(ids))] for ids in texts]
        model(torch.tensor(tokens, device=model.device), kv_cache=cache, return_hidden=True)
    return cache


def has_slots(model: Transformer) -> bool:
    """Return whether texts of different lengths go through a model side by side."""
    # Some models of transformers take no mask.
    return not getattr(model, "has_foreign_windows", False)


def uncompiled(models: Sequence[Transformer]) -> AbstractContextManager[object]:
    """Return a context in which layers that are compiled for training are not: each length would have code of its own."""
    if all(layer._compiled_call_impl is None for model in models for layer in model.layers):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _note(texts: Sequence[Text], tokens: Sequence[int], logits: Sequence[Tensor], states: Sequence[Tensor]) -> None:
    """Note the logarithm of the probability of each text's new id, and of a partner, the second model, its hidden states too."""
    for of_partner, one_BV in enumerate(logits):
        log_probs: list[float] = log_softmax(one_BV)[range(len(tokens)), tokens].tolist()
        for text, log_prob in zip(texts, log_probs, strict=True):
            (text.partner_log_probs if of_partner else text.log_probs).append(log_prob)
    if len(states) > 1:
        for text, hidden_D in zip(texts, states[1], strict=False):
            text.partner_hidden.append(hidden_D)


def log_softmax(logits_BV: Tensor) -> Tensor:
    """Return log-probabilities in fp32, or in the logits' wider dtype."""
    return logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)).log_softmax(dim=-1)
