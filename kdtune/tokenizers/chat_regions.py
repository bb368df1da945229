"""Locate parts of a rendered conversation: the template's special tokens, the answers, the masked messages.

Message content must never become a special token. Before rendering, a Unicode noncharacter (the mark) is inserted into
every special-token string inside a message, so that every special token in the result comes from the template. The mark is
removed before the text between special tokens is encoded.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar, cast

from kdtune.errors import DataError
from kdtune.tokenizers.messages import map_strings, strings

T = TypeVar("T")

# U+FDD0..U+FDEF are set aside by Unicode for internal use: they stand for no character in any text.
_NONCHARACTERS = "".join(map(chr, range(0xFDD0, 0xFDF0)))

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]
"""(messages, add_generation_prompt) -> text"""


@dataclass(frozen=True)
class SpecialToken:
    """A special token in a rendered text: characters [start, end) and its id."""

    start: int
    end: int
    token: int


@dataclass(frozen=True)
class Piece:
    """A segment of a rendered text: ordinary text (token None), or one special token."""

    start: int
    end: int
    token: int | None


class SpecialTokenMatcher:
    """Find and escape special-token strings. Built once per tokenizer; patterns are compiled once.

    `lstrip` and `rstrip` list the tokens that also absorb the whitespace before or after them (AddedToken's flags).
    """

    def __init__(self, ids: Mapping[str, int], *, lstrip: Collection[str] = (), rstrip: Collection[str] = ()) -> None:
        self.ids = dict(ids)
        # Longest first: of two tokens that start at the same place the longer one is meant, as in tokenizers.
        ordered = sorted(self.ids, key=lambda token: (-len(token), token))
        whole = [
            (r"\s*" if token in lstrip else "") + re.escape(token) + (r"\s*" if token in rstrip else "")
            for token in ordered
        ]
        self._strips = bool(lstrip or rstrip)
        self._match = re.compile("|".join(whole)) if whole else None
        self._start = re.compile("(?s)(?=" + "|".join(map(re.escape, ordered)) + ")(.)") if whole else None
        self._prefixes = {token[:k] for token in ordered for k in range(1, len(token))}
        self._suffixes = {token[k:] for token in ordered for k in range(1, len(token))}
        self._longest = max(map(len, ordered), default=0)
        self._single = [token for token in ordered if len(token) == 1]

    def find(self, text: str) -> list[SpecialToken]:
        """Return the special tokens in a rendered text, left to right."""
        if self._match is None:
            return []
        found = []
        for match in self._match.finditer(text):
            string = match[0].strip() if self._strips and match[0] not in self.ids else match[0]
            found.append(SpecialToken(match.start(), match.end(), self.ids[string]))
        return found

    def breaks(self, text: str, mark: str) -> str:
        """Insert the mark into every special-token string of `text`, and at ends that could complete one outside it."""
        if self._start is None:
            return text
        for token in self._single:
            if token in text:
                raise DataError(
                    f"a message holds {token!r}, which is a special token of one character and cannot be kept apart "
                    "from the template's own; take it out of the data"
                )
        reach = range(1, min(self._longest, len(text) + 1))
        head = mark if any(text[:k] in self._suffixes for k in reach) else ""
        tail = mark if any(text[-k:] in self._prefixes for k in reach) else ""
        return head + self._start.sub(rf"\1{mark}", text) + tail


def protect(data: T, finder: SpecialTokenMatcher) -> tuple[T, str]:
    """Escape special-token strings in messages, tools and the like; also return the mark ("" if nothing was escaped).

    Raises:
        DataError: every noncharacter occurs in the data.
    """
    texts = list(strings(data))
    if all(finder.breaks(text, _NONCHARACTERS[0]) == text for text in texts):
        return data, ""
    mark = next((m for m in _NONCHARACTERS if not any(m in text for text in texts)), None)
    if mark is None:
        raise DataError(
            "a conversation holds special-token strings and all 32 noncharacters U+FDD0..U+FDEF, of which one is "
            "needed to keep those strings from becoming special tokens; clean the text"
        )

    def change(text: str, is_key: bool) -> str:
        # The template asks for keys by name: those that hold no special token stay as they are.
        return text if is_key and not finder.find(text) else finder.breaks(text, mark)

    return cast(T, map_strings(data, change)), mark


def answer_spans(
    text: str,
    specials: Sequence[SpecialToken],
    messages: Sequence[Mapping[str, Any]],
    *,
    stop_ids: Collection[int],
    render: Render,
    add_generation_prompt: bool,
) -> dict[int, tuple[int, int]]:
    """Return, by index of the assistant's messages, the characters [start, end) of `text` that generation has to produce.

    An answer starts where the generation prompt ends and stops with its end-of-turn token, or with the message's last
    character if the template has no such token for the assistant. Templates that leave an empty block of thoughts out of all
    answers but the last have it in the prompt of each: an earlier answer starts with its content.

    Raises:
        DataError: the rendering up to a message's generation prompt is not a prefix of the full rendering.
    """
    starts: dict[int, int] = {}
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in answers:
        prompt = render(messages[:i], True)
        start = len(prompt) if text.startswith(prompt) else None
        if start is None and i < answers[-1]:
            start = _content_after_header(prompt, text, len(render(messages[:i], False)), messages[i].get("content"))
        if start is None:
            raise _no_prefix(prompt, text, i)
        starts[i] = start
    if not starts:
        return {}
    spans: dict[int, tuple[int, int]] = {}
    limits = [*list(starts.values())[1:], len(text)]
    for (i, start), limit in zip(starts.items(), limits, strict=True):
        stop = next((c.end for c in specials if c.start >= start and c.token in stop_ids), None)
        if i < len(messages) - 1 or add_generation_prompt:
            upto = render(messages[: i + 1], False)
            if text.startswith(upto):
                limit = len(upto)
            elif stop is None or stop > limit:
                raise DataError(
                    f"chat template: cannot tell where the answer in messages[{i}] ends: it has no end-of-turn "
                    "token and later messages change how it is rendered; use another chat template, or single turns"
                )
        spans[i] = (start, stop if stop is not None and stop <= limit else limit)
    return spans


def _content_after_header(prompt: str, text: str, history: int, content: Any) -> int | None:
    """Return where a message's content starts, if text and prompt share all that is between the history and it; else None."""
    if not isinstance(content, str) or not content.strip():
        return None
    shared = _shared(prompt, text)
    # The last place: the header may hold the same word.
    found = text.rfind(content.strip(), history + 1, shared + len(content.strip()))
    return None if found < 0 else found


def _shared(a: str, b: str) -> int:
    """Return how many characters both begin with."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _no_prefix(prompt: str, text: str, index: int) -> DataError:
    at = _shared(prompt, text)
    return DataError(
        f"chat template: cannot tell where the answer in messages[{index}] starts: the prompt that generation sees "
        f"is not how the conversation begins; at character {at} the prompt has {prompt[at : at + 30]!r} and the "
        f"conversation {text[at : at + 30]!r}; use a template whose generation prompt is how an assistant turn starts"
    )


def message_span(text: str, messages: Sequence[Mapping[str, Any]], index: int, *, render: Render) -> tuple[int, int]:
    """Return the characters [start, end) of `text` that the message at `index` adds to the conversation.

    Raises:
        DataError: the template renders the message differently once later ones follow.
    """
    ends = []
    for count in (index, index + 1):
        upto = render(messages[:count], False) if count else ""
        if not text.startswith(upto):
            raise DataError(
                f"chat template: cannot tell where the masked messages[{index}] lies: later messages change how it is "
                "rendered; use another chat template or take the message out"
            )
        ends.append(len(upto))
    return ends[0], ends[1]


def split_pieces(text: str, specials: Sequence[SpecialToken], cuts: Iterable[int]) -> list[Piece]:
    """Split the text into special tokens and the ordinary text between them, and at `cuts`; empty pieces are dropped."""
    edges = sorted({0, len(text), *cuts})
    pieces: list[Piece] = []

    def add_text(start: int, end: int) -> None:
        inner = [start, *(cut for cut in edges if start < cut < end), end]
        pieces.extend(Piece(a, b, None) for a, b in pairwise(inner) if a < b)

    position = 0
    for special in specials:
        add_text(position, special.start)
        pieces.append(Piece(special.start, special.end, special.token))
        position = special.end
    add_text(position, len(text))
    return pieces
