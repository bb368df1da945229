"""Find the shipped recipes and configs by name. The folders are the only list of them."""

import ast
import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from kdtune.errors import ConfigError
from kdtune.paths import user_path

CONFIG_SUFFIXES = (".yaml", ".yml")
_PARTNER = re.compile(
    r"""^recipe:[ \t]*(?:"([^"\n]+)"|'([^'\n]+)'|([^\s#"'].*?))[ \t]*(?:[ \t]#.*)?\r?$""", re.MULTILINE
)


@dataclass(frozen=True)
class Recipe:
    """A recipe file: its name (the file's stem), the other names it answers to, and the first line of its docstring."""

    name: str
    path: Path
    aliases: tuple[str, ...]
    summary: str


@dataclass(frozen=True)
class ConfigFile:
    """A config file: its name (path below the configs folder, no suffix) and the recipe its `recipe:` line names."""

    name: str
    path: Path
    recipe: str | None


# torchtune's names with another spelling here, or whose nearest spelling here means something else.
TORCHTUNE_NAMES = {
    "dev/generate_v2": "generate",
    "generate_v2": "generate",
    "llama2/generation_v2": "generation",
    "llama3_1/8B_lora": "llama3_1/8B_lora_distributed",
    "llama3_2/1B_full": "llama3_2/1B_full_distributed",
    "llama3_2/1B_lora": "llama3_2/1B_lora_single_device",
    "llama3_2/1B_qlora_single_device": "llama3_2/1B_lora_single_device",
    "llama3_2/3B_lora": "llama3_2/3B_lora_single_device",
    "llama3_2/8B_to_1B_KD_lora_distributed": "llama3_2/knowledge_distillation_distributed",
    "llama3_2/8B_to_1B_KD_lora_single_device": "llama3_2/knowledge_distillation_single_device",
    "qwen2/1.5_to_0.5B_KD_lora_distributed": "qwen2/1.5B_to_0.5B_kd_distributed",
    "qwen2/1.5_to_0.5B_KD_lora_single_device": "qwen2/1.5B_to_0.5B_kd_single_device",
    "qwen2_5/14B_to_7B_KD_lora_single_device": "qwen2_5/14B_to_7B_kd_single_device",
    "qwen3/14B_to_8B_KD_lora_single_device": "qwen3/14B_to_8B_kd_single_device",
}
_NO_EQUIVALENT = {
    r"(lora|full)_dpo_.*|ppo_.*|(dev/)?grpo_.*|.*_dpo(_single_device|_distributed)?": "kdtune distils and finetunes, it does not train on "
    "preferences or rewards",
    r"qat_.*|.*_qat_.*": "quantization is not trained for; finetune, then `kdtune run quantize`",
    r"(mistral|qwen2(_5)?|qwen3)/.*": "`kdtune cp` a config of the family, such as qwen2_5/7B_lora_single_device, and change its "
    "models and paths",
    r"(code_llama2|gemma2|phi[34])/.*": "`kdtune migrate FILE -o NEW.yaml` turns torchtune's file into one of kdtune",
    r"(gemma|llama3_2_vision|llama4)/.*": "kdtune has no such models (docs/models.md); `kdtune cp` a config of "
    "llama3_2 and change its models and paths",
}


def advice(name: str, known: Iterable[str]) -> str:
    """Suggest a replacement for an unknown name: torchtune's equivalent, or the nearest known name."""
    if name in TORCHTUNE_NAMES:
        return f"; torchtune's is {TORCHTUNE_NAMES[name]!r} here"
    for pattern, why in _NO_EQUIVALENT.items():
        if re.fullmatch(pattern, name):
            return f"; torchtune's has no equivalent: {why}"
    return did_you_mean(name, known)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest choice, else an empty string."""
    nearest = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def assets_dir(kind: Literal["recipes", "configs"]) -> Path:
    """Return the folder of the shipped recipes or configs: inside the installed package, else the checkout's."""
    package = Path(__file__).resolve().parent
    packaged = package / f"_{kind}"
    return packaged if packaged.is_dir() else package.parent / kind


def recipes() -> list[Recipe]:
    """Return every shipped recipe, sorted by name."""
    files = sorted(assets_dir("recipes").glob("*.py"))
    return [read_recipe(path) for path in files if not path.name.startswith("_")]


