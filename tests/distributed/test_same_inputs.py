"""Processes that were given different rows or weights end at the start, all with the same message."""

import json
import os
import re
from pathlib import Path
from shutil import copytree

from safetensors.torch import load_file, save_file

from kdtune._cli.main import main
from kdtune.data import Dataset, alpaca_dataset
from kdtune.tokenizers import Tokenizer

FINETUNE = ("run", "finetune", "--config", "tiny/finetune", "sample_prompts=[]")


def rows(tokenizer: Tokenizer, folder: str) -> Dataset:
    """A user's own dataset that depends on the process."""
    rank = int(os.environ["RANK"])
    path = Path(folder) / f"rank{rank}.jsonl"
    lines = [{"instruction": f"{rank} {i}", "input": "", "output": "x"} for i in range(8 + 8 * rank)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return alpaca_dataset(tokenizer, source=str(path))


def test_other_rows_on_a_process(launch, tmp_path: Path) -> None:
    ended = launch.kdtune(
        *FINETUNE, f"output_dir={tmp_path / 'out'}", "dataset=test_same_inputs.rows", f"dataset.folder={tmp_path}", ranks=2
    )  # fmt: skip
    assert [rank.code for rank in ended] == [2, 2]
    text = "".join(rank.text for rank in ended)
    assert text.count("dataset: the processes have different rows") == 1
    assert re.search("rank 0: 8 examples, .*; rank 1: 16 examples, ", text)
    assert not (tmp_path / "out").exists()


def on_a_host_of_its_own(folder: Path) -> None:
    os.chdir(folder / f"host{os.environ['RANK']}")
    os.environ["LOCAL_RANK"] = "0"
    weights = "checkpointer={_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: model}"
    main([*FINETUNE, f"output_dir={folder / 'out'}", "~model", weights])


def test_other_weights_on_a_host(launch, small_model: Path, tmp_path: Path) -> None:
    for host in range(2):
        copytree(small_model, tmp_path / f"host{host}" / "model")
    file = tmp_path / "host1" / "model" / "model.safetensors"
    tensors = {name: tensor + host for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    ended = launch.wait(launch.start(on_a_host_of_its_own, tmp_path, ranks=2))
    assert [rank.code for rank in ended] == [2, 2]
    said = "checkpointer.model.safetensors: the hosts have different files under the same path (rank 0: "
    assert said in ended[0].text and "read them from a disk that all share" in ended[0].text
    assert not (tmp_path / "out").exists()
