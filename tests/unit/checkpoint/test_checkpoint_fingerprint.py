"""Whether files are still what they were."""

from pathlib import Path

import pytest
import torch

from kdtune.checkpoint import Checkpointer, checkpointer, save_model
from kdtune.checkpoint.checkpointer import file_fingerprints
from kdtune.errors import CheckpointError
from kdtune.models import apply_lora, llama


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 400)
    return path


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("position", [0, 51_234, 102_399])
def test_one_bit_of_a_file_that_is_read_whole(file: Path, position: int) -> None:
    before = file_fingerprints([file])
    assert before == file_fingerprints([file])
    assert before[0].startswith("102,400 bytes, ")
    flip(file, position)
    assert before != file_fingerprints([file])


@pytest.mark.parametrize(("position", "is_noticed"), [(5, True), (20_500, True), (21_000, False), (102_390, True)])
def test_blocks_of_a_large_file(position: int, is_noticed: bool, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ends, and 100 bytes in every 10,240."""
    for name, value in (("WHOLE_BYTES", 2**16), ("BLOCK_BYTES", 100), ("STRIDE_BYTES", 10_240), ("_CHUNK_BYTES", 1000)):
        monkeypatch.setattr(checkpointer, name, value)
    before = file_fingerprints([file])
    flip(file, position)
    assert (before != file_fingerprints([file])) == is_noticed


def test_a_large_model_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 GB, of which the file system holds nothing."""
    files = [tmp_path / str(number) for number in range(4)]
    for file in files:
        with file.open("wb") as opened:
            opened.truncate(4 * 10**9)
    read = []
    sha256 = checkpointer.hashlib.sha256

    class Counting:
        def __init__(self) -> None:
            self._hash = sha256()

        def update(self, block: bytes) -> None:
            read.append(len(block))
            self._hash.update(block)

        def hexdigest(self) -> str:
            return self._hash.hexdigest()

    monkeypatch.setattr(checkpointer.hashlib, "sha256", Counting)
    file_fingerprints(files)
    assert sum(read) < 300 * 10**6 and len(read) < 4000


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'gone'}: cannot be read: No such file"):
        file_fingerprints([tmp_path / "gone"])


def test_of_a_model_with_an_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "embed_dim": 16, "num_layers": 1, "num_heads": 2, "intermediate_dim": 32}
    save_model(llama(**sizes), tmp_path / "model")
    save_model(apply_lora(llama(**sizes), lora_rank=2), tmp_path / "adapter", save_weights="adapter")
    found = Checkpointer(tmp_path / "model", adapter_dir=tmp_path / "adapter").fingerprint()
    assert list(found) == [
        "config", "model.safetensors", "adapter_dir/adapter_config.json", "adapter_dir/adapter_model.safetensors",
    ]  # fmt: skip
    assert found["config"]["embed_dim"] == 16
