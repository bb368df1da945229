"""kdtune's attention for models of transformers: what may be attended to goes through its interface for masks, as it is.

The models ask for a mask once in a forward, and pass what they get to every layer: here not a tensor [S, T] but the argument of
`kdtune.models.attention.attend`, so documents end to end need no mask, and a window is the one that transformers' own mask would
have. A model that does not pass it on is found out in its first forward.

Shape suffixes: B batch, S new tokens, T tokens attended to, H heads, K kv heads, E head dim.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kdtune.errors import ConfigError
from kdtune.models.attention import attend, attend_within
from kdtune.models.documents import Documents
from kdtune.models.kv_cache import SlotCache

INTERFACE = "kdtune"
"""Name of the implementation in transformers."""
INSTEAD = "use a model of another architecture, or write this one as a family of your own (docs/extending.md)"
"""What to do where kdtune's attention does not compute what a model asks for."""

Mask = Tensor | Documents | SlotCache | None
_MASK: ContextVar[Mask] = ContextVar("_MASK", default=None)

# What layers pass on that changes nothing here: the window is the mask's, and models are causal.
_SILENT = {
    "cache_position", "is_causal", "labels", "layer_past", "output_attentions", "output_hidden_states", "past_key_values",
    "position_embeddings", "position_ids", "return_dict", "sliding_window", "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class Allowed:
    """What a layer's queries may attend to: the arguments of `attend`."""

    mask: Mask
    window: int | None


def register() -> None:
    """Make the implementation known to transformers; a second time changes nothing."""
    ALL_ATTENTION_FUNCTIONS.register(INTERFACE, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(INTERFACE, _mask)


@contextmanager
def allowing(mask: Mask) -> Iterator[None]:
    """A context in which masks that models ask for are this one."""
    token = _MASK.set(mask)
    try:
        yield
    finally:
        _MASK.reset(token)


def _refusal(what: str, instead: str) -> ConfigError:
    return ConfigError(f"family=kdtune.models.hf_model: {what}; {instead}")


def _mask(*, local_size: int | None = None, use_vmap: bool = False, **_: Any) -> Any:
    if use_vmap:
        raise _refusal("the model adds to the causal mask, which kdtune does not compute", INSTEAD)
    return Allowed(_MASK.get(), local_size)


def _attention(
    module: nn.Module,
    query_BHSE: Tensor,
    key_BKTE: Tensor,
    value_BKTE: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return [B, S, H, E] and, in place of the scores, None."""
    name = type(module).__name__
    if not isinstance(attention_mask, Allowed):
        raise _refusal(f"{name} is not given the model's mask, so documents could see each other", INSTEAD)
    if unknown := sorted(key for key, value in others.items() if key not in _SILENT and value is not None):
        raise _refusal(f"{name} passes {', '.join(unknown)} to attention, which kdtune does not compute", INSTEAD)
    if dropout:
        raise _refusal(f"{name} drops scores, {dropout}, and kdtune does not", "set its dropout to 0 in config.json")
    mask, window = attention_mask.mask, attention_mask.window
    if isinstance(mask, SlotCache):
        mask, window = mask.mask(window, key_BKTE.shape[2]), None
    if isinstance(mask, Documents):
        q_SHE, k_SKE, v_SKE = (tensor[0].transpose(0, 1) for tensor in (query_BHSE, key_BKTE, value_BKTE))
        return attend_within(mask, q_SHE, k_SKE, v_SKE, window, scaling, softcap)[None], None
    return attend(query_BHSE, key_BKTE, value_BKTE, mask, window, scaling, softcap).transpose(1, 2), None
