"""The config that is being made of a torchtune file, with where its values come from and what is to be said of them."""

import posixpath
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kdtune.config.check import COMPONENT
from kdtune.config.torchtune_keys import key_hint

Kind = Literal["changed", "added", "dropped", "lost"]


@dataclass(frozen=True)
class Note:
    """A sentence on a key of the torchtune file (`added`: of the new one). lost: its value does not carry over."""

    kind: Kind
    key: str
    text: str


@dataclass
class Draft:
    """The new config.

    tree: the torchtune file's values. recipe: the recipe it becomes a config of. keys: that recipe's keys, and whether each may be null.
    values: of the new config. origins: the old dotted key of each new one with another name. remarks: comments for new keys.
    refusals: reasons why there is no such config here.
    """

    tree: Mapping[str, Any]
    recipe: str
    keys: Mapping[str, bool]
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any, old: str | None = None) -> None:
        """Set a dotted key; `old` is the one it had in torchtune's file."""
        *outer, last = key.split(".")
        node = self.values
        for part in outer:
            node = node.setdefault(part, {})
        node[last] = value
        if old is not None and old != key:
            self.origins[key] = old

    def note(self, kind: Kind, key: str, text: str) -> None:
        """Add a note."""
        self.notes.append(Note(kind, key, text))

    def drop(self, key: str, value: Any, reason: str | None = None) -> None:
        """Note that a key is dropped, with the reason or that of the table of torchtune's keys; without either it is lost."""
        reason = reason or key_hint(key)
        if reason is None:
            self.note("lost", f"{key}={shown(value)}", "kdtune has no such key or argument")
        else:
            self.note("dropped", key, reason.removesuffix("; remove it"))

    def put_component(
        self,
        key: str,
        component: str,
        arguments: Mapping[str, Any],
        accepted: Collection[str] | None,
        *,
        old: str | None = None,
        reason: str | None = None,
    ) -> None:
        """Set a component node; arguments that are not among the accepted ones (None: all are) are dropped, for that reason."""
        old = key if old is None else old
        kept = {name: value for name, value in arguments.items() if accepted is None or name in accepted}
        self.put(key, {COMPONENT: component, **kept}, old)
        for name, value in arguments.items():
            if name not in kept:
                self.drop(f"{old}.{name}", value, reason)


def arguments_of(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return a component node's arguments."""
    return {name: value for name, value in node.items() if name != COMPONENT}


def torchtune_name(node: Any) -> str | None:
    """Return the last part of a node's component if it is torchtune's; None for one of the user's or another library's."""
    name = str(node.get(COMPONENT, "")) if isinstance(node, Mapping) else ""
    return name.rpartition(".")[2] if name.startswith("torchtune.") else None


def shown(value: Any) -> str:
    """Return a value for a note, shortly."""
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else None
    text = str(value) if text is None else text
    return text if len(text) <= 60 else text[:57] + "..."


def folder_of(path: str) -> str:
    """Return the model's folder of a tokenizer's file."""
    folder = posixpath.dirname(path) or "."
    return posixpath.dirname(folder) if posixpath.basename(folder) == "original" else folder
