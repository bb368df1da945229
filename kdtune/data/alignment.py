"""Align two tokenizations of the same text by bytes: a student's and a teacher's, each in its own chat template.

The text that both share is the contents of the messages, or a plain text; what a template adds is not compared. A boundary
between two tokens lies at an offset, a number of bytes of the shared text. Boundaries at the same offset in both are common: up to
there both models have read the same bytes. Between two that follow each other lies a chunk: some tokens of the student and some of
the teacher, with the same bytes. Token strings are never compared: a character may be cut anywhere, and a leading space may
belong to the token or to the template.

The end of an answer is one offset more: the tokens from the content's last byte to the special token that ends the turn.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kdtune.constants import IGNORE_INDEX
from kdtune.errors import DataError
from kdtune.tokenizers.base import well_formed
from kdtune.tokenizers.messages import message_fields

if TYPE_CHECKING:
    from kdtune.data.transforms import Example
    from kdtune.tokenizers import Tokenizer

Ints = npt.NDArray[np.integer[Any]]

# Unicode's noncharacters mark where a content begins, with the message's number in base 16, and where it ends.
_BEGIN, _DIGITS, _END = "\ufdd0", "\ufde0", "\ufdd1"
_MARKED = re.compile("\ufdd0([\ufde0-\ufdef]+)(.*?)\ufdd1", re.DOTALL)
_NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")

# An offset is a message's number, and below these bits a number of bytes of its content.
_MESSAGE_BITS = 32


@dataclass(frozen=True)
class TeacherExample:
    """An example in the teacher's tokens, and the chunks that it shares with the student's."""

    tokens: Ints
    """The teacher's token ids, [S]."""
    chunks_K5: Ints
    """First and last boundary of each chunk in the student's tokens, then in the teacher's; and 1 if those are the same bytes, 0
    where a template's blank belongs to one of them. Boundary i lies after token i: positions first to last - 1 predict the
    chunk's tokens."""

    def cut(self, num_student: int, num_teacher: int | None) -> "TeacherExample":
        """Return the chunks that lie in the first tokens of both models, and the teacher's tokens up to the last of them."""
        room = len(self.tokens[:num_teacher])
        chunks = self.chunks_K5[(self.chunks_K5[:, 1] < num_student) & (self.chunks_K5[:, 3] < room)]
        return TeacherExample(self.tokens[: chunks[:, 3].max(initial=0) + 1], chunks)

    def packed(self) -> "TeacherExample":
        """Return the example in int32, as a dataset keeps it."""
        return TeacherExample(self.tokens.astype(np.int32), self.chunks_K5.astype(np.int32))

    def unpacked(self) -> "TeacherExample":
        """Return the example in int64."""
        return TeacherExample(self.tokens.astype(np.int64), self.chunks_K5.astype(np.int64))


