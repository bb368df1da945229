"""Check values against type annotations, and find objects by their dotted paths; config dataclasses and components share both."""

import collections.abc
import importlib
import importlib.util
import inspect
import types
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, NewType, TypeVar, Union, get_args, get_origin

from kdtune._assets import did_you_mean
from kdtune.config.torchtune_keys import component_hint
from kdtune.errors import ConfigError
from kdtune.paths import PATH_MARK, user_path

COMPONENT = "_component_"
MISSING = "???"

_SCALARS: dict[type, str] = {bool: "true or false", int: "int", float: "float", str: "str"}
_LISTS = (list, set, frozenset, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


class _FactoryMark:
    """Marks an argument that takes a component not yet built."""


FACTORY_MARK = _FactoryMark()
Factory = Annotated[collections.abc.Callable[..., Any], FACTORY_MARK]
"""Type of a component's argument that is given a nested component as a function that builds it, such as a model when its time comes."""


class MismatchError(ValueError):
    """A value that does not fit its annotation; the text says what was found and what is allowed."""


class UnknownNameError(MismatchError):
    """A dotted path of no object."""


def is_component(value: Any) -> bool:
    """Return whether a config value is a component node: a mapping with a `_component_` key."""
    return isinstance(value, dict) and COMPONENT in value


def coerce(value: Any, annotation: Any) -> Any:
    """Convert the value to its annotation: an int to a float, a string to a Path, a list to a tuple or set.

    In a string that is a path (PathText, or beside Path in a union), a leading `~` becomes the home folder. Where an object of
    some other class is wanted, a string is its dotted path.

    Component nodes are unchanged, and so are values whose annotation no YAML value can violate.

    Raises:
        MismatchError: the value does not fit.
    """
    origin = get_origin(annotation)
    if isinstance(value, str) and is_path(annotation):
        value = _expanded(value)
    if origin is Annotated:
        return coerce(value, get_args(annotation)[0])
    if isinstance(annotation, NewType):
        return coerce(value, annotation.__supertype__)
    if origin in (Union, types.UnionType):
        return _coerce_union(value, annotation)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in get_args(annotation)):
            raise MismatchError(_mismatch(value, annotation))
        return value
    if annotation is None or annotation is type(None):
        if value is not None:
            raise MismatchError(_mismatch(value, annotation))
        return None
    plain = origin or annotation
    if plain in (Any, object) or not isinstance(plain, type) or getattr(plain, "_is_protocol", False):
        return value
    if is_component(value):
        if plain in _SCALARS:
            raise MismatchError(_mismatch(value, annotation))
        return value
    return _coerce_class(value, plain, get_args(annotation), annotation)


def accepts(annotation: Any, value: Any) -> bool:
    """Return whether a value fits the annotation; see `coerce`."""
    try:
        coerce(value, annotation)
    except MismatchError:
        return False
    return True


def is_path(annotation: Any) -> bool:
    """Return whether a string of this annotation is a path."""
    return any(_is_path_class(get_origin(member) or member) for member in _members(annotation))


def is_factory(annotation: Any) -> bool:
    """Return whether an argument of this annotation is given a function that builds the component."""
    marked = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return any(get_origin(member) is Annotated and FACTORY_MARK in get_args(member) for member in marked)


def is_text(annotation: Any) -> bool:
    """Return whether every string fits the annotation."""
    return is_path(annotation) or any(member is str for member in _members(annotation))


def names_component(value: Any, annotation: Any) -> bool:
    """Return whether a value is the dotted path of a class or function, for an argument that takes an object with certain methods.

    Beside other text, such as a folder, which a dotted path of nothing is.
    """
    if not isinstance(value, str) or not any(getattr(member, "_is_protocol", False) for member in _members(annotation)):
        return False
    try:
        return callable(resolve(value))
    except ConfigError:
        return False


def item_annotation(annotation: Any) -> Any:
    """Return the annotation of the items of a list or mapping of this annotation; Any if it has none."""
    for member in _members(annotation):
        origin, args = get_origin(member), get_args(member)
        if args and origin in (tuple, *_LISTS, *_MAPPINGS):
            item = args[1 if origin in _MAPPINGS else 0]
            if item is not Any:
                return item
    return Any


def _members(annotation: Any) -> list[Any]:
    """Return the members of a union, in a union too; of any other annotation itself. PathText is Path."""
    args = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return [Path] if PATH_MARK in args else _members(args[0])
    if isinstance(annotation, NewType):
        return _members(annotation.__supertype__)
    if get_origin(annotation) in (Union, types.UnionType):
        return [inner for member in args for inner in _members(member)]
    return [annotation]


def _is_path_class(plain: Any) -> bool:
    return plain in (Path, PurePath) or getattr(plain, "__name__", "") == "PathLike"


def _expanded(text: str) -> str:
    if not text:
        raise MismatchError("is empty; give a path")
    try:
        return str(user_path(text)) if text.startswith("~") else text
    except ConfigError as error:
        raise MismatchError(str(error)) from None