def configs() -> list[ConfigFile]:
    """Return every shipped config, sorted by name."""
    root = assets_dir("configs")
    files = [path for path in root.rglob("*") if path.suffix in CONFIG_SUFFIXES]
    return sorted((read_config_header(path) for path in files), key=lambda config: config.name)


def read_recipe(path: Path) -> Recipe:
    """Read name, aliases and summary of a recipe file from its syntax tree, without importing it.

    Raises:
        ConfigError: the file cannot be read or is not Python.
    """
    try:
        return _parse_recipe(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


@cache
def _parse_recipe(path: Path, changed_ns: int) -> Recipe:
    """Parse a recipe file for `read_recipe`. Cached: parsing takes milliseconds, and planning a sweep asks hundreds of times."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8-sig"))
    except SyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid Python: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    docstring = ast.get_docstring(tree) or ""
    return Recipe(path.stem, path, _aliases(tree), docstring.partition("\n")[0].strip())


def _aliases(tree: ast.Module) -> tuple[str, ...]:
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "ALIASES" for target in targets):
            value = getattr(statement, "value", None)
            return tuple(str(name) for name in ast.literal_eval(value)) if value is not None else ()
    return ()


def read_config_header(path: Path) -> ConfigFile:
    """Read name and partner recipe of a config file, by a regular expression over its text; no YAML is parsed."""
    root = assets_dir("configs")
    shipped = path.resolve().is_relative_to(root.resolve())
    name = path.resolve().relative_to(root.resolve()).with_suffix("").as_posix() if shipped else str(path)
    try:
        partner = _PARTNER.search(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return ConfigFile(name, path, next(filter(None, partner.groups())) if partner else None)


def recipe_named(name: str) -> Recipe | None:
    """Return the shipped recipe of that name or alias, or None."""
    return next((recipe for recipe in recipes() if name == recipe.name or name in recipe.aliases), None)


def is_recipe(argument: str) -> bool:
    """Return whether a command-line argument names a recipe: a shipped name or alias, or an existing .py file."""
    return (argument.endswith(".py") and user_path(argument).is_file()) or recipe_named(argument) is not None


def is_config(argument: str) -> bool:
    """Return whether a command-line argument names a shipped config, or an existing file."""
    return user_path(argument).is_file() or any(config.name == argument for config in configs())


def find_recipe(source: str | Path) -> Recipe:
    """Return the shipped recipe of that name or alias, or the user's own recipe file at that path.

    Raises:
        ConfigError: there is none; the message lists what there is.
    """
    shipped = recipe_named(str(source))
    if shipped is not None:
        return shipped
    path = user_path(source)
    if path.suffix == ".py":
        if not path.is_file():
            raise ConfigError(
                f"recipe {str(source)!r}: no such file; give an existing .py file or a name of `kdtune ls`"
            )
        return read_recipe(path)
    if (path.suffix in (".yaml", ".yml") and path.is_file()) or any(config.name == str(source) for config in configs()):
        named = find_config(source).recipe or "RECIPE"
        raise ConfigError(f"{source}: is a config, not a recipe; run it by: kdtune run {named} --config {source}")
    known = recipes()
    spellings = [name for recipe in known for name in (recipe.name, *recipe.aliases)]
    raise ConfigError(
        f"unknown recipe {str(source)!r}{advice(str(source), spellings)}\n"
        f"  recipes: {', '.join(recipe.name for recipe in known) or 'none found'}\n"
        "  or give the path of your own recipe file (.py)"
    )


def find_config(source: str | Path) -> ConfigFile:
    """Return the config file at that path, or the shipped config of that name.

    Raises:
        ConfigError: there is none; the message names the nearest and says where to look.
    """
    path = user_path(source)
    if path.is_file():
        return read_config_header(path)
    if path.suffix in CONFIG_SUFFIXES:
        raise ConfigError(f"config {str(source)!r}: no such file; give an existing .yaml file or a name of `kdtune ls`")
    for suffix in CONFIG_SUFFIXES:
        shipped = assets_dir("configs") / f"{source}{suffix}"
        if shipped.is_file() and (config := read_config_header(shipped)).name == str(source):
            return config
    nearest = advice(str(source), [config.name for config in configs()])
    raise ConfigError(
        f"unknown config {str(source)!r}{nearest}\n  `kdtune ls` lists the configs; a path to a .yaml file works too"
    )
