"""Saving in the background: the same folder as without, of the moment when `save` was called, and no error gets lost."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoint_samples import tiny_model
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader, load
from torchao.optim.subclass_8bit import OptimState8bit

from kdtune.checkpoint import CheckpointManager, manager, sharded, step_folders
from kdtune.distributed import to_cpu_copy
from kdtune.errors import CheckpointError
from kdtune.log import get_logger
from kdtune.models import Transformer, apply_lora


def trained(*, adapted: bool = False) -> tuple[Transformer, torch.optim.Optimizer]:
    """A model after a step of AdamW."""
    model = apply_lora(tiny_model(), lora_rank=2, use_dora=True) if adapted else tiny_model()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.01)
    step(model, optimizer)
    return model, optimizer


def step(model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    model(torch.arange(8).reshape(1, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def save(saver: CheckpointManager, number: int, model: Transformer, optimizer: torch.optim.Optimizer) -> Path:
    return saver.save(number, model=model, optimizer=optimizer, extra={"position": [0, number]}, metrics={})


class Gate:
    """A disk that takes nothing before it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = threading.Event()
        self.threads: list[str] = []
        write_shard = sharded._write_shard

        def slow(path: Path, shard: sharded._Shard) -> None:
            self.threads.append(threading.current_thread().name)
            assert self._open.wait(60)
            write_shard(path, shard)

        monkeypatch.setattr(sharded, "_write_shard", slow)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Opened at the latest when the test ends."""
    found = Gate(monkeypatch)
    yield found
    found.open()


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def full(path: Path, shard: sharded._Shard) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(sharded, "_write_shard", full)
        yield


def state_tensors(folder: Path) -> dict[str, torch.Tensor]:
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    load(found, storage_reader=FileSystemReader(folder), no_dist=True)
    return found


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "dora"])
def test_the_folder_is_that_of_the_moment(adapted: bool, tmp_path: Path, gate: Gate) -> None:
    """Training goes on while nothing can be written, and what it changes is not in the folder."""
    model, optimizer = trained(adapted=adapted)
    with CheckpointManager(tmp_path / "async", async_save=True) as saver:
        folder = save(saver, 1, model, optimizer)
        rng = torch.get_rng_state()
        for _ in range(3):
            step(model, optimizer)
            torch.rand(3)
        assert not folder.exists() and not step_folders(tmp_path / "async")
        gate.open()
    assert step_folders(tmp_path / "async") == [folder]
    assert set(gate.threads) == {"checkpoint"}

    model, optimizer = trained(adapted=adapted)
    torch.set_rng_state(rng)
    expected = save(CheckpointManager(tmp_path / "sync"), 1, model, optimizer)
    files = {path.relative_to(expected) for path in expected.rglob("*")}
    assert files == {path.relative_to(folder) for path in folder.rglob("*")}
    for file in files:
        # The metadata name each save by a number of its own, and the tensors' file is a zip with the time in it.
        if (expected / file).is_file() and file.suffix != ".distcp" and file.name != ".metadata":
            assert (folder / file).read_bytes() == (expected / file).read_bytes(), file
    ours, theirs = state_tensors(folder / "state"), state_tensors(expected / "state")
    assert ours.keys() == theirs.keys() and any("exp_avg" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_one_save_at_a_time_and_the_last_are_kept(tmp_path: Path) -> None:
    model, optimizer = trained()
    with CheckpointManager(tmp_path, keep_last_n=2, async_save=True) as saver:
        for number in range(1, 6):
            save(saver, number, model, optimizer)
            assert {folder.name for folder in step_folders(tmp_path)} >= (
                {f"step_{number - 1}"} if number > 1 else set()
            )
    assert [folder.name for folder in step_folders(tmp_path)] == ["step_4", "step_5"]
    assert not list(tmp_path.glob(".*"))


def test_a_failed_save_is_told_by_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()
    saver = CheckpointManager(tmp_path, async_save=True)
    with full_disk(monkeypatch):
        save(saver, 1, model, optimizer)
        with pytest.raises(CheckpointError, match=r"step_1: cannot be written: No space left on device .*free space"):
            save(saver, 2, model, optimizer)
    # It was told once; the folder of the second call was not begun.
    saver.wait()
    assert not list(tmp_path.iterdir())
    save(saver, 3, model, optimizer)
    saver.wait()
    assert [folder.name for folder in step_folders(tmp_path)] == ["step_3"]


def test_a_failed_save_is_told_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()
    with (
        full_disk(monkeypatch),
        pytest.raises(CheckpointError, match="step_1: cannot be written"),
        CheckpointManager(tmp_path, async_save=True) as saver,
    ):
        save(saver, 1, model, optimizer)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_and_kept(tmp_path: Path) -> None:
    model, optimizer = trained()
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1" / "mine").write_text("")
    saver = CheckpointManager(tmp_path, async_save=True)
    save(saver, 1, model, optimizer)
    with pytest.raises(CheckpointError, match="step_1: exists and is not empty"):
        saver.wait()
    assert [path.name for path in (tmp_path / "step_1").iterdir()] == ["mine"]


def test_the_runs_own_error_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was being saved is finished; where that fails too, it is only printed."""
    model, optimizer = trained()
    with pytest.raises(ZeroDivisionError), CheckpointManager(tmp_path, async_save=True) as saver:
        save(saver, 1, model, optimizer)
        raise ZeroDivisionError
    assert [folder.name for folder in step_folders(tmp_path)] == ["step_1"]
    monkeypatch.setattr(get_logger(), "propagate", True)
    with (
        full_disk(monkeypatch),
        pytest.raises(ZeroDivisionError),
        CheckpointManager(tmp_path, async_save=True) as saver,
    ):
        save(saver, 2, model, optimizer)
        raise ZeroDivisionError
    assert "the last checkpoint was not written" in caplog.text and "step_2: cannot be written" in caplog.text


