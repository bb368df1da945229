"""One turn of a conversation, and conversations as datasets store them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kdtune.errors import DataError

ROLES = ("system", "user", "assistant", "tool", "ipython")
ConversationStyle = Literal["openai", "sharegpt"]

_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
# Style -> (key of the role, key of the text, role as stored -> role).
_STYLES: dict[str, tuple[str, str, Mapping[str, str]]] = {
    "openai": ("role", "content", {role: role for role in ROLES}),
    "sharegpt": ("from", "value", _SHAREGPT_ROLES),
}
CONVERSATION_STYLES = tuple(_STYLES)


@dataclass(frozen=True)
class Message:
    """One turn. A masked turn is never trained on, whatever the dataset's train_on_input says."""

    role: str
    content: str
    masked: bool = False


def type_name(value: object) -> str:
    """How an error message calls the type of a value read from a file (None is 'null')."""
    return "null" if value is None else type(value).__name__


def parse_conversation(turns: object, style: str) -> list[Message]:
    """The messages of a list of mappings: role, content (openai) or from, value (sharegpt), and optionally masked.

    Raises:
        DataError: it is not a list of such mappings, or a role is unknown.
    """
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if isinstance(turns, list) else type_name(turns)
        raise DataError(f"a conversation must be a list of at least one turn: found {found}")
    return [_parse_turn(turn, number, style) for number, turn in enumerate(turns, start=1)]


def _parse_turn(turn: Any, number: int, style: str) -> Message:
    role_key, content_key, roles = _STYLES[style]
    if not isinstance(turn, Mapping) or role_key not in turn or content_key not in turn:
        found = f"keys {', '.join(map(str, turn))}" if isinstance(turn, Mapping) else type_name(turn)
        raise DataError(
            f"turn {number} must have the keys '{role_key}' and '{content_key}' "
            f"(conversation_style={style}): found {found}"
        )
    role, content, masked = turn[role_key], turn[content_key], turn.get("masked")
    if role not in roles:
        raise DataError(f"turn {number} has an unknown {role_key}: {role!r}; allowed: {', '.join(roles)}")
    if not isinstance(content, str):
        raise DataError(f"turn {number}: '{content_key}' must be text: found {type_name(content)}")
    if not isinstance(masked, bool | None):
        raise DataError(f"turn {number}: 'masked' must be true or false: found {type_name(masked)}")
    return Message(roles[role], content, bool(masked))
