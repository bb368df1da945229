"""Resolve a source to local files: a path is that file; patterns are expanded only if no file has that name."""

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from glob import escape, glob, has_magic
from pathlib import Path
from typing import TypeAlias

from kdtune.errors import ConfigError, DataError
from kdtune.paths import user_path

DataFiles: TypeAlias = str | list[str] | dict[str, str | list[str]]
FilesOfSplits: TypeAlias = dict[str, list[str]]

_KIND_OF_SUFFIX = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
LOCAL_KINDS = ("json", "csv", "parquet", "text")


class ElsewhereError(DataError):
    """A source that is not on this machine: a missing file, or a hub dataset where nothing may be downloaded."""


def kind_of(path: Path) -> str | None:
    """Return json, csv, parquet or text, by the file's suffix (ignoring .gz); None for any other."""
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    return _KIND_OF_SUFFIX.get(suffixes[-1].lower()) if suffixes else None


def is_url(path: str) -> bool:
    """Return whether a path is an address of the network or of another file system."""
    return "://" in path


def listed_files(kind: str, data_files: DataFiles | None, data_dir: str | None) -> FilesOfSplits:
    """Return the files of each split that data_files and data_dir name; every local one exists.

    Raises:
        ConfigError: neither is given.
        DataError: a file is missing, or the folder has none of this kind.
    """
    folder = user_path(data_dir) if data_dir is not None else Path()
    if data_files is not None:
        return _by_split(data_files, folder)
    if data_dir is None:
        raise ConfigError(f"source={kind}: needs data_files (or data_dir), the {kind} files to read")
    if not folder.is_dir():
        raise ElsewhereError(f"data_dir={data_dir}: no such folder")
    found = sorted(str(path) for path in folder.iterdir() if kind_of(path) == kind)
    if not found:
        raise DataError(f"data_dir={data_dir}: no {kind} file in this folder")
    return {"train": found}


def local_folder(
    folder: Path, name: str | None, data_files: DataFiles | None, data_dir: str | None
) -> tuple[str | None, FilesOfSplits]:
    """Return the kind and the files of each split of a folder that is laid out like a hub dataset.

    Splits come from the files' names or the folder's README.md, as in `datasets`. (None, {}) for a folder of other files,
    which `datasets` has to read.

    Raises:
        ConfigError: name is no configuration of the folder.
        DataError: data_files names no file.
    """
    base = folder / user_path(data_dir or "")
    if data_dir is not None and not base.is_dir():
        raise ElsewhereError(f"data_dir={data_dir}: no such folder in {folder}")
    files = _by_split(data_files, base) if data_files is not None else _split_files(folder, base, name)
    kinds = Counter(kind_of(Path(path)) for paths in files.values() for path in paths)
    known = [kind for kind in LOCAL_KINDS if kinds[kind]]
    if not known or any(path.endswith(".arrow") for paths in files.values() for path in paths):
        if has_magic(str(folder.resolve())):
            raise DataError(
                f"source={folder}: a folder with [, * or ? in its path can only hold {', '.join(LOCAL_KINDS)} files"
            )
        return None, {}
    kind = max(known, key=lambda one: kinds[one])
    chosen = {split: [path for path in paths if kind_of(Path(path)) == kind] for split, paths in files.items()}
    return kind, {split: paths for split, paths in chosen.items() if paths}


def _split_files(folder: Path, base: Path, name: str | None) -> FilesOfSplits:
    from datasets.data_files import get_data_patterns

    root = escape(str(base.resolve()))
    try:
        patterns = (_readme_patterns(folder, name) if base == folder else None) or get_data_patterns(root)
    except FileNotFoundError as error:
        raise DataError(f"source={base}: no data file in this folder") from error
    return {str(split): _matching(of_split, root) for split, of_split in patterns.items()}


def _matching(patterns: Iterable[str], root: str) -> list[str]:
    """Return the files that the patterns of a split match, each once."""
    from datasets.data_files import resolve_pattern

    found: dict[str, None] = {}
    for pattern in patterns:
        with suppress(FileNotFoundError):  # of several patterns for a split, some match nothing
            found.update(dict.fromkeys(resolve_pattern(str(pattern), root)))
    return list(found)


def _readme_patterns(folder: Path, name: str | None) -> dict[str, list[str]] | None:
    """Return the files that `configs:` in a folder's README.md lists; None if it lists none."""
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard, DatasetCardData

    readme = folder / "README.md"
    card = DatasetCard.load(readme).data if readme.is_file() else DatasetCardData()
    configs = MetadataConfigs.from_dataset_card_data(card)
    if name is not None and name not in configs:
        known = ", ".join(configs) or "none"
        raise ConfigError(f"name={name}: not a configuration that {readme} names; allowed: {known}")
    if not configs:
        return None
    chosen = configs[name or configs.get_default_config_name() or next(iter(configs))]
    return sanitize_patterns(chosen["data_files"]) if "data_files" in chosen else None


def _by_split(data_files: DataFiles, folder: Path) -> FilesOfSplits:
    by_split = dict(data_files) if isinstance(data_files, Mapping) else {"train": data_files}
    return {split: _expanded(paths, folder) for split, paths in by_split.items()}


def _expanded(paths: str | Iterable[str], folder: Path) -> list[str]:
    """Expand paths to files, below the folder if they are relative; a path is a pattern only if no file has its name."""
    expanded: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        if is_url(path):
            expanded.append(path)
            continue
        full = folder / user_path(path)
        if full.is_file():
            expanded.append(str(full))
            continue
        # The folder is a path too: only what data_files says can be a pattern.
        pattern = path if user_path(path).is_absolute() else f"{escape(str(folder))}/{path}"
        matches = [one for one in sorted(glob(str(user_path(pattern)), recursive=True)) if Path(one).is_file()]
        if not matches:
            raise ElsewhereError(f"data_files={path}: no such file")
        expanded += matches
    return expanded
