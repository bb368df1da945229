"""Conversations: single question and answer (instruct), and lists of messages (chat)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Unpack

from kdtune.data.columns import (
    Row,
    any_column,
    check_column_map,
    suggest_chat_columns,
    suggest_question_columns,
    text_column,
)
from kdtune.data.conversation import ConversationOptions, conversation_dataset
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
from kdtune.errors import ConfigError

if TYPE_CHECKING:
    from kdtune.tokenizers import Tokenizer

_INSTRUCT_COLUMNS = ("input", "output")


def instruct_dataset(
    tokenizer: "Tokenizer",
    *,
    source: str,
    column_map: Mapping[str, str] | None = None,
    new_system_prompt: str | None = None,
    **options: Unpack[ConversationOptions],
) -> Dataset:
    """A dataset of questions and answers (columns input and output, or what column_map calls them).

    train_on: answers by default, unless train_on_input says otherwise. new_system_prompt: a system message put before
    each question. The other arguments and the errors are alpaca_dataset's.
    """
    columns = check_column_map(column_map, _INSTRUCT_COLUMNS)
    question, answer = (columns.get(name, name) for name in _INSTRUCT_COLUMNS)
    system = _system(new_system_prompt)

    def to_conversation(row: Row) -> Conversation:
        messages = [Message("user", text_column(row, question)), Message("assistant", text_column(row, answer))]
        return Conversation([*system, *messages])

    return conversation_dataset(
        tokenizer,
        to_conversation,
        source,
        default="answers",
        columns=(question, answer),
        suggest=suggest_question_columns(_INSTRUCT_COLUMNS),
        **options,
    )


def chat_dataset(
    tokenizer: "Tokenizer",
    *,
    source: str,
    conversation_column: str = "messages",
    conversation_style: str = "openai",
    new_system_prompt: str | None = None,
    **options: Unpack[ConversationOptions],
) -> Dataset:
    """Build a dataset of conversations: lists of role and content (openai) or from and value (sharegpt).

    A turn with `masked: true`, `train: false` or `weight: 0` is not trained on. Other fields of a turn, such as
    tool_calls or reasoning_content, are passed to the chat template, and so are the row's `tools` and
    `chat_template_kwargs` (a JSON object of further template variables).

    conversation_column: the column with the list; conversation_style: format of its turns, openai or sharegpt.
    new_system_prompt replaces the conversation's own system message. train_on: answers by default, unless train_on_input
    says otherwise. The other arguments and the errors are alpaca_dataset's.
    """
    if conversation_style not in CONVERSATION_STYLES:
        raise ConfigError(
            f"conversation_style={conversation_style}: unknown; allowed: {', '.join(CONVERSATION_STYLES)}"
        )
    system = _system(new_system_prompt)

    def to_conversation(row: Row) -> Conversation:
        messages = parse_conversation(any_column(row, conversation_column), conversation_style)
        if system:
            messages = [*system, *(message for message in messages if message.role != "system")]
        return row_conversation(row, messages)

    return conversation_dataset(
        tokenizer,
        to_conversation,
        source,
        default="answers",
        columns=(conversation_column, TOOLS, TEMPLATE_VARIABLES),
        suggest=suggest_chat_columns,
        **options,
    )


def _system(prompt: str | None) -> list[Message]:
    return [] if prompt is None else [Message("system", prompt)]
