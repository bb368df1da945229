"""Frames read from source, and the table of torchtune's keys."""

import inspect
import re
from pathlib import Path

import config_samples
import pytest
import torch

from kdtune import models, tokenizers
from kdtune.checkpoint import Checkpointer
from kdtune.config import field_docs, resolve
from kdtune.config.torchtune_keys import REFUSED, RENAMED, component_hint, key_hint
from kdtune.distributed import Parallelism

RECIPES = Path(__file__).parents[3] / "recipes"

SOURCE = '''
from kdtune import config

class Other:
    x: int = 1
    """Not this."""

@dataclass
class Settings:
    """The schema."""

    output_dir: str = config.MISSING
    """Where to."""
    needed: int
    model: Any = config.component()
    teacher: Any = config.component("a", default=None)
    """One,
    two."""
    names: list[str] = field(default_factory=list)
    table: dict[str, int] = field(default_factory=lambda: {"a": 1})
    choice: Literal["a", "b"] = "a"

    """Too far below to be anyone's docs? No: blank lines do not count."""
    limit: float | None = None
    def problems(self): return []

@config.entry_point(Settings)
def main(cfg): ...
'''


def test_field_docs_reads_types_defaults_and_docs() -> None:
    keys = field_docs(SOURCE)
    assert list(keys) == ["output_dir", "needed", "model", "teacher", "names", "table", "choice", "limit"]
    assert (keys["output_dir"].default, keys["output_dir"].doc) == (None, "Where to.")
    assert keys["needed"].default is None
    assert (keys["model"].type, keys["model"].default) == ("component", None)
    assert (keys["teacher"].default, keys["teacher"].doc) == ("null", "One, two.")
    assert (keys["names"].type, keys["names"].default) == ("list[str]", "[]")
    assert keys["table"].default == "{'a': 1}"
    assert keys["choice"].default == "'a'"
    assert (keys["limit"].type, keys["limit"].default) == ("float | None", "null")


def test_field_docs_of_no_frame_is_empty() -> None:
    assert field_docs("x = 1\n") == {}


def test_field_docs_agrees_with_the_imported_frame() -> None:
    import dataclasses

    keys = field_docs(Path(config_samples.__file__).read_text(), "Config")
    assert list(keys) == [field.name for field in dataclasses.fields(config_samples.Config)]


@pytest.fixture(scope="module")
def known_keys() -> set[str]:
    """Keys of all recipes, and the arguments of the components that the hints speak of."""
    components = {"parallelism": Parallelism, "checkpointer": Checkpointer, "tokenizer": tokenizers.load,
                  "optimizer": torch.optim.AdamW}  # fmt: skip
    packing = {"dataset.packed", "dataset.split_across_pack", "dataset.datasets"}
    keys = packing | {key for recipe in RECIPES.glob("*.py") for key in field_docs(recipe.read_text())}
    for key, component in components.items():
        names = inspect.signature(component).parameters
        keys |= {*names, *(f"{key}.{name}" for name in names)}
    return keys


# What a hint names that is neither a key nor a component of ours.
OTHER_NAMES = {
    "HYBRID_SHARD", "SHARD_GRAD_OP", "adapter_model.safetensors", "metrics.jsonl",
    "step_N", "tokenizer.json", "torch.distributed.checkpoint"
}  # fmt: skip


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_each_refused_key_has_one_sentence_that_says_what_to_do(key: str, known_keys: set[str]) -> None:
    sentence = key_hint(key)
    assert sentence and "\n" not in sentence
    assert re.search(r"remove it|use |set |list |is a top-level key|is an argument|write |or leave it out", sentence)
    named = {name for name in re.findall(r"[A-Za-z]\w*(?:\.\w+)*", sentence) if re.search(r"[._]", name)} - OTHER_NAMES
    for name in named:
        if name == "kdtune.models.lora_":  # one of those that begin so
            assert hasattr(models, "lora_llama3_2_1b")
        elif name.startswith("kdtune."):
            resolve(name)
        else:
            assert name in known_keys, f"{key}: its hint names {name!r}, which no recipe has"


@pytest.mark.parametrize("name", sorted(RENAMED))
def test_each_renamed_component_leads_to_one_that_exists(name: str) -> None:
    hint = component_hint(name)
    assert re.search(r"use |remove it", hint)
    for dotted in re.findall(r"(?:kdtune|torch|torchao)(?:\.\w+)+", hint):
        resolve(dotted)


def test_roles_share_the_table() -> None:
    assert key_hint("teacher_checkpointer.model_type") == REFUSED["checkpointer.model_type"]
    assert key_hint("teacher_model.lora_rank") == REFUSED["model.lora_rank"]
    assert key_hint("teacher_nothing") is None
    assert key_hint("kd_ratio") is None


def test_adapter_builders_are_found_by_their_names() -> None:
    assert "use kdtune.models.lora_llama3_2_1b" in component_hint("lora_llama3_2_1b")
    assert "use kdtune.models.qlora_llama3_1_8b" in component_hint("qlora_llama3_1_8b")
