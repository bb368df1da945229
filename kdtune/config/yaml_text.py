"""Parse YAML text so that every value means what its author sees: numbers as in Python and JSON.

YAML 1.1 reads 010 as eight, 1:30 as ninety and no as false; YAML 1.2 reads each of them differently. Such values are refused.
"""

import re
from typing import Any, ClassVar

import yaml

MAX_DEPTH = 64
MAX_VALUES = 100_000
_TAG = "tag:yaml.org,2002:"
_AMBIGUOUS = "!ambiguous"
_BOOL = r"true|True|TRUE|false|False|FALSE"
_INT = r"[-+]?(?:0|[1-9][0-9]*|0x[0-9a-fA-F]+)"
_FLOAT = r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
_NULL = r"~|null|Null|NULL|"
# Octal, binary, base 60 and grouped digits; and the words that are true and false in YAML 1.1 only.
_NUMBER_1_1 = (
    r"[-+]?(?:0[0-9][0-9_]*|0o[0-7_]+|0b[01_]+|[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?"
    r"|(?=[0-9_.]*_)[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?)"
)
_WORDS_1_1 = {**dict.fromkeys(("yes", "on"), "true"), **dict.fromkeys(("no", "off"), "false")}
_WORD_1_1 = "|".join(spelling for word in _WORDS_1_1 for spelling in (word, word.capitalize(), word.upper()))


class AmbiguousValueError(yaml.constructor.ConstructorError):
    """A value that YAML 1.1 and 1.2 read differently; `problem` says how to write it instead."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The safe loader with YAML 1.2's scalars; a repeated key is an error."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_document(self, node: yaml.Node) -> Any:
        """The document's value."""
        _check_size(node, 0, {})
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping's keys and values."""
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            if isinstance(key, yaml.ScalarNode) and key.tag != f"{_TAG}merge":
                if key.value in seen:
                    problem = f"found duplicate key {key.value}"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return dict(super().construct_mapping(node, deep=deep))

    def construct_ambiguous(self, node: yaml.ScalarNode) -> Any:
        """Raise AmbiguousValueError."""
        raise AmbiguousValueError(None, None, _advice(node.value), node.start_mark)


_Loader.add_constructor(_AMBIGUOUS, _Loader.construct_ambiguous)
for _tag, _pattern, _first in (
    (_AMBIGUOUS, f"{_NUMBER_1_1}|{_WORD_1_1}", "-+0123456789yYnNoO"),
    (f"{_TAG}bool", _BOOL, "tTfF"),
    (f"{_TAG}int", _INT, "-+0123456789"),
    (f"{_TAG}float", _FLOAT, "-+0123456789."),
    (f"{_TAG}null", _NULL, ["~", "n", "N", ""]),
    (f"{_TAG}merge", "<<", "<"),
):
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))


def parse_yaml(text: str) -> Any:
    """Parse a YAML document and return its value.

    Raises:
        yaml.YAMLError: it is not valid, nested too deeply or too large, or holds a value that is read in two ways
            (AmbiguousValueError).
    """
    # Before a tree is made of them: the C parser does that by recursion without a bound.
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _too_deep(event.start_mark)
    try:
        return yaml.load(text, Loader=_Loader)
    except ValueError as error:  # an integer of thousands of digits
        raise yaml.YAMLError(str(error).partition(";")[0]) from error


def _too_deep(mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=mark)


def _check_size(node: yaml.Node, depth: int, sizes: dict[int, int]) -> int:
    """Count the node's values with all aliases expanded."""
    if depth > MAX_DEPTH:
        raise _too_deep(node.start_mark)
    if id(node) not in sizes:
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        flat = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        sizes[id(node)] = 1 + sum(_check_size(child, depth + 1, sizes) for child in flat)
    if sizes[id(node)] > MAX_VALUES:
        problem = f"its aliases stand for more than {MAX_VALUES:,} values"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return sizes[id(node)]


def _advice(text: str) -> str:
    """Suggest an unambiguous spelling of a value that YAML 1.1 and 1.2 read differently."""
    choices = " or ".join(_readings(text))
    return f"{text} can be read in more than one way; write {choices}, or '{text}' in quotes where text is meant"


def _readings(text: str) -> list[str]:
    if text.lower() in _WORDS_1_1:
        return [_WORDS_1_1[text.lower()]]
    sign = "-" if text.startswith("-") else ""
    digits = text.lstrip("+-").replace("_", "")
    if digits.startswith(("0o", "0b")):
        return [f"{sign}{int(digits, 0)}"]
    if ":" in digits:
        total = 0.0
        for part in digits.split(":"):
            total = 60 * total + float(part)
        return [f"{sign}{total:g}" if total % 1 else f"{sign}{int(total)}"]
    if len(digits) > 1 and digits.isdigit() and digits.startswith("0"):
        decimal = f"{sign}{int(digits)}"
        octal = [f"{sign}{int(digits, 8)} (octal)"] if set(digits) <= set("01234567") and int(digits) > 7 else []
        return [decimal, *octal]
    return [f"{sign}{digits}"]