class TokenizerPair:
    """The student's tokenizer, which it behaves as, with the teacher's beside it: datasets given a pair make paired examples.

    Raises:
        ConfigError: one of the two does not know the bytes of its ids.
    """

    def __init__(self, student: "Tokenizer", teacher: "Tokenizer") -> None:
        self.student, self.teacher = student, teacher
        self.is_chat = True
        """Whether the examples are conversations, which end with another token than texts do."""
        self._streams = TokenStream(student), TokenStream(teacher)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "student":  # not there yet while it is unpickled
            raise AttributeError(name)
        return getattr(self.student, name)

    @property
    def pair(self) -> "TokenizerPair":
        """The pair itself: what a dataset asks a tokenizer for."""
        return self

    def pair_messages(
        self, ids: Sequence[int], trained: Sequence[bool], messages: Sequence[Any], **beside: Any
    ) -> TeacherExample:
        """Return a conversation for the teacher, in its own chat template; ids and trained are the student's, not truncated."""
        teacher_ids, _ = self.teacher.tokenize_messages(messages, **beside)
        offsets = [stream.message_offsets(one, messages, **beside) for stream, one in self._both(ids, teacher_ids)]
        return self._paired(ids, trained, teacher_ids, offsets)

    def pair_text(self, ids: Sequence[int], trained: Sequence[bool], text: str, *, add_eos: bool) -> TeacherExample:
        """Return a plain text for the teacher, beginning with its bos if it has one."""
        teacher_ids = self.teacher.encode(text, add_bos=self.teacher.begins_with_bos, add_eos=add_eos)
        offsets = [stream.text_offsets(one, text) for stream, one in self._both(ids, teacher_ids)]
        return self._paired(ids, trained, teacher_ids, offsets)

    def pieces(self, ids: Ints, teacher_ids: Ints) -> list[list[str]]:
        """Return the text of each token of the student and of the teacher; bytes that are no text are escaped."""
        return [
            [stream.shown(i) for i in one.tolist()]
            for stream, one in zip(self._streams, (ids, teacher_ids), strict=True)
        ]

    def shared_ids(self) -> tuple[list[int], list[int]]:
        """Return the ids of the tokens that both vocabularies have: of the same bytes, and of the one that ends a sequence."""
        ours, theirs = ({spelled: i for i, spelled in enumerate(stream.bytes) if spelled} for stream in self._streams)
        shared = [(i, theirs[spelled]) for spelled, i in ours.items() if spelled in theirs]
        our_end, their_end = self._end_id(self.student), self._end_id(self.teacher)
        if our_end is not None and their_end is not None:
            shared.append((our_end, their_end))
        return [i for i, _ in shared], [i for _, i in shared]

    def word_starts(self) -> tuple[list[int], list[int], list[int]]:
        """Return the ids that no word goes on with, of student and teacher: those that begin with a blank, a tab or a line feed, and
        the special ones; and the student's special ones.
        """
        special = [sorted(stream.tokenizer.special_tokens.values()) for stream in self._streams]
        ours, theirs = (
            [i for i, spelled in enumerate(stream.bytes) if spelled and spelled[:1] in (b" ", b"\t", b"\n")] + ids
            for stream, ids in zip(self._streams, special, strict=True)
        )
        return ours, theirs, special[0]

    def _end_id(self, tokenizer: "Tokenizer") -> int | None:
        """Return the special token after an answer, or of a text; None if there is not exactly one."""
        eos = {tokenizer.eos_id} - {None}
        ends = (tokenizer.trained_stop_ids(is_chat=True) - eos or eos) if self.is_chat else eos
        special = [i for i in ends if i in tokenizer.special_tokens.values()]
        return special[0] if len(special) == 1 else None

    def aligned_shares(self, examples: Iterable["Example"]) -> tuple[float, float, float]:
        """Return the shares of the trained bytes and tokens that lie in chunks, and of the tokens at which a chunk begins."""
        num_bytes, aligned_bytes, num_tokens, aligned_tokens, starts = 0, 0, 0, 0, 0
        spell = self._streams[0].spell
        for example in examples:
            ids, trained = example.tokens, np.flatnonzero(example.labels != IGNORE_INDEX) + 1
            num_bytes, num_tokens = num_bytes + len(spell(ids[trained].tolist())), num_tokens + len(trained)
            for first, last, *_ in example.teacher.chunks_K5 if example.teacher is not None else ():
                aligned_bytes += len(spell(ids[first + 1 : last + 1].tolist()))
                aligned_tokens, starts = aligned_tokens + int(last - first), starts + 1
        return aligned_bytes / max(1, num_bytes), aligned_tokens / max(1, num_tokens), starts / max(1, num_tokens)

    def _both(self, ids: Sequence[int], teacher_ids: Sequence[int]) -> list[tuple["TokenStream", Sequence[int]]]:
        return list(zip(self._streams, (ids, teacher_ids), strict=True))

    def _paired(
        self, ids: Sequence[int], trained: Sequence[bool], teacher_ids: Sequence[int], offsets: Sequence[Ints]
    ) -> TeacherExample:
        chunks = common_chunks(offsets[0], offsets[1], trained)
        ours, theirs = self._streams
        rows = [
            (a, b, c, d, ours.spell(ids[a + 1 : b + 1]) == theirs.spell(teacher_ids[c + 1 : d + 1]))
            for a, b, c, d in chunks
        ]
        return TeacherExample(np.asarray(teacher_ids, dtype=np.int64), np.array(rows, dtype=np.int64).reshape(-1, 5))


