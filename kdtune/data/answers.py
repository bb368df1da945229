"""Answers that a model has written once, for all runs that learn from them: token ids in JSON lines, and a header beside them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdtune.data.columns import Row
from kdtune.data.dataset import Dataset
from kdtune.data.files import ElsewhereError
from kdtune.data.packing import pack_examples
from kdtune.data.rows import FilterFn, build_dataset
from kdtune.data.sources import PREVIEW, Source
from kdtune.data.transforms import EncodedRow, pair_of, truncated
from kdtune.errors import CheckpointError, ConfigError, DataError
from kdtune.json_files import read_json
from kdtune.paths import user_path

if TYPE_CHECKING:
    from kdtune.tokenizers import Tokenizer

ANSWERS_HEADER = "answers.json"
"""Name of the file that says who has written a folder's answers, after which prompts, and in how many files."""


def answers_file(number: int) -> str:
    """Return the name of a file of answers, from 0 on."""
    return f"answers-{number:05}.jsonl"


def answers_dataset(
    tokenizer: "Tokenizer",
    *,
    source: str,
    only_finished: bool = False,
    filter_fn: FilterFn | str | None = None,
    packed: bool = False,
    split_across_pack: bool = False,
) -> Dataset:
    """Build a dataset of the answers in a folder of `kdtune run write_answers`: their own tokens, after their prompts, are trained on.

    source: the folder. only_finished: leave out answers that the limit cut; with false their tokens are trained on, without an end.
    filter_fn: a function, or its dotted path, that returns whether to keep a row. packed, split_across_pack: see pack_examples.

    Token ids are used as they were written, so the run's tokenizer must be the writer's. An answer longer than the tokenizer's
    max_seq_len is cut there.

    Raises:
        ConfigError: the folder holds no answers, or not all of them yet, or another tokenizer's.
        DataError: there is no such folder, a row cannot be used, or nothing can be trained on.
    """
    if pair_of(tokenizer) is not None:
        raise ConfigError(
            "answers_dataset: token ids of one tokenizer are not paired with another's; choose another kd_loss, or dataset"
        )
    files = _files(user_path(source), tokenizer)

    def encode(row: Row) -> EncodedRow | None:
        ids, length = row.get("ids"), row.get("prompt_length")
        if not isinstance(ids, list) or not isinstance(length, int) or not 0 < length < len(ids):
            raise DataError(
                f"columns {', '.join(row) or 'none'}; ids, a list, and prompt_length, below their number, expected"
            )
        # Heads have more rows than the tokenizer has ids: what a student's head lacks, its loss refuses.
        if not all(isinstance(one, int) and one >= 0 for one in ids):
            raise DataError("ids: whole numbers from 0 on expected")
        if only_finished and not row.get("is_finished"):
            return None
        return truncated(EncodedRow(ids, [False] * length + [True] * (len(ids) - length)), tokenizer)

    dataset = build_dataset(encode, Source("json", data_files=files), filter_fn, is_chat=True)
    return pack_examples(dataset, tokenizer, packed=packed, split_across_pack=split_across_pack)


def _files(folder: Path, tokenizer: "Tokenizer") -> list[str]:
    """Return the files of a complete folder."""
    from kdtune.tokenizers import fingerprint

    if not folder.is_dir():
        raise ElsewhereError(f"source={folder}: no such folder; `kdtune run write_answers` makes one")
    try:
        header: dict[str, Any] = read_json(folder / ANSWERS_HEADER)
    except CheckpointError as error:
        raise ConfigError(f"source={folder}: holds no answers of `kdtune run write_answers`: {error}") from error
    if not isinstance(header.get("num_files"), int) or not isinstance(header.get("tokenizer"), dict):
        raise ConfigError(
            f"source={folder}: {ANSWERS_HEADER} lacks num_files or tokenizer: it is damaged; copy the folder again"
        )
    files = [folder / answers_file(number) for number in range(header["num_files"])]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ConfigError(
            f"source={folder}: {len(missing)} of {len(files)} files are missing, the first is {missing[0]}; run write_answers again, which "
            "goes on where it was stopped"
        )
    # A preview may have no tokenizer.
    if PREVIEW.get() is None and header["tokenizer"] != (own := fingerprint(tokenizer)):
        different = ", ".join(sorted(key for key in own if own[key] != header["tokenizer"].get(key)))
        raise ConfigError(
            f"source={folder}: its token ids are those of another tokenizer than the run's (they differ in: {different}); give the same one"
        )
    return [str(file) for file in files]
