"""Prompts without answers, for runs in which a model writes the answers."""

from typing import TYPE_CHECKING, Literal, Unpack

from kdtune.data.alpaca import PROMPTS
from kdtune.data.columns import Row, Suggestion, any_column, suggest_conversation_column, suggest_prompt_column
from kdtune.data.dataset import Dataset
from kdtune.data.messages import (
    CONVERSATION_STYLES,
    TEMPLATE_VARIABLES,
    TOOLS,
    Conversation,
    Message,
    parse_conversation,
    row_conversation,
    type_name,
)
from kdtune.data.rows import FilterFn, build_dataset
from kdtune.data.sources import Source, SourceOptions
from kdtune.data.transforms import EncodedRow, pair_of
from kdtune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from kdtune.tokenizers import Tokenizer


def prompts_dataset(
    tokenizer: "Tokenizer",
    *,
    source: str,
    column: str = "prompt",
    input_column: str | None = None,
    prompt: Literal["plain", "alpaca"] = "plain",
    conversation_style: str = "openai",
    new_system_prompt: str | None = None,
    filter_fn: FilterFn | str | None = None,
    **where: Unpack[SourceOptions],
) -> Dataset:
    """Build a dataset of prompts alone, for runs that learn from what a model writes after them (docs/regimes.md), and `write_answers`.

    An example is the conversation up to the answer, in the tokenizer's chat template; nothing of it is trained on.

    column: holds a text, the user's message, or a conversation that ends before an answer: with the turn of a user or a tool.
    input_column: a text, or null, that belongs to the message. prompt: "plain" for the text with that below it, or "alpaca" for
    Alpaca's wording around them. conversation_style: of a conversation's turns, openai or sharegpt; such a row's `tools` and
    `chat_template_kwargs` are as for chat_dataset. new_system_prompt: a system message in place of the conversation's own.
    filter_fn: a function, or its dotted path, that returns whether to keep a row.
    source and the rest (split, data_files, data_dir, name, streaming, shuffle_buffer, route_column): see Source.

    A prompt that leaves no token of the tokenizer's max_seq_len for an answer is left out.

    Raises:
        ConfigError: settings contradict each other.
        DataError: the source cannot be read, a row cannot be used, or nothing is left.
    """
    if pair_of(tokenizer) is not None:
        raise ConfigError(
            "prompts_dataset: a teacher with another tokenizer compares given texts, which have answers; choose another kd_loss, or dataset"
        )
    if prompt not in PROMPTS:
        raise ConfigError(f"prompts_dataset: prompt={prompt}; allowed are {', '.join(PROMPTS)}")
    if conversation_style not in CONVERSATION_STYLES:
        raise ConfigError(
            f"conversation_style={conversation_style}: unknown; allowed: {', '.join(CONVERSATION_STYLES)}"
        )

    def encode(row: Row) -> EncodedRow | None:
        found = any_column(row, column)
        if isinstance(found, str):
            beside = None if input_column is None else any_column(row, input_column)
            if not isinstance(beside, str | None):
                raise DataError(f"column '{input_column}' must hold text, or null: found {type_name(beside)}")
            conversation = Conversation([Message("user", PROMPTS[prompt](found, beside or ""))])
        else:
            conversation = row_conversation(row, _unanswered(parse_conversation(found, conversation_style), column))
        messages = list(conversation.messages)
        if new_system_prompt is not None:
            messages = [Message("system", new_system_prompt), *(one for one in messages if one.role != "system")]
        ids, _ = tokenizer.tokenize_messages(
            messages,
            add_generation_prompt=True,
            tools=conversation.tools,
            template_variables=conversation.template_variables,
        )
        if tokenizer.max_seq_len is not None and len(ids) >= tokenizer.max_seq_len:
            return None
        return EncodedRow(ids, [False] * len(ids))

    columns = [name for name in (column, input_column, TOOLS, TEMPLATE_VARIABLES) if name is not None]
    return build_dataset(
        encode, Source(source, **where), filter_fn, columns=columns, suggest=_suggest, is_chat=True, is_prompts=True
    )


def _unanswered(messages: list[Message], column: str) -> list[Message]:
    if messages[-1].role == "assistant":
        raise DataError(
            f"column '{column}': the conversation ends with the assistant's turn; a prompt ends before it. Rows with answers are for "
            "kdtune.data.chat_dataset, whose answers a model may replace too"
        )
    if messages[-1].role == "system":
        raise DataError(
            f"column '{column}': the conversation ends with the system's turn; a prompt ends with the turn of a user or a tool. Add the "
            "user's turn, or leave such rows out with filter_fn"
        )
    return messages


def _suggest(row: Row) -> Suggestion:
    if conversation := suggest_conversation_column(row):
        return {"column": conversation["conversation_column"], "conversation_style": conversation["conversation_style"]}
    return suggest_prompt_column(row)
