"""The components that torchtune's config names: rows of token ids that kdtune wrote, and a tokenizer of only a padding id."""

import json
from typing import Any

from torch.utils.data import Dataset
from torchtune.datasets import PackedDataset


class PaddingOnly:
    """A tokenizer for a recipe whose data is tokenized already."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id
        self.max_seq_len = None


class Rows(Dataset):  # type: ignore[type-arg]
    """Rows of "tokens" and "labels", not shifted."""

    def __init__(self, path: str) -> None:
        with open(path, encoding="utf-8") as file:
            self._rows = json.load(file)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {name: list(self._rows[index][name]) for name in ("tokens", "labels")}


def rows(tokenizer: PaddingOnly, path: str, packed_to: int | None = None, packed: bool = False) -> Any:
    """Return the rows, or packs of them of `packed_to` tokens."""
    if packed_to is None:
        return Rows(path)
    return PackedDataset(Rows(path), max_seq_len=packed_to, padding_idx=tokenizer.pad_id)
