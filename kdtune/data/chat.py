"""Conversations: single question and answer (instruct), and lists of messages (chat)."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Unpack

from kdtune.data.columns import (
    Row,
    any_column,
    check_column_map,
    suggest_chat_columns,
    suggest_question_columns,
    text_column,
)
from kdtune.data.conversation import Truncation, conversation_encoder
from kdtune.data.dataset import Dataset
from kdtune.data.messages import (
    CONVERSATION_STYLES,
    TEMPLATE_VARIABLES,
    TOOLS,
    Conversation,
    Message,
    parse_conversation,
    row_conversation,
)
from kdtune.data.rows import FilterFn, build_dataset
from kdtune.data.sources import Source, SourceOptions
from kdtune.errors import ConfigError
from kdtune.tokenizers.base import TrainOn

if TYPE_CHECKING:
    from kdtune.tokenizers import Tokenizer

_INSTRUCT_COLUMNS = ("input", "output")


def instruct_messages(
    column_map: Mapping[str, str] | None = None, new_system_prompt: str | None = None
) -> Callable[[Row], list[Message]]:
    """Return a function from a row to its messages: input from the user, output from the assistant."""
    columns = check_column_map(column_map, _INSTRUCT_COLUMNS)
    input_column, output = columns.get("input", "input"), columns.get("output", "output")
    system = _system(new_system_prompt)

    def to_messages(row: Row) -> list[Message]:
        return [
            *system,
            Message("user", text_column(row, input_column)),
            Message("assistant", text_column(row, output)),
        ]

    return to_messages


def chat_messages(
    conversation_column: str = "messages", conversation_style: str = "openai", new_system_prompt: str | None = None
) -> Callable[[Row], list[Message]]:
    """Return a function from a row to its conversation; new_system_prompt replaces the row's own system message.

    conversation_column, conversation_style: as for chat_dataset.

    Raises:
        ConfigError: conversation_style is unknown.
    """
    if conversation_style not in CONVERSATION_STYLES:
        raise ConfigError(
            f"conversation_style={conversation_style}: unknown; allowed: {', '.join(CONVERSATION_STYLES)}"
        )
    system = _system(new_system_prompt)

    def to_messages(row: Row) -> list[Message]:
        messages = parse_conversation(any_column(row, conversation_column), conversation_style)
        if system:
            messages = [*system, *(message for message in messages if message.role != "system")]
        return messages

    return to_messages


def instruct_dataset(
    tokenizer: "Tokenizer",
    *,
    source: str,
    column_map: Mapping[str, str] | None = None,
    train_on: TrainOn | None = None,
    train_on_input: bool | None = None,
    truncation: Truncation | None = None,
    new_system_prompt: str | None = None,
    filter_fn: FilterFn | str | None = None,
    **where: Unpack[SourceOptions],
) -> Dataset:
    """A dataset of questions and answers (columns input and output, or what column_map calls them).

    train_on: answers by default, unless train_on_input says otherwise. new_system_prompt: a system message put before
    each question. The other arguments and the errors are alpaca_dataset's.
    """
    to_messages = instruct_messages(column_map, new_system_prompt)
    encode = conversation_encoder(
        tokenizer,
        lambda row: Conversation(to_messages(row)),
        default="answers",
        train_on=train_on,
        train_on_input=train_on_input,
        truncation=truncation,
    )
    columns = [(column_map or {}).get(name, name) for name in _INSTRUCT_COLUMNS]
    suggest = suggest_question_columns(_INSTRUCT_COLUMNS)
    return build_dataset(encode, Source(source, **where), filter_fn, columns=columns, suggest=suggest, is_chat=True)


def chat_dataset(
    tokenizer: "Tokenizer",
    *,
    source: str,
    conversation_column: str = "messages",
    conversation_style: str = "openai",
    train_on: TrainOn | None = None,
    train_on_input: bool | None = None,
    truncation: Truncation | None = None,
    new_system_prompt: str | None = None,
    filter_fn: FilterFn | str | None = None,
    **where: Unpack[SourceOptions],
) -> Dataset:
    """Build a dataset of conversations: lists of role and content (openai) or from and value (sharegpt).

    A turn with `masked: true`, `train: false` or `weight: 0` is not trained on. Other fields of a turn, such as
    tool_calls or reasoning_content, are passed to the chat template, and so are the row's `tools` and
    `chat_template_kwargs` (a JSON object of further template variables).

    conversation_column: the column with the list; conversation_style: format of its turns, openai or sharegpt.
    new_system_prompt replaces the conversation's own system message. train_on: answers by default, unless train_on_input
    says otherwise. The other arguments and the errors are alpaca_dataset's.
    """
    to_messages = chat_messages(conversation_column, conversation_style, new_system_prompt)
    encode = conversation_encoder(
        tokenizer,
        lambda row: row_conversation(row, to_messages(row)),
        default="answers",
        train_on=train_on,
        train_on_input=train_on_input,
        truncation=truncation,
    )
    columns = (conversation_column, TOOLS, TEMPLATE_VARIABLES)
    return build_dataset(
        encode, Source(source, **where), filter_fn, columns=columns, suggest=suggest_chat_columns, is_chat=True
    )


def _system(prompt: str | None) -> list[Message]:
    return [] if prompt is None else [Message("system", prompt)]