class TokenStream:
    """Finds the offsets of a tokenizer's tokens in the text that both models share."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self.tokenizer = tokenizer
        self.bytes = tokenizer.token_bytes()
        """Bytes of each id; None for a special token."""
        self._special = {i: text.encode() for text, i in tokenizer.special_tokens.items()}

    def spell(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of some tokens; a special token is one byte that no text has."""
        return b"".join(b"\xff" if i in self._special else self.bytes[i] or b"" for i in ids)

    def shown(self, token: int) -> str:
        """Return the text of a token for people, a space as a dot."""
        return self._special.get(token, self.bytes[token] or b"").decode(errors="backslashreplace").replace(" ", "·")

    def text_offsets(self, ids: Sequence[int], text: str) -> Ints:
        """Return the offset of the boundary after each token of a plain text, -1 for none."""
        whole = well_formed(text).encode()
        found = _within(self._ends(ids, whole, dict.fromkeys(self._special, b"")), 0, len(whole), whole)
        if len(ids) > 1 and ids[-1] in self._special and found[-2] == len(whole):
            found[-1] = len(whole) + 1
        return found

    def message_offsets(
        self,
        ids: Sequence[int],
        messages: Sequence[Any],
        *,
        tools: Sequence[Any] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> Ints:
        """Return the offset of the boundary after each token of a tokenized conversation, -1 for none.

        Blanks around a content do not count. A content that the template changes, leaves out or repeats has no offsets.
        """
        found = np.full(len(ids), -1, dtype=np.int64)
        fields = [message_fields(message, i) for i, message in enumerate(messages)]

        def render(some: Sequence[Any]) -> str:
            return well_formed(self.tokenizer.render(some, tools=tools, template_variables=template_variables))

        text = render(fields).encode()
        ends = self._ends(ids, text, self._special)
        for number, (start, stop) in _content_spans(fields, text, render).items():
            own, first = _within(ends, start, stop, text), number << _MESSAGE_BITS
            found = np.where(own >= 0, own + first, found)
            if fields[number]["role"] == "assistant" and (last := self._end_of_turn(ids, ends, stop, text)) is not None:
                found[last] = first + stop - start + 1
        return found

    def _ends(self, ids: Sequence[int], text: bytes, special: Mapping[int, bytes]) -> Ints:
        """Return the position in the text after each token, -1 where it is not known.

        Tokens of other bytes than the text's, such as an unknown token, lose it until the next special token.
        """
        found = np.full(len(ids), -1, dtype=np.int64)
        position, is_lost, may_skip = 0, False, False
        for index, token in enumerate(ids):
            if token in special:
                string = special[token]
                if is_lost:
                    at: int | None = text.find(string, position) if string else -1
                else:
                    at = _after_blanks(text, position, string)
                if at is not None and at >= 0:
                    position, is_lost = at + len(string), False
                may_skip = True  # the token may have taken the blanks behind it
            elif not is_lost:
                spelled = self.bytes[token] or b""
                # Sentencepiece puts a space first that the text lacks.
                forms = [spelled] if spelled[:1] != b" " else [spelled, spelled[1:]]
                places = [position, _skip_blanks(text, position)] if may_skip else [position]
                fits = [at + len(form) for at in places for form in forms if text.startswith(form, at)]
                is_lost, may_skip = not spelled or not fits, False
                position = fits[0] if fits else position
            found[index] = -1 if is_lost else position
        return found

    def _end_of_turn(self, ids: Sequence[int], ends: Ints, stop: int, text: bytes) -> int | None:
        """Return the index of the special token that ends an answer; only blanks may lie between it and `stop`, the content's end."""
        for index in np.flatnonzero(ends >= stop).tolist():
            if ids[index] in self._special:
                return index if ids[index] in self.tokenizer.stop_ids else None
            if text[stop : ends[index]].strip():
                return None
        return None


def common_chunks(student: Ints, teacher: Ints, trained: Sequence[bool]) -> list[tuple[int, int, int, int]]:
    """Return the chunks between neighbouring common boundaries, see `TeacherExample`, that are trained on as a whole.

    student, teacher: offsets of `TokenStream`. trained: of the student's tokens. Of several boundaries at the same offset the
    last counts, the one that predicts the text's next byte.
    """
    ours, theirs = ({offset: i for i, offset in enumerate(one.tolist()) if offset >= 0} for one in (student, teacher))
    return [
        (ours[a], ours[b], theirs[a], theirs[b])
        for a, b in pairwise(sorted(ours.keys() & theirs.keys()))
        if a >> _MESSAGE_BITS == b >> _MESSAGE_BITS and all(trained[ours[a] + 1 : ours[b] + 1])
    ]


def _content_spans(
    fields: Sequence[Mapping[str, Any]], text: bytes, render: Callable[[Sequence[Any]], str]
) -> dict[int, tuple[int, int]]:
    """Return where each message's content begins and ends in the rendered text, without the blanks around it.

    The conversation is rendered once more with marks around the contents.
    """
    contents = {i: core for i, one in enumerate(fields) if (core := well_formed(one.get("content") or "").strip())}
    if any(map(_NONCHARACTERS.search, contents.values())):
        return {}
    marked = list(fields)
    for i, core in contents.items():
        text_of_i = well_formed(fields[i]["content"]).replace(core, _mark(i) + core + _END, 1)
        marked[i] = {**fields[i], "content": text_of_i}
    try:
        shown = render(marked)
    except DataError:
        return {}
    plain, last, spans, seen = b"", 0, {}, Counter[int]()
    for match in _MARKED.finditer(shown):
        plain, last = plain + shown[last : match.start()].encode(), match.end()
        number, core_bytes = int("".join(f"{ord(digit) - ord(_DIGITS):x}" for digit in match[1]), 16), match[2].encode()
        seen[number] += 1
        if match[2] == contents.get(number):
            spans[number] = (len(plain), len(plain) + len(core_bytes))
        plain += core_bytes
    if plain + shown[last:].encode() != text:  # the template looks at the contents
        return {}
    return {number: span for number, span in spans.items() if seen[number] == 1}


def _mark(number: int) -> str:
    return _BEGIN + "".join(chr(ord(_DIGITS) + int(digit, 16)) for digit in f"{number:x}")


def _within(ends: Ints, start: int, stop: int, text: bytes) -> Ints:
    """Return positions as offsets from `start`, -1 outside [start, stop]; the start is also where only blanks are left before it."""
    inside = (ends >= start) & (ends <= stop)
    found = np.where(inside, ends - start, -1)
    before = np.flatnonzero((ends >= 0) & (ends < start))
    if not (ends == start).any() and len(before) and not text[ends[before[-1]] : start].strip():
        found[before[-1]] = 0
    return found


def _after_blanks(text: bytes, position: int, string: bytes) -> int | None:
    """Return where the string begins in the text at the position or after blanks; None if it does not."""
    return next((at for at in (position, _skip_blanks(text, position)) if text.startswith(string, at)), None)


def _skip_blanks(text: bytes, position: int) -> int:
    while position < len(text) and text[position : position + 1].isspace():
        position += 1
    return position
