"""Discovery of recipes and configs."""

from pathlib import Path

import pytest

from kdtune import _assets
from kdtune.errors import ConfigError


def test_recipes_are_the_files_of_the_folder(assets: Path) -> None:
    recipes = _assets.recipes()
    assert [recipe.name for recipe in recipes] == ["add", "subtract"]
    assert recipes[0].aliases == ("add_single_device", "add_distributed")
    assert recipes[0].summary == "Adds two numbers."


def test_configs_are_the_files_below_the_folder(assets: Path) -> None:
    assert [(config.name, config.recipe) for config in _assets.configs()] == [
        ("orphan", None),
        ("quickstart", "add"),
        ("tiny/add", "add_single_device"),
    ]


def test_names_aliases_and_paths(assets: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text('"""Mine."""\nALIASES: tuple[str, ...] = ("x",)\n')
    assert _assets.find_recipe("add_distributed").name == "add"
    assert _assets.find_recipe(str(own)).aliases == ("x",)
    assert _assets.is_recipe(str(own)) and _assets.is_recipe("subtract")
    assert not _assets.is_recipe("4") and not _assets.is_recipe(str(tmp_path / "missing.py"))
    config = tmp_path / "own.yaml"
    config.write_text("recipe: 'add'\n")
    assert _assets.find_config(config).recipe == "add"
    assert _assets.find_config("tiny/add").path == assets / "configs" / "tiny" / "add.yaml"


@pytest.mark.parametrize(
    ("finder", "name", "words"),
    [
        (_assets.find_recipe, "ad", "did you mean 'add'"),
        (_assets.find_recipe, "nothing_like_it", "recipes: add, subtract"),
        (_assets.find_recipe, "my/missing.py", "no such file"),
        (_assets.find_config, "tiny/ad", "did you mean 'tiny/add'"),
        (_assets.find_config, "missing.yaml", "no such file"),
    ],
)
def test_unknown_names_say_what_there_is(assets: Path, finder: object, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        finder(name)  # type: ignore[operator]


def test_a_broken_recipe_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(ConfigError, match=r"broken\.py:2: not valid Python"):
        _assets.find_recipe(str(tmp_path / "broken.py"))


def test_every_shipped_recipe_states_itself() -> None:
    for recipe in _assets.recipes():
        assert recipe.summary.endswith("."), recipe.path
    names = [name for recipe in _assets.recipes() for name in (recipe.name, *recipe.aliases)]
    assert len(names) == len(set(names))


def test_every_shipped_config_names_a_recipe() -> None:
    for config in _assets.configs():
        assert config.recipe and _assets.recipe_named(config.recipe), config.path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lora_dpo_single_device", "has no equivalent: kdtune distils and finetunes, it does not train on preferences"),
        ("full_dpo_distributed", "has no equivalent"),
        ("ppo_full_finetune_single_device", "has no equivalent"),
        ("qat_distributed", "quantization is not trained for; finetune, then `kdtune run quantize`"),
        ("dev/generate_v2", "torchtune's is 'generate' here"),
    ],
)
def test_torchtunes_recipes_lead_to_what_there_is(name: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        _assets.find_recipe(name)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["full_finetune_single_device", "full_finetune_distributed", "lora_finetune_single_device", "lora_finetune_distributed",
     "knowledge_distillation_single_device", "knowledge_distillation_distributed", "eleuther_eval", "generate", "quantize"],
)  # fmt: skip
def test_torchtunes_recipe_names_are_known(name: str) -> None:
    assert _assets.recipe_named(name) is not None


def test_torchtunes_configs_lead_to_what_there_is() -> None:
    for name, ours in _assets.TORCHTUNE_NAMES.items():
        assert _assets.is_config(ours) or _assets.is_recipe(ours)
        with pytest.raises(ConfigError, match=f"torchtune's is '{ours}' here"):
            _assets.find_config(name)
    for name in ("qwen2_5/0.5B_lora_single_device", "mistral/7B_lora"):
        with pytest.raises(ConfigError, match="a config of the family, such as qwen2_5/7B_lora_single_device"):
            _assets.find_config(name)
    assert _assets.is_config("qwen2_5/7B_lora_single_device")
    with pytest.raises(ConfigError, match=r"`kdtune migrate FILE -o NEW\.yaml` turns"):
        _assets.find_config("phi3/mini_lora")
    for name in ("gemma/2B_full", "llama4/scout_17B_16E_full"):
        with pytest.raises(ConfigError, match="kdtune has no such models"):
            _assets.find_config(name)
