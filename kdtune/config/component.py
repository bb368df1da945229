"""Component nodes: turn `{_component_: dotted.path, argument: value, ...}` into objects, after checking the arguments."""

import copy
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from kdtune._assets import did_you_mean
from kdtune.config.check import COMPONENT, MISSING, MismatchError, coerce, is_component, is_factory, resolve, shown
from kdtune.config.torchtune_keys import key_hint
from kdtune.errors import ConfigError

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def key(default: Any = MISSING, *, at_least: int | None = None, may_change: bool = False) -> Any:
    """Declare a dataclass field that holds a plain value; without a default the config must set it.

    `at_least` is the smallest number allowed. `may_change`: a resumed run may use another value than before.
    """
    return _field(default, {"at_least": at_least, "may_change": may_change})


def component(
    *runtime: str,
    optional: Iterable[str] = (),
    default: Any = MISSING,
    returns: type[Any] | None = None,
    may_change: bool = False,
) -> Any:
    """Declare a dataclass field that holds a component node (or a list of them; with `returns`, only if its default is a list).

    `runtime` are the arguments that the recipe passes when it instantiates the node, so the config must not set them;
    `optional` are those it passes only if the component accepts them and the config does not set them. Without a default
    the config must set the field, and null is refused. `returns` is the type that the recipe needs: a component that is,
    or by its annotation returns, another kind of object is an error. `may_change`: as in `key`.
    """
    metadata = {"component": True, "runtime": runtime, "optional": tuple(optional), "returns": returns}
    return _field(default, {**metadata, "may_change": may_change})


