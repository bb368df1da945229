"""Every family on two processes, sharded by FSDP2 or divided by tensor parallelism: loss and gradients of one process, in float64."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from family_models import REFERENCES, assert_same, reference
from torch import distributed as dist

from kdtune import losses, parallel
from kdtune.checkpoint import Checkpointer
from kdtune.constants import IGNORE_INDEX
from kdtune.distributed import Parallelism, World, full_tensor, to_local
from kdtune.models import Documents, Transformer

# What two processes cannot divide by heads, one key head, they are given two of.
CHANGES: dict[str, dict[str, Any]] = {
    name: {"num_key_value_heads": 2}
    for name, (_, settings) in REFERENCES.items()
    if settings.get("num_key_value_heads") == 1
}
LAYOUTS = {"FSDP2": Parallelism(dp_shard=2), "TP": Parallelism(dp_shard=1, tp=2)}
# Of each process; longer and shorter than the windows, and than the text from which on LongRoPE rotates otherwise.
LENGTHS = ([9, 4], [2, 17])


def batches() -> list[tuple[torch.Tensor, Documents, torch.Tensor]]:
    """Tokens [1, T], documents and labels of each process."""
    torch.manual_seed(1)
    made = []
    for lengths in LENGTHS:
        tokens, labels = torch.randint(96, (2, 1, sum(lengths)))
        labels[0, [0, 3]] = IGNORE_INDEX
        made.append((tokens, Documents.of_lengths(lengths), labels))
    return made


def built(folder: Path, world: World, parallelism: Parallelism) -> tuple[Transformer, Transformer]:
    """Student and teacher."""
    settings: dict[str, Any] = {"dtype": torch.float64, "world": world, "parallelism": parallelism}
    student = parallel.build_model(None, Checkpointer(folder / "student"), **settings)
    return student, parallel.build_model(None, Checkpointer(folder / "teacher"), trainable=False, **settings)


def loss_and_gradients(models: tuple[Transformer, Transformer], ranks: list[int]) -> dict[str, torch.Tensor]:
    """Of the batches of these processes together, divided by the valid tokens of both."""
    (student, teacher), total = models, torch.zeros(())
    kd_loss, all_batches = losses.KDLoss(losses.ForwardKLLoss(), kd_ratio=0.5, chunk_size=7), batches()
    num_valid_tokens = sum((labels != IGNORE_INDEX).sum() for _, _, labels in all_batches)
    for tokens, documents, labels in (all_batches[rank] for rank in ranks):
        signal = losses.HiddenSignal(teacher(tokens, documents=documents, return_hidden=True), teacher.output)
        hidden = student(tokens, documents=documents, return_hidden=True)
        loss = kd_loss(hidden, student.output, signal, labels)[0] / num_valid_tokens
        loss.backward()
        total = total + loss.detach()
    gradients = {name: full_tensor(one.grad) for name, one in student.named_parameters() if one.grad is not None}
    return {"loss": total, **gradients}


def compare(folder: Path, names: list[str]) -> None:
    torch.set_default_dtype(torch.float64)
    with LAYOUTS["FSDP2"].start_world(torch.device("cpu")) as world:
        for name in names:
            alone = built(folder / name, World(torch.device("cpu")), Parallelism())
            expected = loss_and_gradients(alone, [0, 1])
            assert len(expected) == 1 + len(list(alone[0].parameters()))
            for layout, parallelism in LAYOUTS.items():
                models = built(folder / name, world, parallelism)
                is_cut = [to_local(one).numel() < one.numel() for model in models for one in model.parameters()]
                assert all(is_cut) if layout == "FSDP2" else any(is_cut), name
                found = loss_and_gradients(models, [world.rank] if layout == "FSDP2" else [0, 1])
                if layout == "FSDP2":
                    dist.all_reduce(found["loss"])
                assert found.keys() == expected.keys(), (name, layout)
                for key, one in expected.items():
                    assert one.dtype == torch.float64 and one.abs().max() > 0, (name, key)
                    try:
                        assert_same(found[key], one, 1e-9)
                    except AssertionError as error:
                        raise AssertionError(f"{name}, {layout}, {key}: {error}") from error
        dist.barrier()


EVERY_FAMILY = pytest.mark.slow("six models of each of 25 configs, on two processes; the quick tests have two")


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["olmo2", "gemma2"], id="two"),
        pytest.param(list(REFERENCES), id="every", marks=EVERY_FAMILY),
    ],
)
def test_two_processes_have_the_gradients_of_one(names: list[str], launch, tmp_path: Path) -> None:
    for name in names:
        for seed, role in enumerate(("student", "teacher")):
            reference(name, tmp_path / name / role, seed=seed, **CHANGES.get(name, {}))
    launch.call(compare, tmp_path, names, ranks=2, timeout=30 * len(names))


@pytest.mark.parametrize("name", CHANGES)
def test_one_key_head_is_not_divided(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a weight is read."""
    reference(name, tmp_path)
    monkeypatch.setattr("kdtune.checkpoint.checkpointer.fill_model", lambda *_, **__: pytest.fail("a weight is read"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    node = {"_component_": "kdtune.checkpoint.Checkpointer", "checkpoint_dir": str(tmp_path)}
    cfg = SimpleNamespace(
        parallelism={"_component_": "kdtune.distributed.Parallelism", "tp": 2}, checkpointer=node, dtype="fp32"
    )
    wanted = "parallelism: tp=2 does not divide num_kv_heads=1; allowed for this model: 1"
    assert parallel.problems(cfg) == [wanted]
