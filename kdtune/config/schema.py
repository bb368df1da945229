"""A recipe's schema: its dataclass as a list of keys, with types, defaults and the docs below each."""

import ast
import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import MISSING as NO_DEFAULT
from pathlib import Path, PurePath
from typing import Any

import kdtune
from kdtune._assets import did_you_mean
from kdtune.config.check import COMPONENT, MISSING, MismatchError, coerce, is_component, is_path, item_annotation, shown
from kdtune.config.component import argument_type, check_kind, check_nodes
from kdtune.config.torchtune_keys import key_hint


@dataclasses.dataclass(frozen=True)
class KeyDoc:
    """One key of a schema as its source states it: type, default (None: must be set) and docs, as text."""

    name: str
    type: str
    default: str | None
    doc: str


def schema_fields(schema: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    """Return the schema's keys: its dataclass fields by name, except those that the caller does not set."""
    return {field.name: field for field in dataclasses.fields(schema) if field.init}


def schema_hints(schema: type[Any]) -> dict[str, Any]:
    """Return the types of the schema's keys."""
    return typing.get_type_hints(schema, include_extras=True)


def declared_type(parts: list[str], tree: Mapping[str, Any], schema: type[Any]) -> Any:
    """Return the annotation of the key or component argument at a dotted path of the tree; Any if nothing declares one.

    A component's own key has the annotation `object`, which no text fits.
    """
    field = schema_fields(schema).get(parts[0])
    if field is None:
        return Any
    if is_component_field(field) and len(parts) == 1:
        return object
    annotation: Any = schema_hints(schema)[parts[0]]
    value: Any = tree.get(parts[0])
    for part in parts[1:]:
        annotation = argument_type(value[COMPONENT], part) if is_component(value) else item_annotation(annotation)
        inside: Mapping[str, Any] = value if isinstance(value, dict) else {}
        if isinstance(value, list):
            inside = {str(index): item for index, item in enumerate(value)}
        value = inside.get(part)
    return annotation


def expand_paths(tree: Mapping[str, Any], schema: type[Any]) -> dict[str, Any]:
    """Return the tree with `~` expanded in the schema's path keys, so that interpolations see the expanded path."""
    hints = schema_hints(schema)
    return {key: _expanded(value, hints.get(key)) for key, value in tree.items()}


def _expanded(value: Any, annotation: Any) -> Any:
    try:
        return coerce(value, annotation) if isinstance(value, str) and is_path(annotation) else value
    except MismatchError:  # which `check_schema` tells
        return value


def schema_defaults(schema: type[Any]) -> dict[str, Any]:
    """Return the defaults of the keys that have one, as plain YAML values."""
    defaults = {}
    for name, field in schema_fields(schema).items():
        if field.default is not NO_DEFAULT and not _is_missing(field.default):
            defaults[name] = plain(field.default)
        elif field.default_factory is not NO_DEFAULT:
            defaults[name] = plain(field.default_factory())
    return defaults


def plain(value: Any) -> Any:
    """Convert a value to plain YAML: tuples and sets become lists, paths strings."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, PurePath) else value


def has_default(field: dataclasses.Field[Any]) -> bool:
    """Return whether the config may omit the field."""
    return field.default_factory is not NO_DEFAULT or not (field.default is NO_DEFAULT or _is_missing(field.default))


def _is_missing(value: Any) -> bool:
    return isinstance(value, str) and value == MISSING


def is_component_field(field: dataclasses.Field[Any]) -> bool:
    """Return whether the field was made by `component(...)`."""
    return bool(field.metadata.get("component"))


def check_schema(tree: Mapping[str, Any], schema: type[Any]) -> tuple[dict[str, Any], list[str]]:
    """Convert the values to the types of the schema's keys; also return the unknown, missing and wrongly typed keys."""
    fields = schema_fields(schema)
    hints = schema_hints(schema)
    values: dict[str, Any] = {}
    problems = []
    for key in tree:
        if key not in fields:
            advice = key_hint(key)
            problems.append(f"{key}: {advice}" if advice else f"{key}: unknown key{did_you_mean(str(key), fields)}")
    for name, field in fields.items():
        if name not in tree or _is_missing(tree[name]):
            if name in tree or not has_default(field):
                problems.append(f"{name}: is missing; give {name}=... (`kdtune ls RECIPE` describes the keys)")
            continue
        try:
            values[name] = coerce(tree[name], hints[name])
        except MismatchError as error:
            problems.append(f"{name}: {error}")
    return values, problems


def check_components(values: Mapping[str, Any], schema: type[Any]) -> list[str]:
    """Return the errors of the component nodes in the schema's values: unresolved paths, arguments that do not bind."""
    problems = []
    for name, field in schema_fields(schema).items():
        if name not in values:
            continue
        value = values[name]
        runtime = field.metadata.get("runtime", ())
        optional = field.metadata.get("optional", ())
        if is_component_field(field):
            problems += _not_nodes(value, name, nullable=has_default(field))
            if needed := field.metadata.get("returns"):
                problems += check_kind(value, needed, name)
                if isinstance(value, list) and not isinstance(schema_defaults(schema).get(name), list):
                    problems.append(
                        f"{name}: is a list; the recipe needs one component: give {name}={{{COMPONENT}: ...}}"
                    )
        problems += check_nodes(value, name, runtime, optional=optional)
    return problems


def _not_nodes(value: Any, key: str, *, nullable: bool) -> list[str]:
    if value is None:
        return [] if nullable else [f"{key}: is null; the recipe needs a component here"]
    if isinstance(value, list):
        return [
            problem
            for index, item in enumerate(value)
            for problem in _not_nodes(item, f"{key}.{index}", nullable=False)
        ]
    if is_component(value):
        return []
    if isinstance(value, dict):
        whole = f", or remove it whole: ~{key}" if nullable else ""
        return [f"{key}: has no {COMPONENT}; name the class or function: {key}.{COMPONENT}=dotted.path{whole}"]
    if isinstance(value, str) and value.lower() == "none":
        return [f"{key}: {shown(value)} is not a component; write null for none"]
    return [f"{key}: {shown(value)} is not a component; write {{{COMPONENT}: dotted.path, argument: value}}"]


def field_docs(source: str, schema: str | None = None) -> dict[str, KeyDoc]:
    """Return the keys of the schema in a recipe's source text, in order, read from its syntax tree without importing it.

    `schema` is the dataclass's name; None takes the one that the recipe's `entry_point(...)` decorator names. Keys that it
    inherits from dataclasses of kdtune come first, those of its last base before the others, as in `dataclasses.fields`.
    """
    tree = ast.parse(source)
    name = schema or _schema_name(tree)
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            inherited = [_inherited(tree, ast.unparse(base)) for base in reversed(statement.bases)]
            return {
                key: doc
                for docs in [*inherited, {doc.name: doc for doc in _key_docs(statement.body)}]
                for key, doc in docs.items()
            }
    return {}


def _inherited(tree: ast.Module, base: str, within: str = "") -> dict[str, KeyDoc]:
    """Return the keys of a base class such as `training.TrainingConfig`, from the file of kdtune that defines it.

    `within` is the package that the tree's relative imports start from.
    """
    package, _, name = base.rpartition(".")
    imported = {
        alias.asname or alias.name: f"{within + '.' if statement.level else ''}{statement.module}.{alias.name}"
        for statement in tree.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    parts = (f"{imported.get(package, package)}.{name}" if package else imported.get(name, "")).split(".")
    if parts[0] != "kdtune":
        return {}
    path = Path(kdtune.__file__).parent.joinpath(*parts[1:-1])
    # Packages that import lazily list their names in a stub.
    files = (path / "__init__.pyi", path / "__init__.py", path.with_suffix(".py"))
    file = next(file for file in files if file.is_file())
    source = file.read_text(encoding="utf-8-sig")
    return field_docs(source, name) or _inherited(ast.parse(source), name, ".".join(parts[:-1]))


def _schema_name(tree: ast.Module) -> str:
    for statement in tree.body:
        for decorator in getattr(statement, "decorator_list", []):
            if (
                isinstance(decorator, ast.Call)
                and ast.unparse(decorator.func).rpartition(".")[2] == "entry_point"
                and decorator.args
            ):
                return ast.unparse(decorator.args[0])
    return "Config"


def _key_docs(body: list[ast.stmt]) -> typing.Iterator[KeyDoc]:
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        doc = ""
        if (
            isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            doc = " ".join(following.value.value.split())
        kind, default = (
            ast.unparse(statement.annotation).replace("config.PathText", "path").replace("PathText", "path"),
            None,
        )
        if statement.value is not None:
            default = _default_text(statement.value)
            if _call_name(statement.value) == "component":
                kind = "component"
        yield KeyDoc(statement.target.id, kind, default, doc)


def _call_name(value: ast.expr) -> str:
    return ast.unparse(value.func).rpartition(".")[2] if isinstance(value, ast.Call) else ""


def _default_text(value: ast.expr) -> str | None:
    if ast.unparse(value).rpartition(".")[2] == "MISSING":
        return None
    if _call_name(value) not in ("field", "component", "key"):
        return "null" if isinstance(value, ast.Constant) and value.value is None else ast.unparse(value)
    assert isinstance(value, ast.Call)
    keywords = {keyword.arg: keyword.value for keyword in value.keywords}
    if _call_name(value) == "key":
        return _default_text(value.args[0]) if value.args else None
    if "default" in keywords:
        return _default_text(keywords["default"])
    if "default_factory" not in keywords:
        return None
    factory = keywords["default_factory"]
    if isinstance(factory, ast.Lambda):
        return ast.unparse(factory.body)
    return {"list": "[]", "dict": "{}", "tuple": "()"}.get(ast.unparse(factory), f"{ast.unparse(factory)}()")
