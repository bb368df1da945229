"""Tokenize conversations: mark what is trained on, and truncate those that are too long."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

from kdtune.data.columns import Row
from kdtune.data.messages import Conversation, Message
from kdtune.data.transforms import Encoded, EncodedRow, end_ids, truncate
from kdtune.errors import ConfigError
from kdtune.tokenizers.base import TrainOn

if TYPE_CHECKING:
    from kdtune.tokenizers import Tokenizer

Truncation: TypeAlias = Literal["turns", "right", "drop"]


class TrainingOptions(TypedDict, total=False):
    """Arguments of the conversation builders other than the source.

    train_on: the last answer, all of the assistant's answers, or everything; a masked turn is never trained on.
    train_on_input: torchtune's name for it: true means train_on=all, false train_on=answers.
    truncation: treatment of an example longer than the tokenizer's max_seq_len. "turns": drop the oldest exchanges (a
    user's turn and what follows it), keep the system message; an example whose last exchange alone does not fit is
    dropped. "right": keep the first max_seq_len tokens, possibly with a partial answer. "drop": drop the example.
    null: turns, or right if train_on is all.
    """

    train_on: TrainOn | None
    train_on_input: bool | None
    truncation: Truncation | None


class _Beside(TypedDict):
    tools: Sequence[Any] | None
    template_variables: Mapping[str, Any] | None


def chosen_train_on(train_on: TrainOn | None, train_on_input: bool | None, default: TrainOn) -> TrainOn:
    """Resolve which turns are trained on from the two keys that can set it.

    Raises:
        ConfigError: the two contradict each other, or train_on is unknown.
    """
    if train_on not in (None, "last", "answers", "all"):
        raise ConfigError(f"train_on={train_on}: unknown; allowed: last, answers, all")
    if train_on_input is None:
        return train_on or default
    if train_on is None:
        return "all" if train_on_input else "answers"
    if train_on_input != (train_on == "all"):
        raise ConfigError(
            f"train_on={train_on}, train_on_input={str(train_on_input).lower()}: contradict each other (true is "
            "train_on=all, false is train_on=answers); remove one of the two, such as ~dataset.train_on"
        )
    return train_on


def conversation_encoder(
    tokenizer: "Tokenizer",
    to_conversation: Callable[[Row], Conversation],
    *,
    default: TrainOn,
    train_on: TrainOn | None = None,
    train_on_input: bool | None = None,
    truncation: Truncation | None = None,
) -> Callable[[Row], EncodedRow | None]:
    """Return a function that tokenizes a row by the chat template: token ids and training flags, truncated to fit.

    The function returns None for a row that does not fit. A dataset made with it has `is_chat` True (see `Dataset`).

    to_conversation: turns a row into a conversation.
    The other arguments are those of TrainingOptions; `default` is train_on if neither key sets it.

    Raises:
        ConfigError: train_on and train_on_input contradict each other, or a value is unknown.
    """
    chosen = chosen_train_on(train_on, train_on_input, default)
    if truncation not in (None, "turns", "right", "drop"):
        raise ConfigError(f"truncation={truncation}: unknown; allowed: turns, right, drop")
    cut = truncation or ("right" if chosen == "all" else "turns")
    room = tokenizer.max_seq_len

    def encode(row: Row) -> EncodedRow | None:
        conversation = to_conversation(row)
        beside: _Beside = {"tools": conversation.tools, "template_variables": conversation.template_variables}

        def tokens_of(messages: Sequence[Message]) -> Encoded:
            return tokenizer.tokenize_messages(messages, train_on=chosen, **beside)

        ids, trained = tokens_of(conversation.messages)
        remarks = [
            *(f"the chat template leaves out {name}" for name in tokenizer.left_out(conversation.messages, **beside)),
            *_unheeded_marks(conversation.messages, chosen),
        ]
        if room is None or len(ids) <= room:
            return EncodedRow(ids, trained, remarks=remarks)
        if cut == "right":
            return EncodedRow(*truncate(ids, trained, room, end_ids(tokenizer)), truncated=True, remarks=remarks)
        shortest = None if cut == "drop" else _fitting(tokens_of, conversation.messages, room)
        return None if shortest is None else EncodedRow(*shortest, truncated=True, remarks=remarks)

    return encode


def _unheeded_marks(messages: Sequence[Message], train_on: TrainOn) -> list[str]:
    """Describe a mark that asks to train on a turn which train_on excludes; such a mark has no effect. Masks always hold."""
    if train_on == "all" or all(message.masked is not False or message.role == "assistant" for message in messages):
        return []
    return [f"train_on={train_on} leaves out turns of others than the assistant that are marked as trained on"]


def _fitting(
    tokens_of: Callable[[Sequence[Message]], Encoded], messages: Sequence[Message], room: int
) -> Encoded | None:
    """Drop the turns after the last answer and as few of the oldest exchanges as needed to fit."""
    shorter = list(_shorter(messages))
    # Every one is shorter than the one before it: the first that fits is found without tokenizing all of them.
    index = bisect_left(shorter, True, key=lambda some: len(tokens_of(some)[0]) <= room)
    return tokens_of(shorter[index]) if index < len(shorter) else None


def _shorter(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=len(messages) - 1)
    kept = messages[: last + 1]
    start = next((i for i, message in enumerate(kept) if message.role != "system"), len(kept))
    if len(kept) < len(messages):
        yield kept
    for i, message in enumerate(kept):
        if i > start and message.role == "user":
            yield [*kept[:start], *kept[i:]]
