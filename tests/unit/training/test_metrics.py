import pytest
import torch

from kdtune.constants import IGNORE_INDEX
from kdtune.data import Batch
from kdtune.distributed import World
from kdtune.errors import TrainingError
from kdtune.training import Metrics


def batch(valid: int, tokens: int | None = None, padded: int = 0) -> Batch:
    """One row with so many labels, of so many tokens (by default as many), and padding after them."""
    tokens = valid if tokens is None else tokens
    labels = torch.full((1, tokens + padded), IGNORE_INDEX)
    labels[0, :valid] = 1
    return Batch.from_labels(torch.zeros_like(labels), labels, (tokens,))


def test_means_are_over_tokens_not_over_micro_batches():
    metrics = Metrics()
    metrics.add({"loss": torch.tensor(30.0), "kd_loss": torch.tensor(3.0)}, batch(10))
    metrics.add({"loss": torch.tensor(1.0), "kd_loss": torch.tensor(1.0)}, batch(1))
    row = metrics.pop()
    assert row["loss"] == 31 / 11
    assert row["kd_loss"] == 4 / 11
    assert row["num_valid_tokens"] == 11


def test_sums_are_added_in_float64():
    metrics = Metrics()
    metrics.add({"loss": torch.tensor(2.0**24), "class_loss": torch.tensor(2.0**53, dtype=torch.float64)}, batch(1))
    for _ in range(3):
        metrics.add({"loss": torch.tensor(1.0), "class_loss": torch.tensor(1.0)}, batch(0, 4))
    row = metrics.pop()
    assert row["loss"] == 2.0**24 + 3  # float32 would stay at 2**24
    assert row["class_loss"] == 2.0**53 + 4  # 2**53 + 3 rounded once, to even; one by one it would stay at 2**53


def test_the_parts_are_detached_and_fetched_only_at_pop(monkeypatch):
    value = torch.tensor(2.0, requires_grad=True) * 3
    metrics = Metrics()
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__float__"):
            patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("waited for the device"))
        metrics.add({"loss": value}, batch(2))
    assert metrics.pop()["loss"] == 3.0


def test_speed_counts_all_tokens_of_the_whole_step_and_leaves_out_what_is_told():
    now = [100.0]
    metrics = Metrics(clock=lambda: now[0])
    with metrics.waiting_for_data():
        now[0] += 0.5
    metrics.add({"loss": torch.tensor(1.0)}, batch(5, 30, 2))
    now[0] += 2.0
    metrics.add({"loss": torch.tensor(1.0)}, batch(5, 50, 7))
    with metrics.waiting_for_data():
        now[0] += 0.25
    now[0] += 0.25
    row = metrics.pop(grad_norm=torch.tensor(1.5))
    counts = {"num_valid_tokens": 10, "num_padded_tokens": 9, "flops": 0}
    times = {"step_seconds": 3.0, "data_seconds": 0.75, "tokens_per_second": 80 / 3}
    assert row == {"loss": 0.2, **counts, "grad_norm": 1.5, **times}
    now[0] += 1.0  # the optimizer, whose time is the next step's
    with metrics.paused():
        now[0] += 1000.0  # a validation
    now[0] += 1.0
    metrics.add({"loss": torch.tensor(1.0)}, batch(1, 7))
    row = metrics.pop()
    assert row["num_valid_tokens"] == 1  # the first step is gone
    assert (row["step_seconds"], row["data_seconds"], row["tokens_per_second"]) == (2.0, 0.0, 3.5)
    now[0] += 5.0
    metrics.restart_clock()
    now[0] += 1.0
    metrics.add({"loss": torch.tensor(1.0)}, batch(1, 7))
    assert metrics.pop()["step_seconds"] == 1.0


def test_the_batch_of_a_process_without_examples_pads_nothing():
    metrics = Metrics()
    metrics.add({"loss": torch.tensor(1.0)}, batch(1))
    metrics.add({"loss": torch.tensor(0.0)}, batch(0, 0, 1))
    assert metrics.pop()["num_padded_tokens"] == 0


def test_no_valid_token_is_an_error():
    metrics = Metrics()
    metrics.add({"loss": torch.tensor(0.0)}, batch(0, 3))
    with pytest.raises(TrainingError, match="0 valid tokens"):
        metrics.pop()


def test_means_are_over_all_processes():
    """Another process has as many sums again, over 6 of 10 tokens."""
    seen = []

    class Two(World):
        def sum(self, values):
            seen.append(list(values))
            return [2 * value for value in values]

    metrics = Metrics(Two(torch.device("cpu"), size=2), clock=iter([0.0, 0.5, 1.0, 2.0]).__next__)
    with metrics.waiting_for_data():
        pass
    metrics.add({"loss": torch.tensor(12.0), "kd_loss": torch.tensor(3.0)}, batch(6, 10, 1))
    found = metrics.pop()
    assert seen == [[12.0, 3.0, 6, 10, 1, 0, 0.5]]
    counts = {"num_valid_tokens": 12, "num_padded_tokens": 2, "flops": 0}
    assert found == {
        "loss": 2.0,
        "kd_loss": 0.5,
        **counts,
        "step_seconds": 2.0,
        "data_seconds": 0.5,
        "tokens_per_second": 10.0,
    }
