"""Stream generated text to a terminal."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Only the type is needed; the tokenizer libraries take a while to import.
    from kdtune.tokenizers import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decode ids to text one at a time; the joined pieces equal what the ids decode to together.

    A character that takes several tokens is held back until it is complete.
    """

    def __init__(self, tokenizer: "Tokenizer", write: Callable[[str], object]) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._ids: list[int] = []
        # Ids before `_shown` have been written. Decoding starts a little before them, at `_start`, because some
        # tokenizers treat the first piece of a text otherwise than a later one.
        self._start = 0
        self._shown = 0

    def add(self, token: int) -> None:
        """Write what the id adds to the text, unless a character is still incomplete."""
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        now = self._tokenizer.decode(self._ids[self._start :])
        # An incomplete character decodes to the replacement character.
        if not now.endswith(_REPLACEMENT) and len(now) > len(before):
            self._write(now[len(before) :])
            self._start, self._shown = self._shown, len(self._ids)

    def finish(self) -> str:
        """Write what was held back; return the full text."""
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        rest = self._tokenizer.decode(self._ids[self._start :])[len(before) :]
        if rest:
            self._write(rest)
        self._start = self._shown = len(self._ids)
        return self._tokenizer.decode(self._ids)
