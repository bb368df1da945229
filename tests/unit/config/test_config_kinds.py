"""Components of another kind than their key needs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from kdtune.config import ConfigError, component, load

if TYPE_CHECKING:
    from somewhere import Unknown


class Reader:
    def read(self) -> str:
        return ""


class FileReader(Reader):
    pass


class Similar:
    def read(self) -> str:
        return "like a Reader"


class Writer:
    def write(self) -> None:
        pass


def make_reader() -> Reader:
    return Reader()


def make_writer() -> Writer:
    return Writer()


def unannotated():  # type: ignore[no-untyped-def]
    return Writer()


def maybe() -> Reader | None:
    return None


def unknown() -> "Unknown":
    raise NotImplementedError


def anything() -> Any:
    return None


@dataclass
class Frame:
    reader: Any = component(default=None, returns=Reader)
    readers: Any = component(default=[], returns=Reader)


HERE = "test_config_kinds"


@pytest.mark.parametrize(
    "name", ["Reader", "FileReader", "Similar", "make_reader", "unannotated", "maybe", "unknown", "anything"]
)
def test_what_is_or_may_be_of_the_kind_passes(name: str, tmp_path: Any) -> None:
    (tmp_path / "a.yaml").write_text(f"readers: [{{_component_: {HERE}.{name}}}]\n")
    assert load(tmp_path / "a.yaml", [f"reader={HERE}.{name}"], Frame).reader == {"_component_": f"{HERE}.{name}"}
    load(tmp_path / "a.yaml", [], Frame)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("make_writer", f"{HERE}.make_writer gives Writer; the recipe needs Reader here"),
        ("Writer", f"{HERE}.Writer is Writer; the recipe needs Reader here"),
    ],
)
def test_another_kind_is_a_finding(name: str, words: str, tmp_path: Any) -> None:
    (tmp_path / "a.yaml").write_text(f"reader: {{_component_: {HERE}.{name}}}\n")
    for overrides, key in (([], "reader"), ([f"readers=[{{_component_: {HERE}.{name}}}]", "~reader"], "readers.0")):
        with pytest.raises(ConfigError) as error:
            load(tmp_path / "a.yaml", overrides, Frame)
        assert str(error.value).splitlines()[1:] == [f"  {key}: {words}"]


def test_a_list_for_one_component_is_a_finding(tmp_path: Any) -> None:
    (tmp_path / "a.yaml").write_text(f"reader: [{{_component_: {HERE}.Reader}}]\n")
    with pytest.raises(ConfigError, match="reader: is a list; the recipe needs one component"):
        load(tmp_path / "a.yaml", [], Frame)
