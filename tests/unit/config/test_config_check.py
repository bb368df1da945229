"""Values against annotations: what fits, what is converted, what is refused and in which words."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NewType, Optional, Protocol, TypeVar, Union

import pytest

from kdtune.config.check import MismatchError, coerce, describe

Name = NewType("Name", str)
V = TypeVar("V")


class Loss(Protocol):
    def __call__(self, x: int) -> int: ...


NODE = {"_component_": "a.b"}


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, int, 1),
        (1, float, 1.0),
        (1e-4, float, 1e-4),
        (True, bool, True),
        ("x", str, "x"),
        (None, None, None),
        (None, Optional[int], None),  # noqa: UP045
        (3, int | float, 3),
        (3, float | None, 3.0),
        ([1, 2], list[int], [1, 2]),
        ([1, 2], list[float], [1.0, 2.0]),
        ([1, 2], tuple[float, float], (1.0, 2.0)),
        ([1, 2, 3], tuple[int, ...], (1, 2, 3)),
        ([1, 1], set[int], {1}),
        ([1], frozenset[int], frozenset({1})),
        ([1], Sequence[int], [1]),
        ([1], Iterable[int], [1]),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        ({"a": 1}, Mapping[str, int], {"a": 1}),
        ("a/b", Path, Path("a/b")),
        ("a/b", str | Path, "a/b"),
        ("a/b", Path | None, Path("a/b")),
        ("bf16", Literal["fp32", "bf16"], "bf16"),
        ("x", Name, "x"),
        (2, Annotated[float, "seconds"], 2.0),
        ("x", Any, "x"),
        ("x", V, "x"),
        ("x", object, "x"),
        ("x", Loss, "x"),
        (NODE, Callable[[int], int], NODE),
        (NODE, Path, NODE),
        (NODE, int | None | Loss, NODE),
        ([NODE], Sequence[Loss], [NODE]),
        ({"_component_": "a.b"}, Mapping[str, int], NODE),
    ],
)
def test_fits_and_is_converted(value: Any, annotation: Any, expected: Any) -> None:
    result = coerce(value, annotation)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "words"),
    [
        (True, int, "true is not allowed; must be int"),
        (True, float, "true is not allowed; must be float"),
        (1, bool, "1 is not allowed; must be true or false"),
        ("1", int, "'1' (str) is not allowed; must be int"),
        ("x", float | None, "'x' (str) is not allowed; must be float or null"),
        ("None", float | None, "write null for no value"),
        (1.5, int, "1.5 is not allowed; must be int"),
        ("", Path, "is empty; give a path"),
        (None, int, "null is not allowed; must be int"),
        (1, None, "1 is not allowed; must be null"),
        ("fp64", Literal["fp32", "bf16"], "must be one of 'fp32', 'bf16'"),
        (True, Literal[1, 2], "must be one of 1, 2"),
        ([1, "x"], list[int], "item 1: 'x' (str) is not allowed; must be int"),
        ({"a": "x"}, dict[str, int], "item a: 'x' (str) is not allowed"),
        ("abc", Sequence[str], "must be a list of str"),
        ([1, 2, 3], tuple[int, int], "must be a list of int, int"),
        (5, Path, "5 is not allowed; must be Path"),
        ("f", Callable[[int], int], "must be Callable"),
        (NODE, int, "component a.b is not allowed; must be int"),
        ({"a": 1}, str, "must be str"),
        ([1], Union[int, str], "must be int or str"),  # noqa: UP007
    ],
)
def test_is_refused_in_words(value: Any, annotation: Any, words: str) -> None:
    with pytest.raises(MismatchError) as error:
        coerce(value, annotation)
    assert words in str(error.value)


def test_long_values_are_cut() -> None:
    with pytest.raises(MismatchError) as error:
        coerce("x" * 500, int)
    assert len(str(error.value)) < 120


def test_describe_names_classes() -> None:
    assert describe(dict[str, int]) == "a mapping"
    assert describe(Path) == "Path"