def _coerce_class(value: Any, plain: type, args: tuple[Any, ...], annotation: Any) -> Any:
    if plain is float and type(value) is int:
        return float(value)
    if plain in _SCALARS:
        # Not NaN, which every comparison with a bound would let pass.
        fits = type(value) is plain and value == value
    elif _is_path_class(plain):
        fits = isinstance(value, str | PurePath)
        value = Path(value) if fits and plain is Path else value
    elif plain is tuple and isinstance(value, list | tuple):
        return _coerce_tuple(value, args, annotation)
    elif plain in _LISTS and isinstance(value, list | tuple | set | frozenset):
        items = [_item(item, index, args[:1]) for index, item in enumerate(value)]
        return set(items) if plain is set else frozenset(items) if plain is frozenset else items
    elif plain in _MAPPINGS and isinstance(value, dict):
        return {key: _item(item, key, args[1:]) for key, item in value.items()}
    else:
        is_path = isinstance(value, str) and "." in value and all(part.isidentifier() for part in value.split("."))
        if is_path and plain not in (tuple, *_LISTS, *_MAPPINGS):
            value = _named(value)
        fits = isinstance(value, plain) and not isinstance(value, str)
    if not fits:
        raise MismatchError(_mismatch(value, annotation))
    return value


def _named(dotted: str) -> Any:
    try:
        return resolve(dotted)
    except ConfigError as error:
        raise UnknownNameError(str(error)) from None


def _coerce_tuple(value: list[Any] | tuple[Any, ...], args: tuple[Any, ...], annotation: Any) -> tuple[Any, ...]:
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(value)
    if args and len(args) != len(value):
        raise MismatchError(_mismatch(value, annotation))
    return tuple(_item(item, index, args[index : index + 1]) for index, item in enumerate(value))


def _coerce_union(value: Any, annotation: Any) -> Any:
    """Convert the value to the member that changes it least: `int | float` keeps 3 an int, `float | None` makes it 3.0."""
    converted = []
    unknown: UnknownNameError | None = None
    for member in get_args(annotation):
        try:
            result = coerce(value, member)
        except UnknownNameError as error:
            unknown = error
            continue
        except MismatchError:
            continue
        if type(result) is type(value):
            return result
        converted.append(result)
    if not converted:
        raise unknown or MismatchError(_mismatch(value, annotation))
    return converted[0]


def _item(value: Any, position: int | str, annotation: tuple[Any, ...]) -> Any:
    if not annotation:
        return value
    try:
        return coerce(value, annotation[0])
    except MismatchError as error:
        raise MismatchError(f"item {position}: {error}") from None


def _mismatch(value: Any, annotation: Any) -> str:
    hint = ""
    if isinstance(value, str) and value.lower() == "none" and "null" in describe(annotation):
        hint = "; write null for no value"
    if isinstance(value, dict) and not is_component(value):
        hint = f"; for a component, give {COMPONENT} too, its class or function"
    return f"{shown(value)} is not allowed; must be {describe(annotation)}{hint}"


def shown(value: Any) -> str:
    """Format a value for messages: short, spelled as in YAML, with its type if that is not obvious."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if is_component(value):
        return f"component {value[COMPONENT]}"
    text = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    return text if isinstance(value, int | float) else f"{text} ({type(value).__name__})"


def describe(annotation: Any) -> str:
    """Describe an annotation in words that a config's author can act on."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return describe(get_args(annotation)[0])
    if origin is Literal:
        choices = ", ".join(repr(choice) for choice in get_args(annotation))
        return f"one of {choices}" if len(get_args(annotation)) > 1 else choices
    if origin in (Union, types.UnionType):
        return " or ".join(describe(member) for member in get_args(annotation))
    if annotation is None or annotation is type(None):
        return "null"
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    if origin is not None and get_args(annotation) and origin in (*_LISTS, tuple):
        members = [member for member in get_args(annotation) if member is not Ellipsis]
        return f"a list of {', '.join(describe(member) for member in members)}"
    if origin in _MAPPINGS:
        return "a mapping"
    if isinstance(annotation, TypeVar):
        return str(annotation)
    return getattr(origin or annotation, "__qualname__", str(annotation))


def resolve(dotted: str) -> Any:
    """Return the object at a dotted path, such as `torch.optim.AdamW`.

    Raises:
        ConfigError: the path is malformed, a module cannot be imported, or has no such name (with the nearest one).
    """
    parts = dotted.split(".") if isinstance(dotted, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{shown(dotted)} is not a dotted path; write one such as torch.optim.AdamW")
    if parts[0] == "torchtune":
        raise ConfigError(f"{dotted!r} is torchtune's; {component_hint(parts[-1])}")
    target: Any = _import(parts[0], dotted)
    for depth, part in enumerate(parts[1:], start=1):
        if inspect.ismodule(target) and not hasattr(target, part):
            module = ".".join(parts[: depth + 1])
            if _is_module(module):
                target = _import(module, dotted)
                continue
        try:
            target = getattr(target, part)
        except AttributeError:
            holder = ".".join(parts[:depth])
            hint = did_you_mean(part, [name for name in dir(target) if not name.startswith("_")])
            raise ConfigError(f"{dotted!r} cannot be found: {holder} has no {part!r}{hint}") from None
    return target


def is_ours(node: collections.abc.Mapping[str, Any]) -> bool:
    """Return whether a node's component is kdtune's, and not the user's own."""
    return str(getattr(resolve(node["_component_"]), "__module__", "")).startswith("kdtune.")


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _import(module: str, dotted: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if missing == module:
            raise ConfigError(
                f"{dotted!r} cannot be found: no module named {module!r}; "
                "it must be installed, or lie in the folder kdtune is started from"
            ) from error
        raise ConfigError(
            f"{dotted!r} cannot be imported: it needs {missing!r}, which is not installed; install it"
        ) from error
    except (ImportError, SyntaxError) as error:
        raise ConfigError(
            f"{dotted!r} cannot be imported: importing {module} raised {type(error).__name__}: {error}"
        ) from error