def _field(default: Any, metadata: dict[str, Any]) -> Any:
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=partial(copy.deepcopy, default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def bind(
    node: Mapping[str, Any],
    runtime: Iterable[str] = (),
    *,
    optional: Iterable[str] = (),
    key: str = "",
    inherited: Iterable[str] = (),
) -> list[str]:
    """Return the errors of a component node: its path, its arguments' names and types, and those of nested nodes.

    `runtime` and `optional` as in `component`. `inherited` are argument names of an enclosing node: a nested component
    receives one of them if it requires an argument of that name and the config gives none. Each error begins with
    `key`.
    """
    here = f"{key}: " if key else ""
    runtime, optional = tuple(runtime), tuple(optional)
    try:
        target = resolve(node[COMPONENT])
    except ConfigError as error:
        return [f"{here}{error}"]
    if not callable(target):
        return [f"{here}{node[COMPONENT]} is not a class or function but {shown(target)}"]
    offered = (*runtime, *optional, *inherited)
    problems = _bind_arguments(target, node, runtime, offered, key)
    for name, value in node.items():
        problems += check_nodes(value, f"{key}.{name}" if key else name, inherited=offered)
    return problems


def check_kind(value: Any, needed: type[Any], key: str) -> list[str]:
    """Return the errors of one key's node, or list of nodes, whose components do not return an object of that kind.

    The kind is known from the class or the function's return annotation; an object with the kind's methods is of that
    kind. Without an annotation there is no error.
    """
    if isinstance(value, list):
        return [problem for index, item in enumerate(value) for problem in check_kind(item, needed, f"{key}.{index}")]
    if not is_component(value):
        return []
    try:
        target = resolve(value[COMPONENT])
    except ConfigError:
        return []  # reported by `bind`
    given = target if inspect.isclass(target) else returned_class(target)
    if not inspect.isclass(given) or given is object:
        return []
    is_protocol = getattr(needed, "_is_protocol", False)  # whose attributes a class may set when it is made
    if not is_protocol and (issubclass(given, needed) or issubclass(needed, given)):
        return []
    public = {name: member for name, member in vars(needed).items() if not name.startswith("_")}
    methods = [name for name, member in public.items() if callable(member) or not is_protocol]
    missing = [name for name in methods if not hasattr(given, name)]
    if not missing:
        return []
    what = "is" if inspect.isclass(target) else "gives"
    return [f"{key}: {value[COMPONENT]} {what} {given.__name__}; the recipe needs {needed.__name__} here"]


def returned_class(function: Any) -> Any:
    """Return the class in a function's return annotation; None if it has none."""
    try:
        annotation = inspect.signature(function).return_annotation
    except (TypeError, ValueError):
        return None
    found = _evaluated(annotation, getattr(inspect.unwrap(function), "__globals__", {}))
    origin = typing.get_origin(found) or found
    return None if origin in (Any, typing.Union, types.UnionType) else origin


def check_nodes(
    value: Any, key: str, runtime: Iterable[str] = (), *, optional: Iterable[str] = (), inherited: Iterable[str] = ()
) -> list[str]:
    """Return the errors of every component node in a config value, at any depth."""
    if is_component(value):
        return bind(value, runtime, optional=optional, key=key, inherited=inherited)
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [
            problem
            for name, item in items
            for problem in check_nodes(item, f"{key}.{name}", runtime, optional=optional, inherited=inherited)
        ]
    return []


def _bind_arguments(
    target: Any, node: Mapping[str, Any], runtime: tuple[str, ...], offered: tuple[str, ...], key: str
) -> list[str]:
    parameters = parameters_of(target)
    if parameters is None:
        return []
    label = node[COMPONENT]
    prefix = f"{key}." if key else ""
    named = {name: parameter for name, parameter in parameters.items() if parameter.kind in _NAMED}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    problems = []
    for name, value in node.items():
        if name == COMPONENT:
            continue
        if name in runtime:
            problems.append(f"{prefix}{name}: is given by the recipe; remove it")
        elif name in named:
            problems += _type_problem(value, named[name], f"{prefix}{name}")
        elif not takes_any:
            choices = [choice for choice in named if choice not in runtime]
            advice = (
                key_hint(f"{key}.{name}")
                or f"takes {', '.join(choices) or 'no arguments'}{did_you_mean(name, choices)}"
            )
            problems.append(f"{prefix}{name}: {label} has no such argument; {advice}")
    for name in runtime:
        if name not in named and not takes_any:
            problems.append(
                f"{key}: {label} does not take {name!r}, which the recipe gives it; use a component that does"
            )
    for name, parameter in named.items():
        if parameter.default is inspect.Parameter.empty and name not in node and name not in offered:
            problems.append(f"{prefix}{name}: is missing; {label} requires it: give {prefix}{name}=...")
    return problems


def _type_problem(value: Any, parameter: inspect.Parameter, key: str) -> list[str]:
    if value == MISSING:
        return [f"{key}: has no value ({MISSING}); set it"]
    try:
        coerce(value, parameter.annotation)
    except MismatchError as error:
        return [f"{key}: {error}"]
    return []


def argument_type(dotted: Any, name: str) -> Any:
    """Return the annotation of a component's argument; Any if there is none, or no such component or argument."""
    if name == COMPONENT:
        return object
    try:
        parameters = parameters_of(resolve(dotted)) or {}
    except ConfigError:
        return Any
    return parameters[name].annotation if name in parameters else Any


def parameters_of(target: Any) -> dict[str, inspect.Parameter] | None:
    """Return the target's parameters, with evaluated annotations where possible; None if Python cannot tell (C code)."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return None
    source = target.__init__ if inspect.isclass(target) and target.__init__ is not object.__init__ else target
    namespace = getattr(inspect.unwrap(source), "__globals__", {})
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in signature.parameters.items():
        annotation = _evaluated(parameter.annotation, namespace)
        if typing.get_origin(annotation) is typing.Unpack:
            parameters |= _unpacked(typing.get_args(annotation)[0])
        else:
            parameters[name] = parameter.replace(annotation=annotation)
    return parameters


def _unpacked(options: Any) -> dict[str, inspect.Parameter]:
    """Return the arguments that `**options: Unpack[SomeTypedDict]` takes, by name; optional ones have a default."""
    return {
        name: inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=annotation,
            default=inspect.Parameter.empty if name in options.__required_keys__ else None,
        )
        for name, annotation in typing.get_type_hints(options).items()
    }


def _evaluated(annotation: Any, namespace: dict[str, Any]) -> Any:
    """Return the annotation with its names resolved; Any if there is none, or a name exists only under TYPE_CHECKING."""
    if annotation is inspect.Parameter.empty:
        return Any
    holder = types.SimpleNamespace(__annotations__={"value": annotation})
    try:
        return typing.get_type_hints(holder, globalns=namespace, include_extras=True)["value"]
    except (NameError, TypeError, AttributeError, SyntaxError):
        return Any


def instantiate(node: Any, *, optional: Mapping[str, Any] | None = None, **runtime: Any) -> Any:
    """Build the object that a component node describes; a list of nodes gives a list, None and other values are unchanged.

    `runtime` and `optional` are the arguments that the recipe passes (see `component`).

    Raises:
        ConfigError: the node does not bind, with every error (`load` has already checked a config's nodes), or the
            component refuses a value.
    """
    optional = optional or {}
    problems = check_nodes(node, "", runtime, optional=optional)
    if problems:
        raise ConfigError("\n".join(problems))
    return _build(node, runtime, dict(optional), {})


def factory(node: Any) -> Callable[..., Any] | None:
    """Return a function that builds the object of a component node, and takes its runtime arguments; None for null, a function itself."""
    return node if node is None or callable(node) else partial(instantiate, node)


def _build(node: Any, runtime: Mapping[str, Any], optional: Mapping[str, Any], inherited: Mapping[str, Any]) -> Any:
    if isinstance(node, list):
        return [_build(item, runtime, optional, inherited) for item in node]
    if not is_component(node):
        if isinstance(node, dict):
            return {name: _build(item, runtime, optional, inherited) for name, item in node.items()}
        return node
    target = resolve(node[COMPONENT])
    parameters = parameters_of(target) or {}
    offered = {**inherited, **optional, **runtime}
    arguments = dict(runtime)
    for name, value in node.items():
        if name != COMPONENT:
            annotation = parameters[name].annotation if name in parameters else Any
            is_later = is_component(value) and is_factory(annotation)
            arguments[name] = factory(value) if is_later else _build(coerce(value, annotation), {}, {}, offered)
    for name, parameter in parameters.items():
        if name not in arguments and parameter.kind in _NAMED:
            if name in optional:
                arguments[name] = optional[name]
            elif name in inherited and parameter.default is inspect.Parameter.empty:
                arguments[name] = inherited[name]
    try:
        return target(**arguments)
    except (TypeError, ValueError) as error:
        # Errors of other libraries about a value, such as a negative learning rate.
        given = ", ".join(f"{name}={shown(value)}" for name, value in node.items() if name != COMPONENT)
        raise ConfigError(f"{node[COMPONENT]}: cannot be made with {given or 'its defaults'}: {error}") from error
