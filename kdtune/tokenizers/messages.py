"""One turn of a conversation, as chat templates and training masks see it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from kdtune.errors import DataError

MARKS = ("masked", "weight", "train")
"""Keys of a turn that say whether it is trained on; the chat template does not see them."""

# transformers hands a turn's reasoning to the template under the first two names, whichever of the three the turn has.
_REASONING = ("reasoning_content", "thinking", "reasoning")

Messages = Sequence[Mapping[str, Any]]


def training_mark(turn: Mapping[str, Any]) -> bool | None:
    """Return whether a turn's `masked`, `train` or `weight` asks to train on it; None without them.

    Raises:
        DataError: a mark is neither yes nor no (weights between 0 and 1 are not supported), or two of them differ.
    """
    said: dict[str, bool] = {}
    for key, yes, no, allowed in (
        ("masked", (False,), (True,), "true or false"),
        ("train", (True,), (False,), "true or false"),
        ("weight", (1,), (0,), "0 or 1 (a turn is trained on or it is not)"),
    ):
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, bool if key != "weight" else bool | int | float) or value not in (*yes, *no):
            raise DataError(f"'{key}' must be {allowed}: found {value!r}")
        said[key] = value in yes
    if len(set(said.values())) > 1:
        raise DataError(f"{' and '.join(f'{key}={turn[key]!r}' for key in said)} contradict each other; keep one")
    return next(iter(said.values()), None)


def is_masked(message: Any) -> bool:
    """Return whether a message is kept out of training (False by default)."""
    if isinstance(message, Mapping):
        return training_mark(message) is False
    return bool(getattr(message, "masked", False))


def message_fields(message: Any, index: int = 0) -> dict[str, Any]:
    """Return the message as the dict a chat template sees: role, content and any other fields, but none of MARKS.

    `message` is a mapping, or an object with role, content and optionally a mapping `fields`. Reasoning is passed under
    transformers' names. An assistant's turn may lack content if it has other fields, such as tool_calls.

    Raises:
        DataError: role or content is missing or no string.
    """
    if isinstance(message, Mapping):
        fields = {key: value for key, value in message.items() if key not in MARKS}
    else:
        found = {key: getattr(message, key, None) for key in ("role", "content")}
        fields = {key: value for key, value in found.items() if value is not None} | dict(
            getattr(message, "fields", {})
        )
    if not isinstance(fields.get("role"), str):
        raise DataError(f"messages[{index}].role: found {fields.get('role')!r}; want a string")
    content = fields.get("content")
    holds_more = fields["role"] == "assistant" and any(fields[key] for key in fields.keys() - {"role", "content"})
    if not (isinstance(content, str) or (content is None and holds_more)):
        raise DataError(f"messages[{index}].content: found {content!r}; want a string")
    reasoning = next((fields[key] for key in _REASONING if fields.get(key) is not None), None)
    return fields if reasoning is None else {"thinking": reasoning, **fields, "reasoning_content": reasoning}


def strings(value: Any) -> Iterator[str]:
    """Yield every string in a value of plain data, at any depth, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def map_strings(value: Any, change: Callable[[str, bool], str], *, is_key: bool = False) -> Any:
    """Return the value with every string in it changed by change(string, is_key), is_key being true for a mapping's key."""
    if isinstance(value, str):
        return change(value, is_key)
    if isinstance(value, Mapping):
        return {map_strings(key, change, is_key=True): map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(item, change) for item in value]
    return value


def left_out(
    messages: Messages, tools: Sequence[Any] | None, render: Callable[[Messages, Sequence[Any] | None], str]
) -> list[str]:
    """List the parts of a conversation missing from its rendered text, each once, such as "tool_calls" or "text of system turns".

    A text counts as present if the rendering contains it unchanged (except for blanks around it) or as JSON. Any other
    field counts as present if the rendering without it differs.

    Raises:
        DataError: the template prints a content of null as the word None.
    """
    text = render(messages, tools)
    nulls = [i for i, message in enumerate(messages) if message.get("content", "") is None]
    if nulls and "None" in text:
        emptied = [message if i not in nulls else {**message, "content": ""} for i, message in enumerate(messages)]
        if render(emptied, tools).count("None") < text.count("None"):
            raise DataError(
                f"messages[{nulls[0]}].content is null, which the chat template prints as the word None; take the key out "
                "of the turn, or give it an empty text"
            )
    found: dict[str, None] = {}
    position = 0
    for message in messages:
        content = (message.get("content") or "").strip()
        at = text.find(content, position)
        if at >= 0:
            position = at + len(content)
        elif not _is_printed(content, text):
            found[f"text of {message['role']} turns, in whole or in part"] = None
    for key in dict.fromkeys(key for message in messages for key in message):
        # `thinking` is the template's second name for the reasoning, see message_fields.
        if key not in ("role", "content", "thinking") and _lacks(key, messages, tools, text, render):
            found[key] = None
    if tools and render(messages, None) == text:
        found["tools"] = None
    if any(_is_quoted(call, text) for message in messages for call in message.get("tool_calls") or ()):
        found["that arguments of tool_calls are objects: they are JSON text in the data, which it quotes once more"] = (
            None
        )
    return list(found)


def _is_printed(text: str, rendered: str) -> bool:
    return text in rendered or json.dumps(text, ensure_ascii=False)[1:-1] in rendered


def _lacks(
    key: str, messages: Messages, tools: Sequence[Any] | None, text: str, render: Callable[[Messages, Any], str]
) -> bool:
    """Return whether some message's `key` makes no difference to the text."""
    holders = [i for i, message in enumerate(messages) if message.get(key)]
    if not holders or not _makes_difference(key, holders, messages, tools, text, render):
        return bool(holders)
    # It is used somewhere. Where a value's strings all stand in the text, that is taken for granted.
    doubtful = [i for i in holders if not all(_is_printed(part, text) for part in strings(messages[i][key]))]
    return any(not _makes_difference(key, [i], messages, tools, text, render) for i in doubtful)


def _makes_difference(
    key: str,
    holders: Sequence[int],
    messages: Messages,
    tools: Sequence[Any] | None,
    text: str,
    render: Callable[[Messages, Any], str],
) -> bool:
    keys = (key, "thinking") if key in _REASONING else (key,)
    without = [
        {name: value for name, value in message.items() if name not in keys} if i in holders else message
        for i, message in enumerate(messages)
    ]
    try:
        return render(without, tools) != text
    except DataError:  # the template cannot do without it
        return True


def _is_quoted(call: Any, text: str) -> bool:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    return isinstance(arguments, str) and '"' in arguments and json.dumps(arguments, ensure_ascii=False) in text
