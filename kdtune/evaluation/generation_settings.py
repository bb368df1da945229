"""Translate a task's generation settings (lm-eval's `generation_kwargs`) into ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdtune._assets import did_you_mean
from kdtune.errors import ConfigError
from kdtune.generation import Sampling
from kdtune.tokenizers import Tokenizer

_LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KEYS = (*_LENGTH_KEYS, "until", "do_sample", "temperature", "top_k", "top_p")
# What lm-eval's hf backend generates at most where a task does not say.
_DEFAULT_LENGTH = 256


@dataclass(frozen=True)
class GenerationSettings:
    """Stop strings, the longest answer in tokens, and how tokens are chosen."""

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling

    def prompt_room(self, max_length: int) -> int:
        """Return the number of tokens left for the prompt; ConfigError if none is left."""
        if self.max_new_tokens >= max_length:
            raise ConfigError(
                f"max_seq_length={max_length}: the task generates up to {self.max_new_tokens} tokens and needs room for "
                "a prompt before them; give more"
            )
        return max_length - self.max_new_tokens


def read_generation_settings(given: Mapping[str, Any]) -> GenerationSettings:
    """Read a request's or task's settings (by default greedy); ConfigError if one is not supported."""
    for key in given:
        if key not in _KEYS:
            raise ConfigError(
                f"generation_kwargs.{key}: has no function here; allowed: {', '.join(_KEYS)}{did_you_mean(key, _KEYS)}"
            )
    until = given.get("until") or []
    lengths = [int(given[key]) for key in _LENGTH_KEYS if given.get(key) is not None]
    temperature = float(given.get("temperature") or 0.0)
    do_sample = given.get("do_sample")
    if do_sample is False:
        temperature = 0.0
    elif do_sample and temperature == 0.0:
        temperature = 1.0
    return GenerationSettings(
        until=tuple([until] if isinstance(until, str) else until),
        max_new_tokens=lengths[0] if lengths else _DEFAULT_LENGTH,
        sampling=Sampling(temperature, given.get("top_k"), given.get("top_p")),
    )


class StopStrings:
    """Detect that a sequence has just generated one of some strings: a `should_stop` for `generate_batch`."""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._strings = [string for string in strings if string]
        # A token gives at least one byte, so a string just completed lies within so many of the last tokens.
        self._window = max((len(string.encode()) for string in self._strings), default=0)

    def __call__(self, index: int, new_ids: list[int]) -> bool:
        """Return whether the last of the new ids completed a stop string; special tokens count as their strings."""
        if not self._strings:
            return False
        tail = self._tokenizer.decode(new_ids[-self._window :], skip_special=False)
        return any(string in tail for string in self._strings)


def cut_at_stops(text: str, strings: Sequence[str]) -> str:
    """Return the text before the first stop string in it."""
    for string in strings:
        if string:
            text = text.split(string)[0]
    return text
