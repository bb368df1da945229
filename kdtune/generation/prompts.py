"""Read prompts from configs and files, and encode them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdtune.data.columns import text_column
from kdtune.data.messages import TEMPLATE_VARIABLES, TOOLS, Conversation, Message, parse_conversation, row_conversation
from kdtune.data.sources import read_json, read_lines
from kdtune.errors import DataError
from kdtune.log import get_logger
from kdtune.paths import user_path

if TYPE_CHECKING:
    # Only the type is needed; the tokenizer libraries take a while to import.
    from kdtune.tokenizers import Tokenizer

log = get_logger(__name__)

_SUFFIXES = (".txt", ".json", ".jsonl")


def read_prompts(path: str | Path) -> list[Conversation]:
    """Read the prompts of a file, each a conversation that waits for an answer.

    A .txt file has one per line. A row of a .json or .jsonl file has `messages` (a last turn of the assistant, the answer
    in a dataset, is dropped) and optionally `tools` and `chat_template_kwargs`, as for kdtune.data.chat_dataset; or
    `prompt`; or `instruction` and optionally an `input` that follows it.

    Raises:
        DataError: the file is missing, of another kind, holds no prompt, or has a row without one; the row is named.
    """
    file = user_path(path)
    if file.suffix not in _SUFFIXES:
        raise DataError(f"prompt_file={path}: a {', '.join(_SUFFIXES)} file expected")
    if not file.is_file():
        raise DataError(f"prompt_file={path}: no such file")
    if file.suffix == ".txt":
        found = [_question(line) for line in read_lines(str(file)) if line.strip()]
    else:
        rows = list(read_json([str(file)]))
        found = [_row_conversation(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
        if unread := dict.fromkeys(column for row in rows for column in row if column not in _columns_read(row)):
            log.warning("%s: columns that are not read: %s", path, ", ".join(unread))
    if not found:
        raise DataError(f"prompt_file={path}: holds no prompt")
    return found


def _columns_read(row: Mapping[str, Any]) -> tuple[str, ...]:
    if "messages" in row:
        return ("messages", TOOLS, TEMPLATE_VARIABLES)
    return ("prompt",) if "prompt" in row else ("instruction", "input")


def _question(text: str) -> Conversation:
    return Conversation([Message("user", text)])


def _row_conversation(row: Mapping[str, Any], place: str) -> Conversation:
    try:
        if "messages" in row:
            messages = parse_conversation(row["messages"], "openai")
            return row_conversation(row, messages[:-1] if messages[-1].role == "assistant" else messages)
        if "prompt" in row:
            return _question(text_column(row, "prompt"))
        if "instruction" in row:
            parts = [text_column(row, "instruction"), text_column(row, "input") if row.get("input") else ""]
            return _question("\n\n".join(filter(None, parts)))
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    raise DataError(f"{place}: columns {', '.join(row) or 'none'}; messages, prompt or instruction expected")


def encode_prompt(
    tokenizer: "Tokenizer", conversation: Conversation, *, system_prompt: str | None = None, chat: bool = True
) -> list[int]:
    """Return the ids of a conversation in the tokenizer's chat template, up to the start of the answer.

    Without `chat`, return those of the only message's text, after bos if transformers adds one.
    `system_prompt` is put first and replaces the conversation's own.

    Raises:
        DataError: there is no message, the last one is empty, or without `chat` there is more than one.
    """
    messages = conversation.messages
    if not messages or not (messages[-1].content or "").strip():
        raise DataError("the prompt is empty; give it some text")
    if chat:
        if system_prompt is not None:
            messages = [Message("system", system_prompt), *(each for each in messages if each.role != "system")]
        ids, _ = tokenizer.tokenize_messages(
            messages,
            add_generation_prompt=True,
            tools=conversation.tools,
            template_variables=conversation.template_variables,
        )
        return ids
    if len(messages) > 1 or system_prompt is not None:
        raise DataError("plain text (chat=false) has no place for several messages or a system prompt; use chat=true")
    if conversation.tools or conversation.template_variables:
        raise DataError("plain text (chat=false) has no place for tools or chat_template_kwargs; use chat=true")
    return tokenizer.encode(messages[0].content or "", add_bos=tokenizer.begins_with_bos, add_eos=False)
