"""A Jinja sandbox with limits on steps and text, in which every template ends.

jinja2's own sandbox keeps a template from reaching Python, and bounds a single range. Here each loop iteration and each
call counts as a step, and every operation that makes a long text or list from short ones checks the size of its result
first. This needs no thread and no signal, and a template's output is the same as in jinja2's sandbox.
"""

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 300_000
MAX_CHARS = 2**24
"""Largest length of one text, and of one list."""
# All texts and lists that a template makes on the way, in MAX_CHARS. Templates that collect their output piece by piece make
# each length of it once.
_MAX_MADE = 16
# What a conversation adds to the limits for each of its messages.
_STEPS_EACH, _MADE_EACH = 10_000, 1000
# A backstop: seconds of this thread's own computing time.
_MAX_SECONDS = 10.0
# Terms of a sum, and turns of a loop, after which it is looked at again.
_TERMS, _TURNS = 16, 1000

# Filters that make nothing longer than what they are given; they are left as they are, for speed.
_HARMLESS = {
    "trim", "length", "count", "lower", "upper", "capitalize", "title", "first", "last", "default", "d", "int", "float", "abs",
}  # fmt: skip
_COUNTED, _JOINED, _WEIGHED = "_counted", "_joined", "_weighed"
_BIG_NUMBER = re.compile(r"\d{6}")
_MANY = 10**6
_MAX_BITS = 2**14  # Python prints no more than 4,300 digits


class LimitError(Exception):
    """A template exceeds its limits: too many steps, or too much output."""


class _Meter(threading.local):
    """Steps and characters used by the current rendering in this thread."""

    def __init__(self) -> None:
        self.start(())

    def start(self, messages: Sequence[Mapping[str, Any]]) -> None:
        self.steps = self.made = self.calls = 0
        self.messages = messages
        self.max_steps, self.max_made, self.max_size = MAX_STEPS, _MAX_MADE * MAX_CHARS, MAX_CHARS
        self.is_scaled = False
        self.until: float | None = None

    def step(self, count: int = 1) -> None:
        self.steps += count
        if self.steps > self.max_steps and not self._scale(lambda: self.steps <= self.max_steps):
            raise LimitError(f"it was stopped after {self.max_steps:,} steps (turns of loops and calls)")
        self.calls += 1
        if self.calls & 63 == 0:
            now = time.thread_time()
            self.until = self.until or now + _MAX_SECONDS
            if now > self.until:
                raise LimitError(f"it was stopped after {_MAX_SECONDS:.0f} s")

    def make(self, size: int) -> None:
        """Raise if a text or list of this size exceeds the limits; else add it to the total."""
        self.made += size
        if size > self.max_size and not self._scale(lambda: size <= self.max_size):
            raise LimitError(f"it makes a text or list of {size:,} characters or items; allowed: {self.max_size:,}")
        if self.made > self.max_made and not self._scale(lambda: self.made <= self.max_made):
            raise LimitError(f"it makes more than {self.max_made:,} characters of text")

    def _scale(self, is_enough: Callable[[], bool]) -> bool:
        """Raise the limits once, in proportion to the conversation's size; return whether that is enough."""
        if not self.is_scaled:
            self.is_scaled = True
            self.max_steps += _STEPS_EACH * len(self.messages)
            size = sum(len(message.get("content") or "") for message in self.messages)
            self.max_size += 64 * size
            self.max_made += _MADE_EACH * size
        return is_enough()

    def weigh(self, value: Any) -> Any:
        """Return the value, after counting nested lists recursively: they grow by doubling, and printing would expand them."""
        if isinstance(value, str | bytes):
            self.make(len(value))
        elif isinstance(value, list | tuple | dict):
            self.make(_size(value, self))
        return value


METER = _Meter()


