"""Origin of a model, read from its folder: its name, the model that it was made from, and its licence.

huggingface_hub's cards import its HTTP client, half a second, which a run needs at its end only.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kdtune.download import downloaded_from
from kdtune.errors import CheckpointError
from kdtune.escape import markdown_text
from kdtune.paths import user_path
from kdtune.runs.record import last_start

CARD_NAME = "README.md"
_ORIGIN = "origin"
# What ends the name of a GGUF file: how its weights are stored.
_STORED = re.compile(r"[.-](?:I?Q\d\w*|[FB]+\d+)$", re.IGNORECASE)
# What the first lines of a licence say, and the hub's name of it.
_LICENCES = (
    (r"apache license\s+version 2\.0", "apache-2.0"),
    (r"\bmit license", "mit"),
    (r"llama 3\.3 community license", "llama3.3"),
    (r"llama 3\.2 community license", "llama3.2"),
    (r"llama 3\.1 community license", "llama3.1"),
    (r"meta llama 3 community license", "llama3"),
    (r"llama 2 community license", "llama2"),
)


def model_name(checkpointer: Any) -> str | None:
    """Return the name of a model, such as "acme/Small" or "Small-12 (12 of the 30 layers of acme/Small)"; None for random weights.

    It is the name it was downloaded as, else its folder's name, with the record of prune and quantize in the folder.
    """
    folder = checkpoint_folder(checkpointer)
    if folder is None:
        return None
    name = downloaded_name(folder) or _folder_name(folder)
    if origin := _recorded_origin(folder):
        name += f" ({origin['made']} of {origin['base_model'] or 'random weights'})"
    return f"{name} with {Path(checkpointer['adapter_dir']).name}" if checkpointer.get("adapter_dir") else name


def base_model(checkpointer: Any) -> str | None:
    """Return the third-party model that a checkpoint was made from, over any number of kdtune's runs; None for random weights.

    If that is unknown, return the folder's name.
    """
    folder = checkpoint_folder(checkpointer)
    if folder is None:
        return None
    if name := downloaded_name(folder):
        return name
    if origin := _recorded_origin(folder):
        return origin["base_model"]
    card = _card_data(folder)
    if "kdtune" in (card.get("tags") or ()):
        name = card.get("base_model")
        return name if isinstance(name, str) else None
    return _folder_name(folder)


def origin_record(checkpointer: Any, made: str) -> dict[str, Any]:
    """Return the entry of run.json for a model made without training, which `model_name` and `base_model` read.

    `checkpointer` is the config node of the model it was made from (None: random weights), `made` what was kept of it,
    such as "12 of the 30 layers".
    """
    return {_ORIGIN: {"base_model": base_model(checkpointer), "made": made}}


def origin_card(checkpointer: Any, made: str, *, tag: str, version: str) -> str:
    """Return README.md for a model made without training, with base model and licence for the Hugging Face hub.

    `checkpointer` and `made` are as for `origin_record`, `tag` the hub's, such as "pruned", `version` kdtune's.
    """
    from huggingface_hub import ModelCardData

    base, folder = base_model(checkpointer), checkpoint_folder(checkpointer)
    data = ModelCardData(base_model=base, license=licence(folder), library_name="transformers",
                         pipeline_tag="text-generation", tags=["kdtune", tag])  # fmt: skip
    source = markdown_text(base or "a model of random weights")
    text = f"It has {markdown_text(made)} of {source}, and was not trained since. Made with kdtune {markdown_text(version)}."
    return f"---\n{data.to_yaml()}\n---\n\n# {source}, {tag}\n\n{text}\n\n{licence_text(folder)}\n"


def licence_text(folder: Path | None, *, data: bool = False) -> str:
    """Return the section on the licence of a model made from the one in a folder, and, with `data`, from data."""
    return (
        f"## Licence\n\nThe terms of the base model{' and of the data' if data else ''} hold for what was made from "
        f"{'them' if data else 'it'}{'; see the licence files beside this one.' if _licence_files(folder) else '.'}"
    )


def checkpoint_folder(checkpointer: Any) -> Path | None:
    """Return the folder of a checkpointer's config node, even if it names a file in it; None for random weights."""
    directory = checkpointer.get("checkpoint_dir") if isinstance(checkpointer, Mapping) else None
    if not isinstance(directory, str):
        return None
    path = user_path(directory)
    return path.parent if path.is_file() else path


def downloaded_name(folder: Path) -> str | None:
    """Return the name of a model that `kdtune download` fetched: its repository's, or its file's for a Python package; or None."""
    source = downloaded_from(folder)
    if source is None or not source.startswith("pypi:"):
        return source
    files = list(folder.glob("*.gguf"))
    return _STORED.sub("", files[0].stem) if len(files) == 1 else source.removeprefix("pypi:").partition("==")[0]


def licence(folder: Path | None) -> str | None:
    """Return the hub's name of a model's licence, from its own card or else its licence file; None if unknown."""
    if folder is None:
        return None
    named = _card_data(folder).get("license")
    if isinstance(named, str) and re.fullmatch(r"[\w.-]+", named):
        return named
    for path in filter(Path.is_file, _licence_files(folder)):
        with path.open(encoding="utf-8", errors="replace") as file:
            begin = " ".join(file.read(2000).lower().split())
        for pattern, name in _LICENCES:
            if re.search(pattern, begin):
                return name
    return None


def _folder_name(folder: Path) -> str:
    # The folders of a run say nothing by their own name.
    parts = folder.absolute().parts
    return "/".join(parts[-2:]) if re.fullmatch(r"final|adapter|step_\d+", folder.name) else folder.name


def _recorded_origin(folder: Path) -> dict[str, Any] | None:
    try:
        found = last_start(folder).get(_ORIGIN)
    except (OSError, CheckpointError):  # a folder of other software may have a run.json of its own
        return None
    return found if isinstance(found, dict) and {"base_model", "made"} <= found.keys() else None


def _card_data(folder: Path) -> Mapping[str, Any]:
    if not (folder / CARD_NAME).is_file():
        return {}
    from huggingface_hub import ModelCard

    try:
        return dict(ModelCard.load(folder / CARD_NAME, ignore_metadata_errors=True).data.to_dict())
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _licence_files(folder: Path | None) -> list[Path]:
    if folder is None or not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.match(r"(licen[sc]e|copying)", path.name.lower()))
