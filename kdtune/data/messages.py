"""One turn of a conversation, and conversations as datasets store them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdtune.errors import DataError
from kdtune.tokenizers.messages import MARKS, training_mark

ROLES = ("system", "user", "assistant", "tool", "ipython")

_SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "tool": "tool",
}  # fmt: skip
# Style -> (key of the role, key of the text, role as stored -> role).
_STYLES: dict[str, tuple[str, str, Mapping[str, str]]] = {
    "openai": ("role", "content", {role: role for role in ROLES}),
    "sharegpt": ("from", "value", _SHAREGPT_ROLES),
}
CONVERSATION_STYLES = tuple(_STYLES)

TOOLS, TEMPLATE_VARIABLES = "tools", "chat_template_kwargs"
"""Columns of a conversation's row that the chat template sees beside the messages."""


@dataclass(frozen=True)
class Message:
    """One turn.

    masked: a masked turn is never trained on, whatever the dataset's train_on says; None: the data do not say.
    content: None for an assistant's turn that holds only other fields.
    fields: other fields of the turn, such as tool_calls and reasoning_content, which the chat template sees.
    """

    role: str
    content: str | None
    masked: bool | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversation:
    """The turns of a conversation and its further template variables.

    tools: descriptions of the functions that the assistant may call, as JSON objects. template_variables: further names
    that the template looks at, such as enable_thinking.
    """

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None
    template_variables: Mapping[str, Any] | None = None


def type_name(value: object) -> str:
    """Return the name of a value's type for an error message about a file (None is 'null')."""
    return "null" if value is None else type(value).__name__


def read_json_text(value: Any, what: str) -> Any:
    """Return the value, parsed as JSON if it is text: columns of mixed types are often stored that way.

    Raises:
        DataError: the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is text that is not JSON: {value!r:.60} ({error})") from error


def parse_conversation(turns: object, style: str) -> list[Message]:
    """Parse a list of mappings into messages: role, content (openai) or from, value (sharegpt), and any other fields.

    The list may also be its JSON text, or a mapping of lists (how older versions of `datasets` stored it). `masked: true`,
    `train: false` and `weight: 0` keep a turn out of training. A field that is null counts as missing.

    Raises:
        DataError: it is not a list of such mappings, a role is unknown, or a mark is not yes or no.
    """
    turns = _rows(read_json_text(turns, "the conversation (a list of turns, or its JSON text)"))
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if isinstance(turns, list) else type_name(turns)
        raise DataError(f"a conversation must be a list of at least one turn: found {found}")
    return [_parse_turn(turn, number, style) for number, turn in enumerate(turns, start=1)]


def conversation_style_of(value: Any) -> str | None:
    """Return the style of a conversation that parse_conversation can read, or None."""
    try:
        turns = _rows(read_json_text(value, "")) if isinstance(value, str | list | Mapping) else None
    except DataError:
        return None
    first = turns[0] if isinstance(turns, list) and turns else None
    if not isinstance(first, Mapping):
        return None
    return next((style for style, (role, content, _) in _STYLES.items() if role in first and content in first), None)


def _rows(turns: object) -> object:
    """Turn a mapping of lists into a list of mappings; anything else is unchanged."""
    if not isinstance(turns, Mapping) or not turns or not all(isinstance(column, list) for column in turns.values()):
        return turns
    if len({len(column) for column in turns.values()}) > 1:
        lengths = ", ".join(f"{key} has {len(column)}" for key, column in turns.items())
        raise DataError(f"a conversation stored as lists must have as many entries in each: {lengths}")
    return [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]


def _parse_turn(turn: Any, number: int, style: str) -> Message:
    role_key, content_key, roles = _STYLES[style]
    if not isinstance(turn, Mapping) or role_key not in turn:
        found = f"keys {', '.join(map(str, turn))}" if isinstance(turn, Mapping) else type_name(turn)
        raise DataError(
            f"turn {number} must have the keys '{role_key}' and '{content_key}' "
            f"(conversation_style={style}): found {found}{_other_style(turn)}"
        )
    role, content = turn[role_key], turn.get(content_key)
    if role not in roles:
        raise DataError(f"turn {number} has an unknown {role_key}: {role!r}; allowed: {', '.join(roles)}")
    own = (role_key, content_key, *MARKS)
    fields = {str(key): value for key, value in turn.items() if key not in own and value is not None}
    for key in ("role", "content"):
        if key in fields:
            raise DataError(
                f"turn {number} has both '{key}' and '{role_key if key == 'role' else content_key}'; keep one of them"
            )
    if content_key in turn and content is None:
        fields["content"] = None  # null is not the same as missing: some templates ask for it
    if "tool_calls" in fields:
        fields["tool_calls"] = _tool_calls(fields["tool_calls"], number)
    if not isinstance(content, str) and not (content is None and roles[role] == "assistant" and any(fields.values())):
        if content_key not in turn:
            keys = ", ".join(map(str, turn))
            raise DataError(f"turn {number} has no '{content_key}' (conversation_style={style}): found keys {keys}")
        raise DataError(f"turn {number}: '{content_key}' must be text: found {type_name(content)}")
    try:
        mark = training_mark(turn)
    except DataError as error:
        raise DataError(f"turn {number}: {error}") from error
    return Message(roles[role], content, None if mark is None else not mark, fields)


def _other_style(turn: Any) -> str:
    style = conversation_style_of([turn])
    return "" if style is None else f"; set conversation_style={style}"


def _tool_calls(found: Any, number: int) -> Any:
    calls = read_json_text(found, f"turn {number}: tool_calls")
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise DataError(f"turn {number}: 'tool_calls' must be a list of objects: found {calls!r:.60}")
    return calls


def row_conversation(row: Mapping[str, Any], messages: Sequence[Message]) -> Conversation:
    """Return the messages of a row with its columns `tools` and `chat_template_kwargs`, if it has them.

    Raises:
        DataError: `tools` is not a list of objects, or `chat_template_kwargs` no object.
    """
    return Conversation(messages, _tools(row.get(TOOLS)), _template_variables(row.get(TEMPLATE_VARIABLES)))


def _tools(found: Any) -> list[Any] | None:
    tools = read_json_text(found, f"column '{TOOLS}'")
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"column '{TOOLS}' must hold a list of JSON objects, one a function: found {tools!r:.60}")
    return tools


def _template_variables(found: Any) -> dict[str, Any] | None:
    variables = read_json_text(found, f"column '{TEMPLATE_VARIABLES}'")
    if variables is None:
        return None
    if not isinstance(variables, Mapping):
        raise DataError(f"column '{TEMPLATE_VARIABLES}' must hold a JSON object: found {type_name(variables)}")
    if taken := [key for key in ("messages", "tools", "add_generation_prompt") if key in variables]:
        raise DataError(f"column '{TEMPLATE_VARIABLES}' must not set {', '.join(taken)}: the row itself does")
    return {str(key): value for key, value in variables.items()}
