"""Every shipped config without any one of its keys: it is valid, or the message says what to type."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import CLI

from kdtune import _assets
from kdtune.config import is_component, load
from kdtune.config.load import read_yaml
from kdtune.config.recipe import import_recipe
from kdtune.errors import ConfigError

# Their steps are dozens of configs each, which takes seconds; sweeps/tiny has the same keys.
LARGE = {f"sweeps/case_study_table{number}" for number in (2, 3, 4, 5, "5_cached")}
LARGE |= {"sweeps/smollm2_case_study", "sweeps/smollm2_regimes"}
CONFIGS = [config for config in _assets.configs() if config.name not in LARGE]


def removals(tree: Any, path: str = "", component: str = "") -> Iterator[tuple[str, str]]:
    """Dotted paths of all keys and items of a config, each with the component that it is an argument of."""
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        key = f"{path}.{name}" if path else str(name)
        yield key, component
        if isinstance(value, dict | list):
            yield from removals(value, key, value["_component_"] if is_component(value) else component)


def distinct() -> dict[str, list[str]]:
    """The keys to remove from each config: all at its top, and an argument once for each recipe and component."""
    seen, found = set(), {}
    for config in CONFIGS:
        found[config.name] = keys = []
        for key, component in removals(read_yaml(config.path)):
            if key != "recipe" and ("." not in key or (config.recipe, key, component) not in seen):
                keys.append(key)
            seen.add((config.recipe, key, component))
    return found


@pytest.mark.parametrize(
    ("name", "keys"), distinct().items(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_config_without_one_of_its_keys_is_valid_or_says_what_to_type(name: str, keys: list[str]) -> None:
    config = _assets.find_config(name)
    schema = import_recipe(_assets.find_recipe(config.recipe or "")).schema
    for key in keys:
        try:
            load(name, [f"~{key}"], schema)
        except ConfigError as error:
            _, *findings = str(error).splitlines()
            top = key.partition(".")[0]
            for finding in findings:
                # A key to type, or to remove with a tilde; of a sweep's axes and rows, what there is.
                advice = ("=", "~", "give ", "name ", "must be a", "axes: ", "it lists ")
                assert any(words in finding for words in advice), f"{name} ~{key}: {finding}"
                assert "raised while resolving" not in finding, f"{name} ~{key}: {finding}"
            # What the config `evaluation` has is the run alone, which is to answer for the two keys that are told.
            names = (top, "~", "output_dir: ") if name == "evaluation" else (top, "~")
            assert any(word in finding for finding in findings for word in names), f"{name} ~{key}: {error}"


@pytest.mark.parametrize(
    ("name", "removed", "told", "too"),
    [
        ("llama3_2/evaluation", "~dataset_val", "give it, or ~teacher_checkpointer", "~teacher_checkpointer"),
        ("smollm2/evaluation", "~tasks", "limit: has no effect without tasks; give tasks, or ~limit", "~limit"),
        ("llama3_1/70B_qlora_distributed", "~model", "save_weights=adapter: needs adapters", "~save_weights"),
        ("quickstart_generation", "~checkpointer", "'checkpointer.checkpoint_dir' not found; give it, or tokenizer.path=",
         "model=kdtune.models.llama3_2_1b tokenizer.path=folder"),
        ("quickstart", "~lr_scheduler._component_", "or remove it whole: ~lr_scheduler", "~lr_scheduler"),
        ("tiny/knowledge_distillation", "~model.num_layers", "give model.num_layers=", "model.num_layers=2"),
    ],
)  # fmt: skip
def test_what_the_message_says_to_type_makes_the_config_valid(name: str, removed: str, told: str, too: str) -> None:
    config = _assets.find_config(name)
    schema = import_recipe(_assets.find_recipe(config.recipe or "")).schema
    with pytest.raises(ConfigError) as error:
        load(name, [removed], schema)
    assert told in str(error.value)
    load(name, [removed, *too.split()], schema)


@pytest.mark.parametrize(
    ("name", "given", "told", "too"),
    [
        ("quickstart_student", "num_layers=20", "remove one: ~layers or ~num_layers", "~layers"),
        ("quickstart_student", "method=even", "remove one: ~method, or ~layers and give num_layers", "~layers num_layers=9"),
        ("quickstart_student", "num_candidates=4", "~num_candidates", "~layers num_layers=20"),
        ("smollm2/prune", "layers=[0,1]", "~num_candidates", "~num_layers ~num_candidates"),
        ("smollm2/prune", "method=even", "remove it: ~num_candidates", "~num_candidates"),
        ("generation", "prompts=[a]", "prompt, prompts: only one can be given; remove the rest: ~prompt or ~prompts", "~prompt"),
        ("tiny/quantize", "quantize_output=true", "~quantize_output or ~dataset_val", "~dataset_val"),
        ("quickstart", "dataset.train_on_input=true", "~dataset.train_on", "~dataset.train_on"),
        ("tiny/generate", "overwrite=true", "give output_file=..., or ~overwrite", "output_file=answers.jsonl"),
    ],
)  # fmt: skip
def test_of_two_keys_that_exclude_each_other_the_one_to_remove_is_named(
    name: str, given: str, told: str, too: str
) -> None:
    schema = import_recipe(_assets.find_recipe(_assets.find_config(name).recipe or "")).schema
    with pytest.raises(ConfigError) as error:
        load(name, [given], schema)
    assert told in str(error.value)
    load(name, [given, *too.split()], schema)


def test_a_builder_with_adapters_beside_an_adapter(cli: CLI, tmp_path: Path) -> None:
    own = ["model._component_=kdtune.models.lora_llama", "model.lora_attn_modules=[q_proj]", "model.lora_rank=2"]
    done = cli("run", "finetune", "--config", "tiny/finetune", f"output_dir={tmp_path}/run", *own,
               "adapter=kdtune.models.apply_lora", "adapter.lora_attn_modules=[q_proj]")  # fmt: skip
    assert done.code == 2 and "remove one: ~model or ~adapter" in done.err