def _size(value: Any, meter: _Meter) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if not isinstance(value, list | tuple):
        return 1
    meter.step(1 + len(value) // 16)
    total = len(value)
    for item in value:
        total += _size(item, meter) if isinstance(item, str | bytes | list | tuple | dict) else 1
        if total > meter.max_size:
            meter.make(total)
    return total


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with METER's limits on every template."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        # Not optimized: jinja2 would compute what is constant while it compiles, where nothing is counted.
        super().__init__(optimized=False, **options)
        self.filters |= {name: _limited_filter(name, self.filters[name]) for name in self.filters.keys() - _HARMLESS}
        self.filters |= {
            _COUNTED: _counted,
            _JOINED: lambda parts: _concatenated(map(str, parts)),
            _WEIGHED: METER.weigh,
            "random": _no_chance,
        }
        self.globals["lipsum"] = _no_chance
        self.concat = _concatenated  # type: ignore[method-assign]  # of blocks and of the whole

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        return super()._generate(_Limits().visit(source), *args, **options)

    def call(self, context: Any, function: Any, /, *args: Any, **options: Any) -> Any:
        """Call `function` within the limits and return its result."""
        METER.step(5 if isinstance(function, Macro) else 1)
        is_loop = isinstance(function, LoopContext)
        args = (_counted(args[0]), *args[1:]) if is_loop else _check_method(function, args, options)
        return METER.weigh(super().call(context, function, *args, **options))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Wrap a text's `format` and `format_map` in the limits."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        limited: Callable[..., str] = _limited(
            wrapped, lambda args, options: _check_format(value.__self__, args, options)
        )
        return limited

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute left OPERATOR right, within the limits."""
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | bytes | list | tuple) and isinstance(other, int):
                    METER.make(len(one) * max(other, 0))
            if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() + right.bit_length())
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * max(right, 0))
        elif operator == "%" and isinstance(left, str | bytes):
            _check_format(left, right if isinstance(right, tuple) else (right,))
        return METER.weigh(super().call_binop(context, operator, left, right))


class _Limits(NodeTransformer):
    """Insert the counting into a template's syntax tree."""

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802  (jinja2's name)
        # A sum that is printed at once does not grow from turn to turn; the whole output is looked at.
        node.nodes = [self._sum(one, 0) if isinstance(one, nodes.Add) else self.visit(one) for one in node.nodes]
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:  # noqa: N802  (jinja2's name)
        return _filtered(self._sum(node, 0), _WEIGHED)

    def _sum(self, node: nodes.Expr, depth: int) -> nodes.Expr:
        if not isinstance(node, nodes.Add):
            visited: nodes.Expr = self.visit(node)
            return visited
        node.left, node.right = self._sum(node.left, depth + 1), self.visit(node.right)
        return _filtered(node, _WEIGHED) if depth % _TERMS == _TERMS - 1 else node

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  (jinja2's name)
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _COUNTED)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802  (jinja2's name)
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), _JOINED)

    def _visit_items(self, node: nodes.List | nodes.Dict | nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        is_target = getattr(node, "ctx", "load") != "load"
        return _filtered(node, _WEIGHED) if node.items and not is_target else node

    visit_List = visit_Dict = visit_Tuple = _visit_items  # jinja2's names


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _counted(items: Iterable[Any]) -> Iterable[Any]:
    """Yield the items, each of which costs a step when it is taken; short lists are counted before."""
    if isinstance(items, Sized) and len(items) <= _TURNS:
        METER.step(len(items))
        return items
    return _counted_one_by_one(items)


def _counted_one_by_one(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        METER.step()
        yield item


def _concatenated(parts: Iterable[str]) -> str:
    texts = list(parts)
    METER.make(sum(map(len, texts)))
    return "".join(texts)


def _no_chance(*_: Any, **__: Any) -> Any:
    raise LimitError("it draws at random, so that nobody could tell what was trained on")


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    check = _FILTER_SIZES.get(name, lambda value, args, options: None)
    position = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0
    limited = _limited(function, lambda args, options: check(args[position], args[position + 1 :], options))
    if name != "join":
        return limited

    @wraps(function)
    def join(*args: Any, **options: Any) -> Any:
        # What has no length until it is gone through, such as the result of `map`.
        items = list(_counted(args[position])) if isinstance(args[position], Iterator) else args[position]
        return limited(*args[:position], items, *args[position + 1 :], **options)

    return join


def _limited(
    function: Callable[..., Any], check: Callable[[tuple[Any, ...], Mapping[str, Any]], None]
) -> Callable[..., Any]:
    @wraps(function)
    def limited(*args: Any, **options: Any) -> Any:
        METER.step()
        check(args, options)
        return METER.weigh(function(*args, **options))

    return limited


def _check_bits(count: int) -> None:
    if count > _MAX_BITS:
        raise LimitError(f"it computes a whole number of {count:,} bits; allowed: {_MAX_BITS:,}")


def _check_method(function: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the arguments, after checking that a text's method does not make a too long result of them."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, str | bytes):
        name = getattr(function, "__name__", "")
        if name == "join" and args and not isinstance(args[0], str | bytes):
            args = (list(_counted(args[0])), *args[1:])
            METER.make(len(args[0]) * len(owner) + _size(args[0], METER))
        elif name in _METHOD_SIZES:
            _METHOD_SIZES[name](owner, args, options)
        METER.step(len(owner) >> 16)
    elif isinstance(owner, int) and args and isinstance(args[0], int):
        METER.make(abs(args[0]))  # int.to_bytes
    return args


def _check_numbers(_: Any, args: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Check widths, counts and indentations, which determine the size of the output."""
    for value in (*args, *options.values()):
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) > _MANY:
            raise LimitError(f"it asks for a width or count of {value:,}; allowed: {_MANY:,}")


def _check_indent(text: Any, args: Sequence[Any], options: Mapping[str, Any]) -> None:
    _check_numbers(text, args, options)
    numbers = [value for value in (*args, *options.values()) if isinstance(value, int | str)]
    widest = max([len(value) if isinstance(value, str) else value for value in numbers], default=4)
    METER.make(len(str(text)) + (str(text).count("\n") + 1) * widest)


def _check_replace(text: Any, args: Sequence[Any], options: Mapping[str, Any]) -> None:
    strings = [value for value in (*args, *options.values()) if isinstance(value, str | bytes)]
    if isinstance(text, str | bytes) and len(strings) == 2:
        METER.make(len(text) + text.count(strings[0]) * len(strings[1]))  # type: ignore[arg-type]


def _check_translate(text: Any, args: Sequence[Any], _: Mapping[str, Any]) -> None:
    table = args[0] if args and isinstance(args[0], dict) else {}
    METER.make(len(text) * max([len(value) for value in table.values() if isinstance(value, str)], default=1))


def _check_tabs(text: Any, args: Sequence[Any], options: Mapping[str, Any]) -> None:
    _check_numbers(text, args, options)
    METER.make(
        len(text) + len(text) * max([8, *(value for value in (*args, *options.values()) if isinstance(value, int))])
    )


def _check_format(text: Any, args: Sequence[Any], options: Mapping[str, Any] | None = None) -> None:
    """Check a format string: no wide field, whether the width is in it or among the arguments."""
    given = args[0] if len(args) == 1 and isinstance(args[0], Mapping) else {}
    _check_numbers(text, args, {**(options or {}), **given})
    if isinstance(text, str) and _BIG_NUMBER.search(text):
        raise LimitError(f"it formats to a width of more than {10**5:,}")
    METER.make(_size([*args, *(options or {}).values()], METER) * (1 + str(text).count("{") + str(text).count("%")))


def _check_join(items: Any, args: Sequence[Any], options: Mapping[str, Any]) -> None:
    separators = [len(value) for value in (*args, *options.values()) if isinstance(value, str)]
    if isinstance(items, list | tuple):
        METER.make(_size(items, METER) + len(items) * max(separators, default=0))


_SizeCheck = Callable[[Any, Sequence[Any], Mapping[str, Any]], None]
_FILTER_SIZES: dict[str, _SizeCheck] = {
    **dict.fromkeys(
        ["center", "wordwrap", "truncate", "batch", "slice", "round", "tojson", "filesizeformat"], _check_numbers
    ),
    "indent": _check_indent,
    "replace": _check_replace,
    "format": _check_format,
    "join": _check_join,
}
_METHOD_SIZES: dict[str, _SizeCheck] = {
    **dict.fromkeys(["center", "ljust", "rjust", "zfill"], _check_numbers),
    "expandtabs": _check_tabs,
    "replace": _check_replace,
    "translate": _check_translate,
}
