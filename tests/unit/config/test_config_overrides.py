"""Command-line overrides on a plain tree."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdtune.config.load import parse_value
from kdtune.config.overrides import apply_overrides

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
