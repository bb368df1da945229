"""Read a torchtune file with overrides in torchtune's manner, and write the config that it becomes."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdtune.config.check import COMPONENT
from kdtune.config.load import RECIPE_KEY, parse_value, read_yaml
from kdtune.config.migrate.comments import Comment, read_comments, translated, translated_header
from kdtune.config.migrate.draft import Draft, Note
from kdtune.config.migrate.keys import is_torchtune, migrate_tree
from kdtune.config.migrate.text import to_text
from kdtune.config.overrides import apply_overrides
from kdtune.errors import ConfigError
from kdtune.paths import user_path


@dataclass(frozen=True)
class Migrated:
    """A config's text, the recipe it is for, and what is to be said of the keys that it came from."""

    text: str
    recipe: str
    notes: tuple[Note, ...]


def migrate(path: Path, overrides: Sequence[str] = (), *, target: str = "NEW.yaml") -> Migrated:
    """Return the kdtune config of a torchtune file.

    overrides: as torchtune takes them (`a.b=value`, `~a.b`, `node=dotted.Component`, which keeps the node's arguments), with its keys.
    target: the new file's name, for the commands in comments.

    Raises:
        ConfigError: the file is not YAML, is not torchtune's, or needs something that kdtune does not have; with every reason.
    """
    tree, problems = apply_overrides(
        read_yaml(path),
        [_as_ours(override, path) for override in overrides],
        defaults={},
        component_keys=(),
        parse_value=parse_value,
    )
    if not problems and RECIPE_KEY in tree:
        problems = [f"is a config for {tree[RECIPE_KEY]} of kdtune already: it has a line `{RECIPE_KEY}:`"]
    if not problems and not is_torchtune(tree):
        problems = ["names no component of torchtune's; give a torchtune config"]
    if problems:
        raise ConfigError("\n  ".join([f"{path}: cannot be migrated", *problems]))
    try:
        draft = migrate_tree(tree)
    except ConfigError as error:
        raise ConfigError("\n  ".join([f"{path}: cannot be migrated", *str(error).split("\n")])) from error
    return Migrated(_text(draft, path, target), draft.recipe, tuple(draft.notes))


def _as_ours(override: str, path: Path) -> str:
    """Return a torchtune override in kdtune's form: a node's new component keeps its arguments, and None is null."""
    key, equals, value = override.partition("=")
    if not equals or override.startswith("~"):
        return override
    node = read_yaml(path).get(key)
    if isinstance(node, dict) and COMPONENT in node and not value.startswith(("{", "[")):
        key = f"{key}.{COMPONENT}"
    return f"{key}={json.dumps(value) if 'max_filename' in key else 'null' if value == 'None' else value}"


def _text(draft: Draft, path: Path, target: str) -> str:
    header, comments = read_comments(path.read_text(encoding="utf-8-sig"))
    top = translated_header(header, path, target)
    first = [f"# Made from torchtune's {path.name} by `kdtune migrate`.", *(["#"] if top else [])]

    def comment_of(key: str) -> Comment:
        comment = comments.get(_origin(draft, key), Comment())
        comment = translated(comment, key, path, target)
        if _at(draft.values, key) != _at(draft.tree, _origin(draft, key)):
            comment = Comment(comment.above, comment.beside if isinstance(_at(draft.values, key), dict) else "")
        remark = draft.remarks.get(key)
        return comment if remark is None else Comment((*comment.above, f"# {remark}"), comment.beside)

    values = {RECIPE_KEY: draft.recipe, **draft.values}
    return to_text(values, [*first, *top], comment_of)


def _origin(draft: Draft, key: str) -> str:
    """Return the key in torchtune's file that a key of the new config, or the node that it is in, came from."""
    head, rest = key, ""
    while head:
        if head in draft.origins:
            return f"{draft.origins[head]}{rest}"
        head, _, last = head.rpartition(".")
        rest = f".{last}{rest}"
    return key


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        if isinstance(tree, list):
            tree = tree[int(part)] if part.isdigit() and int(part) < len(tree) else None
        else:
            tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def migration_advice(source: str | Path, tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> str | None:
    """Return what to type for a torchtune config, read from `source` and given with overrides; None for any other.

    It has no `recipe:` line, and names a component of torchtune's.
    """
    if RECIPE_KEY in tree or not is_torchtune(tree):
        return None
    words = ["kdtune", "migrate", str(source), "-o", f"{user_path(source).stem}_kdtune.yaml", *overrides]
    return (
        f"{source}: is a torchtune config; to have it as one of kdtune, and be told what changes: {shlex.join(words)}"
    )
