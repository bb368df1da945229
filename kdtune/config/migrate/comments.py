"""The comments of a YAML text by the key that they belong to, and torchtune's comments in kdtune's words."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

import yaml

from kdtune import _assets

_RUN = re.compile(
    r"(?<![a-z])tune run +(?P<options>(?:-\S+ +(?:\d+ +)?)*)(?P<recipe>[\w/]+) +--config +(?P<config>\S+)"
)
# What is said of torchtune only, of a package that kdtune does not use, or of a recipe per number of devices.
_STALE = re.compile(
    r"torchtune|bitsandbytes|nightl(y|ies)|works (only|best)|(?<![\w-])tune (run|cp|cat|ls|validate)\b", re.IGNORECASE
)
_RECIPE_FILE = re.compile(r"\b(\w+)\.py\b")
# Comments beside keys that do not hold for what the key does here.
_STALE_BESIDE = ("packed",)


@dataclass(frozen=True)
class Comment:
    """The comment lines above a key, "" for blank ones, and the comment beside it, without #."""

    above: tuple[str, ...] = ()
    beside: str = ""


def read_comments(text: str) -> tuple[list[str], dict[str, Comment]]:
    """Return the comment lines at the top of a YAML text, and each dotted key's comments."""
    lines = text.splitlines()
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    found = dict(_comments_of(root, "", lines)) if isinstance(root, yaml.MappingNode) else {}
    first = next(iter(found), None)
    header = list(found[first].above) if first is not None else []
    if first is not None:
        found[first] = Comment((), found[first].beside)
    return header, found


def _comments_of(node: yaml.Node, prefix: str, lines: list[str]) -> Iterator[tuple[str, Comment]]:
    if isinstance(node, yaml.SequenceNode):
        children = [(str(index), item, item) for index, item in enumerate(node.value)]
    elif isinstance(node, yaml.MappingNode):
        children = [(str(key.value), key, value) for key, value in node.value]
    else:
        return
    if node.flow_style:
        return
    for name, start, value in children:
        path = f"{prefix}.{name}" if prefix else name
        yield path, Comment(_above(start, lines), _beside(start, value, lines))
        yield from _comments_of(value, path, lines)


def _above(start: yaml.Node, lines: list[str]) -> tuple[str, ...]:
    line = start.start_mark.line
    if lines[line][: start.start_mark.column].strip(" -"):  # not the first on its line
        return ()
    above: list[str] = []
    for text in reversed(lines[:line]):
        if text.strip() and not text.strip().startswith("#"):
            break
        above.insert(0, text.strip())
    return tuple(above)


def _beside(start: yaml.Node, value: yaml.Node, lines: list[str]) -> str:
    is_block = isinstance(value, yaml.CollectionNode) and not value.flow_style
    mark = start.end_mark if is_block else value.end_mark
    if mark.line >= len(lines) or (is_block and start is value):
        return ""
    rest = lines[mark.line][mark.column :].lstrip(" :")
    return rest.lstrip("#").strip() if rest.startswith("#") else ""


def translated_header(header: list[str], source: PurePath, target: str) -> list[str]:
    """Return the lines at the top with kdtune's commands; a paragraph that no longer holds is left out.

    source: path of torchtune's file; target: name of the new one.
    """
    kept: list[list[str]] = []
    for paragraph in _paragraphs(header):
        lines = [_translated(line, source, target) for line in paragraph]
        whole = [line for line in lines if line is not None]
        if len(whole) == len(lines):
            kept.append(whole)
    return [line for index, paragraph in enumerate(kept) for line in (["#"] if index else []) + paragraph]


def translated(comment: Comment, key: str, source: PurePath, target: str) -> Comment:
    """Return a key's comments as far as they hold here."""
    above = [_translated(line, source, target) for line in comment.above]
    beside = _translated(comment.beside, source, target) or ""
    is_stale = key.rpartition(".")[2] in _STALE_BESIDE
    return Comment(tuple(line for line in above if line is not None and line != "#"), "" if is_stale else beside)


def _paragraphs(lines: list[str]) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip("# "):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [paragraph for paragraph in found if paragraph]


def _translated(line: str, source: PurePath, target: str) -> str | None:
    """Return a comment's line in kdtune's words; None if there are none."""
    run = _RUN.search(line)
    if run is not None:
        recipe = _recipe(run["recipe"])
        config = _config(run["config"], source, target)
        if recipe is None or config is None:
            return None
        line = f"{line[: run.start()]}kdtune run {run['options']}{recipe} --config {config}{line[run.end() :]}"
    line = re.sub(r"(?<![a-z])tune download", "kdtune download", line)
    if "kdtune download" in line:  # pickles are not read
        line = re.sub(r""" --ignore-patterns ["']?\*\.safetensors["']?""", "", line).replace("<HF_TOKEN>", "TOKEN")
    if _STALE.search(line.replace(target, "")):
        return None
    return _RECIPE_FILE.sub(
        lambda match: f"{found.name}.py" if (found := _assets.recipe_named(match[1])) else match[0], line
    )


def _recipe(name: str) -> str | None:
    name = name if _assets.recipe_named(name) else _assets.TORCHTUNE_NAMES.get(name, "")
    return name if _assets.recipe_named(name) else None


def _config(name: str, source: PurePath, target: str) -> str | None:
    """Return what a torchtune config's name in a command stands for: the file itself, or a config that kdtune has."""
    name = name.removesuffix(".yaml")
    if str(source.with_suffix("")).endswith(name):
        return target
    name = _assets.TORCHTUNE_NAMES.get(name, name)
    return name if any(config.name == name for config in _assets.configs()) else None
