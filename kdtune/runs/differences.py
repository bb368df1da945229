"""Differences between two configs, or between two records of a run's inputs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

ABSENT = object()
"""Stands for a value that one of the two does not have."""


class Difference(NamedTuple):
    """A value that differs between two configs, with its full key, such as "optimizer.lr"."""

    key: str
    was: Any
    is_now: Any

    @property
    def texts(self) -> tuple[str, str, str]:
        """Return the key and both values as they are shown."""
        return self.key, _value(self.was), _value(self.is_now)

    def __str__(self) -> str:
        key, was, is_now = self.texts
        return f"{key}: was {was}, is {is_now}"


def differing_values(key: str, before: Any, now: Any) -> list[Difference]:
    """Return each value that differs, with its full key; mappings are compared key by key."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return [] if before == now else [Difference(key, before, now)]
    names = dict.fromkeys([*before, *now])
    return [
        difference
        for name in names
        for difference in differing_values(f"{key}.{name}", before.get(name, ABSENT), now.get(name, ABSENT))
    ]


def _value(value: Any) -> str:
    return "not given" if value is ABSENT else repr(value)
