"""Base class of the tokenizers: chat rendering, special tokens, training masks."""

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from kdtune.errors import CheckpointError, ConfigError, DataError
from kdtune.tokenizers.chat_format import (
    asks_date,
    check_date,
    check_template,
    check_variables,
    family_template,
    folder_templates,
    render_chat,
    save_template,
    template_file,
)
from kdtune.tokenizers.chat_regions import (
    SpecialToken,
    SpecialTokenMatcher,
    answer_spans,
    message_span,
    protect,
    split_pieces,
)
from kdtune.tokenizers.folder import generation_eos_ids
from kdtune.tokenizers.messages import Messages, is_masked, left_out, message_fields

# Special tokens that end a turn or a document in the families we know; a tokenizer stops at those that it has.
END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")

# Headers and system prompts recur in every example: ids of short texts are kept, this many of up to this length.
_CACHE_SIZE = 4096
_CACHE_MAX_CHARS = 128

_LONGEST_CONTROL_TOKEN = 1000

TrainOn: TypeAlias = Literal["last", "answers", "all"]
"""Training targets of a conversation: its last answer, all of the assistant's answers, or everything."""


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a tokenizer: their strings and roles.

    `named` holds bos_token, eos_token, pad_token, ... as chat templates name them. `lstrip` and `rstrip` list tokens that
    absorb the whitespace beside them.
    """

    ids: Mapping[str, int]
    named: Mapping[str, str]
    lstrip: Collection[str] = ()
    rstrip: Collection[str] = ()

    def id_of(self, name: str) -> int | None:
        """Return the id of a named token, None if the tokenizer has none."""
        token = self.named.get(name)
        return None if token is None else self.ids.get(token)


def well_formed(text: str) -> str:
    """Replace lone surrogates, which no tokenizer can encode: join pairs to characters, others become U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def check_special_tokens(tokens: Iterable[str], origin: Path | str) -> None:
    """Raise if a special token cannot be searched for in texts: it must be valid text, and short.

    Raises:
        CheckpointError: one of them is too long, or holds lone surrogates.
    """
    for token in tokens:
        if len(token) > _LONGEST_CONTROL_TOKEN or well_formed(token) != token:
            raise CheckpointError(
                f"{origin}: the special token {reprlib.repr(token)} ({len(token)} characters) is none: at most "
                f"{_LONGEST_CONTROL_TOKEN} characters of well-formed text expected; download the tokenizer again"
            )