def test_a_second_ctrl_c_waits_for_nothing(tmp_path: Path, gate: Gate) -> None:
    model, optimizer = trained()
    with pytest.raises(KeyboardInterrupt), CheckpointManager(tmp_path, async_save=True) as saver:
        save(saver, 1, model, optimizer)
        raise KeyboardInterrupt
    assert not step_folders(tmp_path)
    gate.open()
    saver.wait()
    assert [folder.name for folder in step_folders(tmp_path)] == ["step_1"]


def test_without_it_nothing_is_written_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "_in_background", None)
    folder = save(CheckpointManager(tmp_path), 1, *trained())
    assert step_folders(tmp_path) == [folder]


def test_a_copy_shares_nothing_with_a_quantized_optimizer_state() -> None:
    state = OptimState8bit.zeros((64, 256), signed=True, block_size=256)
    state.codes.random_()
    state.scale.uniform_()
    copied = to_cpu_copy(state)
    codes, scale = state.codes.clone(), state.scale.clone()
    state.codes.zero_()
    state.scale.zero_()
    assert type(copied) is OptimState8bit and copied.shape == (64, 256)
    assert torch.equal(copied.codes, codes) and torch.equal(copied.scale, scale)


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    """To the bit: widest dtypes first, then by name, the header padded to 8 bytes."""
    torch.manual_seed(0)
    dtypes = (torch.float16, torch.float32, torch.bfloat16, torch.float64)
    for length in range(9):
        tensors = {
            f"{name}{'x' * length}{index}": torch.randn(3 + index, 5).to(dtype)
            for index, dtype in enumerate(dtypes)
            for name in ("zürich", "a.weight", 'quote"')
        } | {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "transposed": torch.randn(4, 3).T}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs",
                  metadata={"format": "pt"})  # fmt: skip
        files = {"ours": {name: [tensor.detach] for name, tensor in tensors.items()}}
        sharded.tensor_writer(files, tensors)(tmp_path, None)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
