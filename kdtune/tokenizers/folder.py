"""Files beside a tokenizer file: names of special tokens, ids that end a generation, files to copy."""

import json
import reprlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kdtune.errors import CheckpointError
from kdtune.json_files import read_json_if_there
from kdtune.log import get_logger

log = get_logger(__name__)

# Names of the special tokens that transformers hands to a chat template.
SPECIAL_TOKEN_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
    ADDED_TOKENS,
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


def check_flags(folder: Path) -> None:
    """Raise on settings of tokenizer_config.json that change ids and are not supported here.

    Raises:
        CheckpointError: naming the file and the setting.
    """
    file = folder / TOKENIZER_CONFIG
    config = read_json_if_there(file)
    if config.get("add_eos_token"):
        log.warning(
            "%s: add_eos_token=true is left to the dataset: a text ends with eos where its add_eos says so (the default); "
            "prompts and what is evaluated never do",
            file,
        )
    if config.get("split_special_tokens"):
        raise CheckpointError(
            f"{file}: split_special_tokens=true: a chat template's own special tokens would be cut into pieces of text, which is "
            "not supported; set it to false, or take it out"
        )


def generation_eos_ids(folder: Path) -> frozenset[int]:
    """Return the ids that generation_config.json lists as eos_token_id; empty if the folder has no such file or entry."""
    file = folder / "generation_config.json"
    found = read_json_if_there(file).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(i, int) for i in ids):
        raise CheckpointError(
            f"{file}: eos_token_id: found {reprlib.repr(found)}; want an integer or a list of integers"
        )
    return frozenset(ids)


def copy_files(source: Path, target: Path, names: Iterable[str] = TOKENIZER_FILES) -> None:
    """Copy those of the named files that `source` has into `target`, which is created if needed."""
    target.mkdir(parents=True, exist_ok=True)
    if source.resolve() == target.resolve():
        return
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    extra = source / "additional_chat_templates"
    if extra.is_dir():
        shutil.copytree(extra, target / extra.name, dirs_exist_ok=True)


def take_tokenizer_json_as_it_stands(folder: Path, named: Mapping[str, str]) -> None:
    """Name the class in tokenizer_config.json by which transformers reads tokenizer.json unchanged.

    Its classes for sentencepiece models (LlamaTokenizer, ...) rebuild the tokenizer by their own rules and give other ids. The
    special tokens in `named` are added if the file lacks them.
    """
    file = folder / TOKENIZER_CONFIG
    given = {name: token for name, token in named.items() if token}
    config = {**given, **read_json_if_there(file), "tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(
        json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", errors="backslashreplace"
    )


def write_tokenizer_config(folder: Path, named: Mapping[str, str], model_max_length: int | None = None) -> None:
    """Write a tokenizer_config.json beside a tokenizer.json: its special tokens by name (empty ones are omitted)."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: token for name, token in named.items() if token},
        "clean_up_tokenization_spaces": False,
    }
    if model_max_length is not None:
        config["model_max_length"] = model_max_length
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    (folder / TOKENIZER_CONFIG).write_text(text, encoding="utf-8", errors="backslashreplace")
