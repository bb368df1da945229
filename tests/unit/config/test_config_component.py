"""Component nodes: resolving, binding, instantiating."""

import sys
from pathlib import Path
from typing import Any

import config_samples as samples
import pytest

from kdtune.config import ConfigError, bind, instantiate, resolve


def node(name: str, **arguments: Any) -> dict[str, Any]:
    return {"_component_": f"config_samples.{name}", **arguments}


def test_resolve_finds_classes_functions_and_members() -> None:
    assert resolve("config_samples.Optimizer") is samples.Optimizer
    assert resolve("os.path.join") is __import__("os").path.join
    assert resolve("pathlib.Path.cwd") == Path.cwd
    # xml.etree is a submodule that nothing has imported yet.
    assert resolve("xml.etree.ElementTree.parse").__name__ == "parse"


@pytest.mark.parametrize(
    ("dotted", "words"),
    [
        ("AdamW", "is not a dotted path; write one such as torch.optim.AdamW"),
        ("a..b", "is not a dotted path"),
        (3, "3 is not a dotted path"),
        ("no_such_module_here.X", "no module named 'no_such_module_here'"),
        ("config_samples.Optimzer", "config_samples has no 'Optimzer'; did you mean 'Optimizer'?"),
        ("config_samples.Optimizer.nothing", "config_samples.Optimizer has no 'nothing'"),
        ("torchtune.models.llama3_2.llama3_2_1b", "use kdtune.models.llama3_2_1b"),
        ("torchtune.training.FullModelHFCheckpointer", "use kdtune.checkpoint.Checkpointer"),
        ("torchtune.models.llama3_2.lora_llama3_2_1b", "use kdtune.models.lora_llama3_2_1b"),
        ("torchtune.nothing.such_thing", "kdtune has no component of that name"),
    ],
)
def test_resolve_says_what_is_wrong(dotted: Any, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(dotted)
    assert words in str(error.value)


def test_resolve_names_a_module_that_the_component_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_extra_sample.py").write_text("import an_extra_that_is_missing\n")
    (tmp_path / "broken_sample.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="it needs 'an_extra_that_is_missing', which is not installed"):
        resolve("needs_extra_sample.f")
    with pytest.raises(ConfigError, match="importing broken_sample raised SyntaxError"):
        resolve("broken_sample.f")
    sys.modules.pop("needs_extra_sample", None)


def test_bind_reports_every_finding_with_its_key() -> None:
    problems = bind(node("Dataset", sorce="x", split="valid", tokenizer=1), ["tokenizer"], key="dataset")
    assert problems == [
        "dataset.sorce: config_samples.Dataset has no such argument; takes source, split, column_map; "
        "did you mean 'source'?",
        "dataset.split: 'valid' (str) is not allowed; must be one of 'train', 'test'",
        "dataset.tokenizer: is given by the recipe; remove it",
        "dataset.source: is missing; config_samples.Dataset requires it: give dataset.source=...",
    ]


@pytest.mark.parametrize(
    ("value", "runtime", "words"),
    [
        (node("NOT_CALLABLE"), [], "is not a class or function but 3"),
        (node("Tokenizer", path="x"), ["params"], "does not take 'params', which the recipe gives it"),
        (node("Optimizer", lr="fast"), ["params"], "lr: 'fast' (str) is not allowed; must be float"),
        (node("Optimizer", lr="???"), ["params"], "lr: has no value (???); set it"),
        (node("Optimizer", lr=1, betas=[1]), ["params"], "betas: [1] (list) is not allowed"),
        (node("fails_typing", size=1, sze=1), ["model"], "sze"),
        (node("fails_typing", size="big"), ["model"], "size: 'big' (str) is not allowed; must be int"),
        (node("Inherits", path=3), [], "path: 3 is not allowed; must be str"),
        (node("mixed", datasets=[node("Dataset")], weights=[1]), ["tokenizer"], "datasets.0.source: is missing"),
        (node("anything", inner={"deep": node("Nothing")}), [], "inner.deep: 'config_samples.Nothing' cannot be found"),
        (node("Tokenizer", path="x", merges_file="y"), [], "merges"),
    ],
)
def test_bind_finds(value: dict[str, Any], runtime: list[str], words: str) -> None:
    problems = bind(value, runtime, key="tokenizer")
    assert len(problems) == 1
    assert words in problems[0]


@pytest.mark.parametrize(
    ("value", "runtime"),
    [
        (node("Optimizer", lr=1), ["params"]),
        (node("anything", x=1, y=[1]), ["params"]),
        (node("mixed", datasets=[node("Dataset", source="a")], weights=[1, 2.5]), ["tokenizer"]),
        ({"_component_": "torch.optim.AdamW", "lr": 1e-4, "betas": [0.9, 0.95], "fused": True}, ["params"]),
        ({"_component_": "torch.optim.SGD", "lr": 1, "momentum": 0.9}, ["params"]),
        ({"_component_": "torch.optim.lr_scheduler.StepLR", "step_size": 3}, ["optimizer"]),
    ],
)
def test_bind_accepts(value: dict[str, Any], runtime: list[str]) -> None:
    assert bind(value, runtime) == []


def test_bind_checks_torch_annotations() -> None:
    problems = bind({"_component_": "torch.optim.AdamW", "lr": "high", "weight_decay": "no", "betaz": 1}, ["params"])
    assert len(problems) == 3


def test_instantiate_converts_and_recurses() -> None:
    built = instantiate(node("Optimizer", lr=1, betas=[0, 1]), params=[7])
    assert built == samples.Optimizer([7], 1.0, (0.0, 1.0))
    assert type(built.lr) is float
    assert instantiate(node("at_path", path="a/b")) == Path("a/b")
    tokenizer, datasets, weights = instantiate(
        node("mixed", datasets=[node("Dataset", source="a"), node("Dataset", source="b")], weights=[1, 2]),
        tokenizer="tok",
    )
    assert tokenizer == "tok"
    assert datasets == [samples.Dataset("tok", "a"), samples.Dataset("tok", "b")]
    assert weights == [1.0, 2.0]


def test_instantiate_leaves_what_is_no_node() -> None:
    assert instantiate(None) is None
    assert instantiate(3) == 3
    assert instantiate([node("Tokenizer", path="x"), None]) == [samples.Tokenizer("x"), None]


def test_optional_values_go_where_they_are_taken_and_the_config_wins() -> None:
    assert instantiate(node("Tokenizer", path="x"), optional={"max_seq_len": 5, "other": 1}).max_seq_len == 5
    assert instantiate(node("Tokenizer", path="x", max_seq_len=3), optional={"max_seq_len": 5}).max_seq_len == 3


def test_instantiate_refuses_what_does_not_bind() -> None:
    with pytest.raises(ConfigError, match="does not take 'params'"):
        instantiate(node("Tokenizer", path="x"), params=1)


def test_a_value_that_the_component_refuses_is_named_and_the_error_kept() -> None:
    with pytest.raises(ConfigError, match="int_of: cannot be made with text='z'.*invalid literal") as raised:
        instantiate(node("int_of", text="z"))
    assert isinstance(raised.value.__cause__, ValueError)


def test_the_arguments_of_an_unpacked_typed_dict_are_checked_by_name_and_type() -> None:
    node = {"_component_": "kdtune.data.alpaca_cleaned_dataset", "split": 3, "train_on_inputs": False}
    problems = bind(node, ("tokenizer",), key="dataset")
    assert len(problems) == 2
    assert problems[0].startswith("dataset.split: ")
    assert "dataset.train_on_inputs" in problems[1] and "did you mean 'train_on_input'?" in problems[1]


class Shape:
    """An object that a config cannot write out."""


SQUARE = Shape()


def drawn(shape: Shape | None = None, sizes: list[int] | None = None) -> Shape | None:
    return shape


def test_an_object_is_named_by_its_dotted_path() -> None:
    node = {"_component_": f"{__name__}.drawn", "shape": f"{__name__}.SQUARE"}
    assert instantiate(node) is SQUARE
    for value, problem in (
        (f"{__name__}.SQARE", "has no 'SQARE'; did you mean 'SQUARE'?"),
        (f"{__name__}.drawn", "is not allowed; must be Shape or null"),
        ("square", "is not allowed; must be Shape or null"),
    ):
        (found,) = bind({**node, "shape": value}, key="picture")
        assert found.startswith("picture.shape: ") and found.endswith(problem)
    (found,) = bind({**node, "sizes": "1.5"}, key="picture")
    assert found.endswith("must be a list of int or null")
