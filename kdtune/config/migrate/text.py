"""Write a config as YAML in the style of the shipped ones, with comments."""

import json
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import yaml

from kdtune.config.migrate.comments import Comment
from kdtune.config.yaml_text import parse_yaml

CommentOf = Callable[[str], Comment]
_WIDTH = 110  # characters of a list on one line


def to_text(values: Mapping[str, Any], header: list[str], comment_of: CommentOf) -> str:
    """Return YAML that reads back as the values; `header` are its first lines, `comment_of` gives the comments of a dotted key."""
    lines = [*header, *_mapping(values, "", "", comment_of)]
    kept = [line for index, line in enumerate(lines) if line or (index and lines[index - 1])]
    return "\n".join(kept).rstrip("\n") + "\n"


def _mapping(values: Mapping[str, Any], indent: str, prefix: str, comment_of: CommentOf) -> list[str]:
    lines = []
    for name, value in values.items():
        path = f"{prefix}.{name}" if prefix else name
        comment = comment_of(path)
        lines += [f"{indent}{line}" if line else "" for line in comment.above]
        beside = f"  # {comment.beside}" if comment.beside else ""
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{name}:{beside}", *_mapping(value, f"{indent}  ", path, comment_of)]
        elif isinstance(value, list) and (
            any(isinstance(item, Mapping | list) for item in value) or len(_flow(value)) > _WIDTH
        ):
            lines += [f"{indent}{name}:{beside}", *_items(value, f"{indent}  ", path, comment_of)]
        else:
            lines.append(f"{indent}{name}: {_flow(value)}{beside}")
    return lines


def _items(values: list[Any], indent: str, prefix: str, comment_of: CommentOf) -> list[str]:
    lines = []
    for index, item in enumerate(values):
        if isinstance(item, Mapping) and item:
            inner = _mapping(item, f"{indent}  ", f"{prefix}.{index}", comment_of)
            first = next(
                number for number, line in enumerate(inner) if line.strip() and not line.strip().startswith("#")
            )
            inner[first] = f"{indent}- {inner[first].lstrip()}"
            lines += inner
        else:
            lines.append(f"{indent}- {_flow(item)}")
    return lines


def _flow(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_scalar(item, in_list=True) if not isinstance(item, list) else _flow(item) for item in value)}]"
    return "{}" if isinstance(value, Mapping) else _scalar(value)


def _scalar(value: Any, *, in_list: bool = False) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return _number(value)
    if not isinstance(value, str):
        return str(value)
    try:
        is_plain = parse_yaml(f"[{value}]" if in_list else f"a: {value}") == ([value] if in_list else {"a": value})
    except yaml.YAMLError:
        is_plain = False
    return value if is_plain and "\n" not in value else json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    if value != value or abs(value) == float("inf"):
        return ".nan" if value != value else f"{'-' if value < 0 else ''}.inf"
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{Decimal(repr(value)).normalize():e}".partition("e")
        return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(exponent):+d}"
    return repr(value)
