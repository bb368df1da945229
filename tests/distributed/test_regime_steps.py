"""Steps of each shipped regime, writing included, on two processes and on one, in float64."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_loss_gradients import float64_model

from kdtune import config
from kdtune.config.load import read_yaml
from kdtune.data import Batch, quickstart_dataset
from kdtune.distributed import Parallelism, World, full_tensor
from kdtune.losses import KDLoss
from kdtune.models import Transformer
from kdtune.parallel import shard_model
from kdtune.rollouts import Rollouts
from kdtune.teachers import OnlineTeacher
from kdtune.tokenizers import byte_tokenizer
from recipes.knowledge_distillation import kd_step

CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
NUM_MICRO_BATCHES, BATCH_SIZE = 4, 2
OWN = {
    # A step that writes, and one that learns again from what it has written.
    "distillm": {"policy": {"_component_": "kdtune.rollouts.DistiLLMSchedule", "start": 1.0, "replay": "increasing"}, "buffer_size": 8},
    "gkd": {"policy": {"_component_": "kdtune.rollouts.Share", "student": 0.5}},
}  # fmt: skip
SOURCES = {"gkd": {0.0, 1.0}}


def trained(name: str, student: Transformer, world: World) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Weights after some steps of SGD, and what is recorded of each step's text."""
    values: dict[str, Any] = read_yaml(CONFIGS / f"{name}.yaml")
    rollouts: Rollouts = config.instantiate({**values["rollouts"], "max_new_tokens": 6, **OWN.get(name, {})})
    tokenizer = byte_tokenizer(max_seq_len=128)
    dataset = quickstart_dataset(tokenizer, split="train[:20]", prompt="plain", train_on="answers", truncation="right")
    teacher = OnlineTeacher(float64_model(width=48, vocab_size=320, seed=1))
    cfg = SimpleNamespace(teacher=None, seed=0, kd_ratio=values["kd_ratio"], batch_size=BATCH_SIZE,
                          tokens_per_micro_batch=None, padding_free=True, device="cpu")  # fmt: skip
    inputs = SimpleNamespace(cfg=cfg, tokenizer=tokenizer, num_steps=1000)
    rollouts.start(inputs, student, teacher, world, context=128)
    kd_loss = config.instantiate(values.get("kd_loss"))
    loss_fn, optimizer = KDLoss(kd_loss, kd_ratio=cfg.kd_ratio), torch.optim.SGD(student.parameters(), lr=0.5)
    found = []
    for number in range(6 if name == "gkd" else 2):
        every = [
            dataset.collate([dataset[2 * i], dataset[2 * i + 1]], tokenizer.pad_id) for i in range(NUM_MICRO_BATCHES)
        ]
        step = SimpleNamespace(number=number, batches=every[world.dp_rank :: world.dp_size], position=(0, number),
                               writing=lambda num_texts: lambda number: None)  # fmt: skip
        batches: list[Batch] = rollouts.batches(step)
        (num_tokens,) = world.sum([sum(batch.num_valid_tokens for batch in batches)])
        sums: dict[str, float] = {}
        for batch in batches:
            loss, parts = kd_step(student, teacher, loss_fn, batch)
            (loss / num_tokens).backward()
            for part, value in parts.items():
                sums[part] = sums.get(part, 0.0) + float(value)
        optimizer.step()
        optimizer.zero_grad()
        means = [total / num_tokens for total in world.sum(list(sums.values()))]
        row = rollouts.described({**dict(zip(sums, means, strict=True)), "num_valid_tokens": num_tokens})
        row.pop("generation_seconds", None)
        found.append(row)
    return {key: full_tensor(one.detach()) for key, one in student.named_parameters()}, found


def compare(names: tuple[str, ...], layout: dict[str, int]) -> None:
    torch.set_num_threads(1)
    with Parallelism(**layout).start_world(torch.device("cpu")) as world:
        for name in names:
            start = float64_model(width=32, vocab_size=320, seed=0)
            before = {key: one.detach().clone() for key, one in start.named_parameters()}
            found, rows = trained(name, shard_model(start, Parallelism(**layout), world), world)
            alone = float64_model(width=32, vocab_size=320, seed=0)
            expected, expected_rows = trained(name, alone, World(torch.device("cpu")))
            assert {row["rollout_share"] for row in rows} == SOURCES.get(name, {1.0}), name
            for ours, theirs in zip(rows, expected_rows, strict=True):
                assert ours.keys() == theirs.keys(), name
                for key, value in theirs.items():
                    # A policy gradient's whitened advantages add up to about 0.
                    assert abs(ours[key] - value) <= 1e-9 * max(abs(value), 1e-3), (name, key, ours[key], value)
            for key, one in expected.items():
                moved = (one - before[key]).norm()
                assert one.dtype == torch.float64 and moved > 1e-4, (name, key)
                assert (found[key] - one).norm() < 1e-9 * moved, (name, key)


COPIES, SHARDS = {"dp_replicate": 2, "dp_shard": 1}, {"dp_shard": 2}


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        pytest.param(("distillm", "minillm"), COPIES, id="copies"),
        pytest.param(("gkd", "on_policy", "seqkd", "distillm2", "speculative"), COPIES, id="the others",
                     marks=pytest.mark.slow("regimes that have less of their own in a step")),
        # Where both models write a text, every process has whole ones.
        pytest.param(("gkd", "on_policy", "distillm", "seqkd", "distillm2"), SHARDS, id="shards",
                     marks=pytest.mark.slow("shards in place of copies; the quick tests of ranks have a regime in shards too")),
    ],
)  # fmt: skip
def test_two_processes_make_the_steps_of_one(names: tuple[str, ...], layout: dict[str, int], launch) -> None:
    launch.call(compare, names, layout, ranks=2)