class Tokenizer(ABC):
    """Convert text to token ids and back, and conversations to ids with their training targets.

    Subclasses implement `_encode_text`, `_decode_ids` and `_save_files`. `max_seq_len` is only stored: datasets truncate.

    vocab_size: number of ids, including those that no text encodes to. bos_id, eos_id, pad_id: None if the model has none.
    special: the special tokens by text. folder: where its chat templates and further ids that end an answer are read from.
    chat_template: the Jinja template of conversations, instead of the folder's. origin: path it was read from, for messages.
    """

    def __init__(
        self,
        special: SpecialTokens,
        *,
        vocab_size: int,
        pad_id: int | None = None,
        max_seq_len: int | None = None,
        folder: Path | None = None,
        chat_template: str | None = None,
        origin: Path | str = "tokenizer",
    ) -> None:
        if max_seq_len is not None and (type(max_seq_len) is not int or max_seq_len < 1):
            raise ConfigError(
                f"tokenizer.max_seq_len={max_seq_len!r}: must be a positive integer (tokens), or null for no limit"
            )
        self.max_seq_len = max_seq_len
        check_special_tokens(special.ids, origin)
        self.vocab_size = vocab_size
        """Number of ids that can occur: the largest one plus 1."""
        self.special_tokens = dict(special.ids)
        self.bos_id = special.id_of("bos_token")
        self.eos_id = special.id_of("eos_token")
        found_pad = special.id_of("pad_token") if pad_id is None else pad_id
        # Padding is never attended to nor trained on, so any id will do where the tokenizer names none.
        self.pad_id: int = next(i for i in (found_pad, self.eos_id, 0) if i is not None)
        ends = {special.ids[token] for token in END_TOKENS if token in special.ids}
        if self.eos_id is not None:
            ends.add(self.eos_id)
        self.folder = folder
        own, self.tool_template = (None, None) if folder is None else folder_templates(folder)
        """The chat template of conversations with tools, if it is a different one."""
        given = own if chat_template is None else chat_template
        self.chat_template = family_template(special.ids) if given is None else given
        self._template_file = template_file(origin)
        for template in filter(None, (self.chat_template, self.tool_template)):
            check_template(template, origin=self._template_file)
        self._named = {"bos_token": "", "eos_token": "", **special.named}
        self._finder = SpecialTokenMatcher(special.ids, lstrip=special.lstrip, rstrip=special.rstrip)
        self._cache: dict[tuple[str, int | None], list[int]] = {}
        self._date: str | None = None
        self._variables: dict[str, Any] = {}
        self._answer_ends = self._find_answer_ends()
        extra = frozenset() if folder is None else generation_eos_ids(folder)
        self.stop_ids = frozenset(ends | extra | self._answer_ends)

    pair: Any = None
    """A `kdtune.data.TokenizerPair` has itself here: a dataset then makes its examples for both of its tokenizers."""

    @abstractmethod
    def _encode_text(self, text: str, previous: int | None) -> list[int]:
        """Return ids of well-formed text without special tokens; `previous` is the id before it, None at the very start."""

    @abstractmethod
    def _decode_ids(self, ids: Sequence[int], skip_special: bool) -> str:
        """Return the text of ids that all lie in the vocabulary."""

    def token_bytes(self) -> list[bytes | None]:
        """Return the UTF-8 bytes that each id stands for inside a text; None for a special token and an id without text.

        A token may be part of a character. Cross-tokenizer losses need this; a subclass of your own implements it.

        Raises:
            ConfigError: the tokenizer does not know them.
        """
        raise ConfigError(
            f"tokenizer: {type(self).__name__} does not say which bytes its ids stand for (`token_bytes`), which a "
            "cross-tokenizer loss needs; implement it, or choose another kd_loss"
        )

    @abstractmethod
    def _save_files(self, folder: Path) -> None:
        """Write the tokenizer's files into `folder`, as transformers' AutoTokenizer reads them."""

    def save(self, folder: Path, *, is_chat: bool = False) -> None:
        """Write the tokenizer's files into `folder`, as transformers' AutoTokenizer reads them.

        is_chat: the model in the folder was trained on conversations. The chat template is then saved too, even if the
        tokenizer's own files lack it.
        """
        self._save_files(folder)
        if is_chat:
            save_template(folder, self.chat_template, self._named)

    @property
    def date(self) -> str | None:
        """The day (YYYY-MM-DD) given to a chat template that asks for it; None: the current time."""
        return self._date

    @date.setter
    def date(self, date: str | None) -> None:
        self._date = None if date is None else check_date(date, "tokenizer.date")

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        """Variables that every conversation's chat template is given, unless the conversation has its own of that name."""
        return self._variables

    @chat_template_kwargs.setter
    def chat_template_kwargs(self, variables: Mapping[str, Any]) -> None:
        check_variables(variables, filter(None, (self.chat_template, self.tool_template)), origin=self._template_file)
        self._variables = dict(variables)

    @property
    def asks_date(self) -> bool:
        """True if the chat template may print the date, so that token ids depend on the day."""
        return any(map(asks_date, filter(None, (self.chat_template, self.tool_template))))

    def trained_stop_ids(self, *, is_chat: bool) -> frozenset[int]:
        """Return the ids that end trained sequences: eos, and for conversations (`is_chat`) the token after an answer."""
        eos = frozenset() if self.eos_id is None else frozenset({self.eos_id})
        return eos | self._answer_ends if is_chat else eos

    def _find_answer_ends(self) -> frozenset[int]:
        """Return the special token that the chat template puts after an answer, if any."""
        answer = "answer"
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
        try:
            text = self._render(messages, False)
        except DataError:  # a template of one task only; what it refuses is told when it is used
            return frozenset()
        at = text.rfind(answer)
        after = [] if at < 0 else self._finder.find(text[at:])
        return frozenset(special.token for special in after[:1])

    def encode(self, text: str, *, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Return the ids of the text. Special-token strings in it stay text; a bos or eos the tokenizer lacks adds nothing."""
        ids = self._encode_text(well_formed(text), None) if text else []
        if add_bos and self.bos_id is not None:
            ids = [self.bos_id, *ids]
        if add_eos and self.eos_id is not None:
            ids = [*ids, self.eos_id]
        return ids

    @property
    def begins_with_bos(self) -> bool:
        """Return whether transformers, with this tokenizer's files, adds bos to every text."""
        return self.bos_id is not None

    def encode_rendered(self, text: str) -> list[int]:
        """Return ids of text whose special-token strings are special tokens, such as `render` returns; adds no bos, no eos."""
        ids: list[int] = []
        for piece in split_pieces(text, self._finder.find(text), ()):
            if piece.token is None:
                ids += self._encode_cached(text[piece.start : piece.end], ids[-1] if ids else None)
            else:
                ids.append(piece.token)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of the ids. Ids outside the vocabulary (padding rows of a model's head) give no text."""
        return self._decode_ids([i for i in map(int, ids) if 0 <= i < self.vocab_size], skip_special)

    def render(
        self,
        messages: Sequence[Any],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render the conversation as text, byte-identical to transformers' `apply_chat_template(tokenize=False)`.

        tools: passed to the template as `tools`; template_variables: further variables of the template.

        Raises:
            DataError: a message without role or content, or one that the template refuses.
        """
        fields = [message_fields(message, i) for i, message in enumerate(messages)]
        return self._render(fields, add_generation_prompt, tools, template_variables)

    def left_out(
        self,
        messages: Sequence[Any],
        *,
        tools: Sequence[Any] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """List the parts of a conversation that the chat template omits or changes; see messages.left_out.

        Raises:
            DataError: as `render`.
        """
        fields = [message_fields(message, i) for i, message in enumerate(messages)]
        found = left_out(fields, tools, lambda some, of: self._render(some, False, of, template_variables))
        return found + [name for name in template_variables or {} if name not in self._template(tools)]

    def _render(
        self,
        messages: Messages,
        add_generation_prompt: bool,
        tools: Sequence[Any] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> str:
        return render_chat(
            self._template(tools),
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self._named,
            tools=tools,
            variables={**self._variables, **(template_variables or {})},
            date=self._date,
            origin=self._template_file,
        )

    def _template(self, tools: Sequence[Any] | None) -> str:
        return self.chat_template if tools is None or self.tool_template is None else self.tool_template

    def tokenize_messages(
        self,
        messages: Sequence[Any],
        *,
        add_generation_prompt: bool = False,
        train_on: TrainOn = "answers",
        tools: Sequence[Any] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of the conversation, and for each whether it is a training target.

        Special tokens that the template writes become their ids; the same strings inside messages and tools stay text.
        Targets are the assistant's answers with their end-of-turn token ("answers"), the last of them ("last") or
        everything ("all"); a masked message is never a target. Text is split where an answer starts, so the ids of
        a prompt (`add_generation_prompt=True`) are a prefix of the conversation's ids, where its text is one. bos occurs only where
        the template prints it. `tools` and `template_variables` as for `render`.

        Raises:
            DataError: the template refuses a message or conversation, or the start of an answer cannot be found in its
                output (see `answer_spans`).
        """
        fields = [message_fields(message, i) for i, message in enumerate(messages)]
        masked = {i for i, message in enumerate(messages) if is_masked(message)}
        (shown, shown_tools, variables), mark = protect((fields, tools, template_variables), self._finder)

        def render(some: Messages, generation_prompt: bool) -> str:
            return self._render(some, generation_prompt, shown_tools, variables)

        text = render(shown, add_generation_prompt)
        if mark and text.replace(mark, "") != self._render(fields, add_generation_prompt, tools, template_variables):
            raise DataError(
                "a message holds a special-token string that the chat template looks at, so it cannot be kept as text "
                f"(known: {', '.join(sorted(self.special_tokens)[:8])}, ...); take it out of the data"
            )
        specials = self._finder.find(text)
        answers = answer_spans(
            text, specials, shown, stop_ids=self.stop_ids, render=render, add_generation_prompt=add_generation_prompt
        )
        if train_on == "all":
            hidden = [message_span(text, shown, i, render=render) for i in sorted(masked)]
            chosen = _complement(hidden, len(text))
        else:
            wanted = answers if train_on == "answers" else list(answers)[-1:]
            chosen = [answers[i] for i in wanted if i not in masked]
        return self._encode_pieces(text, mark, specials, {*answers.values()}, chosen)

    def _encode_pieces(
        self,
        text: str,
        mark: str,
        specials: Sequence[SpecialToken],
        answers: Collection[tuple[int, int]],
        chosen: Sequence[tuple[int, int]],
    ) -> tuple[list[int], list[bool]]:
        """Encode a rendered text, split where an answer or a trained span begins or ends; also return whether each id is trained."""
        cuts = {edge for span in (*answers, *chosen) for edge in span}
        ids: list[int] = []
        trained: list[bool] = []
        for piece in split_pieces(text, specials, cuts):
            if piece.token is None:
                shown_text = text[piece.start : piece.end]
                new = self._encode_cached(
                    shown_text.replace(mark, "") if mark else shown_text, ids[-1] if ids else None
                )
            else:
                new = [piece.token]
            ids += new
            trained += [any(start <= piece.start < end for start, end in chosen)] * len(new)
        return ids, trained

    def _encode_cached(self, text: str, previous: int | None) -> list[int]:
        if not text:
            return []
        if len(text) > _CACHE_MAX_CHARS:
            return self._encode_text(well_formed(text), previous)
        key = (text, previous)
        ids = self._cache.get(key)
        if ids is None:
            ids = self._encode_text(well_formed(text), previous)
            if len(self._cache) < _CACHE_SIZE:
                self._cache[key] = ids
        return ids


def _complement(spans: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """Return the parts of [0, length) outside the given spans, which are sorted and do not overlap."""
    starts = [0, *(end for _, end in spans)]
    ends = [*(start for start, _ in spans), length]
    return list(zip(starts, ends, strict=True))
