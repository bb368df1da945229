"""Strings that end a generated text."""

from collections.abc import Sequence

from kdtune.tokenizers import Tokenizer


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
