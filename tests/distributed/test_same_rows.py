"""Processes that were given different rows end at the start, all with the same message."""

import json
import os
import re
from pathlib import Path

import pytest

from kdtune.data import Dataset, alpaca_dataset
from kdtune.tokenizers import Tokenizer

FINETUNE = ("run", "finetune", "--config", "tiny/finetune", "sample_prompts=[]")


def rows(tokenizer: Tokenizer, folder: str, more: int = 0) -> Dataset:
    """A user's own dataset that depends on the process: with `more`, how many rows there are does too."""
    rank = int(os.environ["RANK"])
    path = Path(folder) / f"rank{rank}.jsonl"
    lines = [{"instruction": f"{rank} {i}", "input": "", "output": "x"} for i in range(8 + more * rank)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return alpaca_dataset(tokenizer, source=str(path))


@pytest.mark.parametrize(
    ("key", "more", "said"),
    [("dataset", 8, "rank 0: 8 examples, .*; rank 1: 16 examples, "), ("dataset_val", 0, "rank 0: 8 .*; rank 1: 8 ")],
)
def test_other_rows_on_a_process(key: str, more: int, said: str, launch, tmp_path: Path) -> None:
    ended = launch.kdtune(
        *FINETUNE, f"output_dir={tmp_path / 'out'}", f"{key}=test_same_rows.rows", f"{key}.folder={tmp_path}",
        f"{key}.more={more}", ranks=2,
    )  # fmt: skip
    assert [rank.code for rank in ended] == [2, 2]
    text = "".join(rank.text for rank in ended)
    assert f"{key}: the processes have different rows" in text and text.count("different rows") == 1
    assert re.search(said, text)
    assert not (tmp_path / "out").exists()
