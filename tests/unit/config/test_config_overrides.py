"""Command-line overrides on a plain tree."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdtune.config import ConfigError, PathText, as_values, component, load
from kdtune.config.component import argument_type
from kdtune.config.load import parse_value
from kdtune.config.overrides import apply_overrides, held_out_note

TREE = {
    "lr": 0.1,
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.1, "betas": [0.9, 0.99]},
    "datasets": [{"_component_": "d.A", "source": "x"}, {"_component_": "d.B", "source": "y"}],
    "teacher": None,
}
DEFAULTS = {"scheduler": {"_component_": "s.Cosine", "warmup": 10}, "seed": 0}


def apply(*overrides: str) -> tuple[dict[str, Any], list[str]]:
    return apply_overrides(
        TREE,
        list(overrides),
        defaults=DEFAULTS,
        component_keys={"optimizer", "scheduler", "teacher"},
        parse_value=parse_value,
    )


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("lr=1e-4", ["lr"], 1e-4),
        ("lr='1e-4'", ["lr"], "1e-4"),
        ("new=a=b=c", ["new"], "a=b=c"),
        ("new=[1, null, true, x]", ["new"], [1, None, True, "x"]),
        ("new=null", ["new"], None),
        ("new=", ["new"], None),
        ("new={a: 1}", ["new"], {"a": 1}),
        ("new=train[:98%]", ["new"], "train[:98%]"),
        ("new='Why: a # b?'", ["new"], "Why: a # b?"),
        ("new=${lr}/x", ["new"], "${lr}/x"),
        ("new=-1", ["new"], -1),
        ("optimizer.lr=2", ["optimizer", "lr"], 2),
        ("optimizer.betas.1=0.5", ["optimizer", "betas"], [0.9, 0.5]),
        ("datasets.1.source=z", ["datasets", 1, "source"], "z"),
        ("optimizer=torch.optim.SGD", ["optimizer"], {"_component_": "torch.optim.SGD"}),
        ("optimizer._component_=torch.optim.SGD", ["optimizer", "lr"], 0.1),
        ("teacher=kdtune.models.llama", ["teacher"], {"_component_": "kdtune.models.llama"}),
        ("datasets.0=d.C", ["datasets", 0], {"_component_": "d.C"}),
        ("datasets.0.source=file.json", ["datasets", 0, "source"], "file.json"),
        ("optimizer=null", ["optimizer"], None),
        ("scheduler.warmup=5", ["scheduler"], {"_component_": "s.Cosine", "warmup": 5}),
        ("teacher.path=x", ["teacher"], {"path": "x"}),
        ("a.b.c=1", ["a", "b", "c"], 1),
    ],
)
def test_sets(override: str, path: list[Any], expected: Any) -> None:
    tree, problems = apply(override)
    assert problems == []
    value: Any = tree
    for part in path:
        value = value[part]
    assert value == expected
    assert type(value) is type(expected)


def test_removes_at_any_depth() -> None:
    tree, problems = apply("~optimizer.lr", "~datasets.0.source", "~teacher")
    assert problems == []
    assert tree["optimizer"] == {"_component_": "torch.optim.AdamW", "betas": [0.9, 0.99]}
    assert tree["datasets"][0] == {"_component_": "d.A"}
    assert "teacher" not in tree


def test_the_input_is_left_alone() -> None:
    apply("~optimizer.lr", "optimizer.betas.0=3", "scheduler.warmup=1")
    assert TREE["optimizer"] == {"_component_": "torch.optim.AdamW", "lr": 0.1, "betas": [0.9, 0.99]}
    assert DEFAULTS["scheduler"] == {"_component_": "s.Cosine", "warmup": 10}


def test_the_last_one_wins_and_order_counts() -> None:
    tree, problems = apply("lr=1", "optimizer.lr=5", "optimizer=torch.optim.SGD", "optimizer.lr=3", "lr=2")
    assert problems == []
    assert tree["lr"] == 2
    assert tree["optimizer"] == {"_component_": "torch.optim.SGD", "lr": 3}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--lr=1e-4", "no leading dashes; write lr=1e-4"),
        ("--lr", "write lr=value"),
        ("lr", "overrides are key=value, a.b=value, ~key or node=dotted.Component"),
        ("=3", "overrides are key=value"),
        ("a..b=3", "overrides are key=value"),
        ("lr=[1", "lr: '[1' is not a YAML value"),
        ("~", "overrides are key=value"),
        ("~optimizer.lrr", "does not set 'optimizer.lrr'; did you mean 'lr'?"),
        ("~optimzer", "did you mean 'optimizer'?"),
        ("~seed", "the config does not set 'seed'"),
        ("~lr=3", "a removal takes no value; write ~lr"),
        ("~datasets.7", "is a list of 2; give an index from 0 to 1"),
        ("lr.x=3", "lr is 0.1, which has no keys to set"),
        ("datasets.x.y=3", "is a list of 2; give an index from 0 to 1"),
        ("datasets.2=3", "is a list of 2; give an index from 0 to 1"),
        ("lr='${'", "${ begins an interpolation, such as ${output_dir}/x; for the characters themselves write \\${"),
    ],
)
def test_says_what_is_wrong(override: str, words: str) -> None:
    _, problems = apply(override)
    assert len(problems) == 1
    assert words in problems[0]


def test_every_finding_is_reported() -> None:
    _, problems = apply("--a=1", "b", "~c", "lr=3")
    assert len(problems) == 3


@dataclasses.dataclass
class Frame:
    text: str = ""
    maybe: str | None = None
    chat: str | dict[str, str] | None = None
    either: float | str = 0.0
    path: PathText = "x"
    words: list[str] = dataclasses.field(default_factory=list)
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    number: float = 0.0
    choice: Literal["a", "b"] = "a"
    node: Any = component(default=None)
    nodes: Any = component(default=None)


TYPED = """
words: [first, second]
names: {a: b}
node: {_component_: config_samples.Dataset, tokenizer: null, source: x}
nodes: [{_component_: config_samples.Tokenizer, path: x}]
"""


def typed(folder: Path, *overrides: str) -> dict[str, Any]:
    (folder / "typed.yaml").write_text(TYPED)
    return as_values(load(folder / "typed.yaml", list(overrides), Frame))


@pytest.mark.parametrize(
    "text",
    [
        "Write a haiku about issue #42 please", "First line\nSecond line\n\nThird", "  both ends  ", "tab\t", "a: b", "- a",
        "[not closed", "{a", "# first", "123", "1e-4", "010", "yes", "true", "1:30", "2024-01-01", "*", "&a", "!x", "@me", "`a`",
        "%", "|", "> quote", "? why", "'twas", '"Hi" she said', "'a' and 'b'", "it's", 'say "x"', "a, b", "", "~", ".5", "-", "--",
        "C:\\new", "\u2028", "é", "=", "a=b", "[1, 2]", "<<", "None", "???!",
    ],
)  # fmt: skip
def test_text_is_what_was_typed(text: str, tmp_path: Path) -> None:
    for key in ("text", "maybe"):
        assert typed(tmp_path, f"{key}={text}")[key] == text
    assert typed(tmp_path, f"words.1={text}")["words"] == ["first", text]
    assert typed(tmp_path, f"names.a={text}")["names"] == {"a": text}
    assert typed(tmp_path, f"node.source={text}")["node"]["source"] == text
    assert typed(tmp_path, f"nodes.0.path={text}")["nodes"][0]["path"] == text
    if text not in ("[1, 2]",):
        assert typed(tmp_path, f"chat={text}")["chat"] == text


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("maybe=null", None),
        ('text="a\\nb # c"', "a\nb # c"),
        ("text='it''s #1'", "it's #1"),
        ("text='null'", "null"),
        ('text="\\"quoted\\""', '"quoted"'),
        ("chat={user: hi}", {"user": "hi"}),
        ("either=2", 2.0),
        ("either=2 #3", 2.0),
        ("either=two #3", "two #3"),
        ("text=${path}/a #1", "x/a #1"),
        ("text=\\${path}", "${path}"),
        ("words=[a, 'b #1']", ["a", "b #1"]),
        ("number=1e-4", 1e-4),
        ("number=1  # one", 1.0),
        ("choice=b ", "b"),
        ("node.column_map={input: context}", {"input": "context"}),
    ],
)
def test_quotes_null_and_what_is_not_text_are_yaml(override: str, value: Any, tmp_path: Path) -> None:
    key = override.partition("=")[0]
    found: Any = typed(tmp_path, override)
    for part in key.split("."):
        found = found[part]
    assert found == value and type(found) is type(value)


def test_what_is_text_a_later_override_may_decide(tmp_path: Path) -> None:
    values = typed(
        tmp_path, "node.path=a #1", "node._component_=config_samples.Tokenizer", "~node.source", "~node.tokenizer"
    )
    assert values["node"] == {"_component_": "config_samples.Tokenizer", "path": "a #1"}


@pytest.mark.parametrize(
    ("override", "finding"),
    [
        ("text=null", "text: null is not allowed; must be str"),
        ("path=", "path: is empty; give a path"),
        ("number=010", "number: 010 can be read in more than one way; write 10 or 8 (octal), or '010' in quotes where text is meant"),
        ("number=08", "number: 08 can be read in more than one way; write 8, or '08' in quotes where text is meant"),
        ("number=1:30", "number: 1:30 can be read in more than one way; write 90, or '1:30' in quotes where text is meant"),
        ("number=-0o17", "number: -0o17 can be read in more than one way; write -15, or '-0o17' in quotes where text is meant"),
        ("number=1_000.5", "number: 1_000.5 can be read in more than one way; write 1000.5, or '1_000.5' in quotes where text is meant"),
        ("words=[a, No]", "words: No can be read in more than one way; write false, or 'No' in quotes where text is meant"),
        ("text=${", "text: '${' is not a YAML value: "),
        ("number=" + "[" * 100_000 + "]" * 100_000, "nested deeper than 64 levels"),
    ],
)  # fmt: skip
def test_what_can_be_read_in_two_ways_is_refused(override: str, finding: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        typed(tmp_path, override)
    (line,) = str(error.value).splitlines()[1:]
    assert finding in line


# "${" is left out: it begins an interpolation, in quotes too.
@given(
    st.text(alphabet=st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=30).filter(
        lambda text: "${" not in text
    )
)
def test_quoted_text_comes_through_unchanged(text: str) -> None:
    quoted = "'" + text.replace("'", "''") + "'"
    tree, problems = apply(f"new={quoted}")
    assert problems == []
    assert tree["new"] == text


ALPACA = {"_component_": "a.alpaca", "source": "a.jsonl", "split": "train"}


@pytest.mark.parametrize(
    ("overrides", "dataset", "told"),
    [
        (["dataset.source=b.jsonl"], {**ALPACA, "source": "b.jsonl"}, "is still a.alpaca with source='a.jsonl'"),
        (["dataset.data_files=b.jsonl"], {**ALPACA, "data_files": "b.jsonl"}, "is still a.alpaca"),
        (["dataset.datasets.0.source=b"], {"_component_": "a.mix", "datasets": [{**ALPACA, "source": "b"}]}, "is still a.alpaca"),
        (["dataset=a.alpaca", "dataset.source=a.jsonl"], ALPACA, None),
        (["dataset.split=test", "dataset.column_map={a: source}"], {**ALPACA, "split": "test"}, None),
        (["dataset.source=b.jsonl", "~dataset_val.split"], {**ALPACA, "source": "b.jsonl"}, None),
        (["output_dir=dataset.source", "dataset_seed=1"], {**ALPACA, "source": "b.jsonl"}, None),
    ],
)  # fmt: skip
def test_held_out_note(overrides: list[str], dataset: dict[str, Any], told: str | None) -> None:
    note = held_out_note(SimpleNamespace(dataset=dataset, dataset_val=ALPACA), overrides)
    assert note is None if told is None else told in (note or "")
    assert held_out_note(SimpleNamespace(dataset=dataset, dataset_val=None), overrides) is None
    assert held_out_note(SimpleNamespace(dataset_val=ALPACA), ["dataset_val.source=b"]) is None


def test_an_argument_that_takes_an_object_is_given_its_component_by_name() -> None:
    """Beside a folder, which is text too: that of no component."""
    given = {
        "teacher.validation=kdtune.teachers.LiveTeacher": {"_component_": "kdtune.teachers.LiveTeacher"},
        "teacher.validation=caches.held_out": "caches.held_out",
        "teacher.validation=kdtune.teachers.LiveTeache": "kdtune.teachers.LiveTeache",
    }
    for override, expected in given.items():
        tree, problems = apply_overrides(
            {"teacher": {"_component_": "kdtune.teachers.CachedTeacher"}},
            [override],
            defaults={},
            component_keys={"teacher"},
            parse_value=parse_value,
            declared=lambda parts: argument_type("kdtune.teachers.CachedTeacher", parts[-1]),
        )
        assert not problems and tree["teacher"]["validation"] == expected
