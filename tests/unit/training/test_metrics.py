import pytest
import torch

from kdtune.errors import TrainingError
from kdtune.training import Metrics


def test_means_are_over_tokens_not_over_micro_batches():
    metrics = Metrics()
    metrics.add({"loss": torch.tensor(30.0), "kd_loss": torch.tensor(3.0)}, num_valid_tokens=10)
    metrics.add({"loss": torch.tensor(1.0), "kd_loss": torch.tensor(1.0)}, num_valid_tokens=1)
    row = metrics.pop()
    assert row["loss"] == 31 / 11
    assert row["kd_loss"] == 4 / 11
    assert row["num_valid_tokens"] == 11


def test_sums_are_added_in_float64():
    metrics = Metrics()
    metrics.add(
        {"loss": torch.tensor(2.0**24), "class_loss": torch.tensor(2.0**53, dtype=torch.float64)}, num_valid_tokens=1
    )
    for _ in range(3):
        metrics.add({"loss": torch.tensor(1.0), "class_loss": torch.tensor(1.0)}, num_valid_tokens=0)
    row = metrics.pop()
    assert row["loss"] == 2.0**24 + 3  # float32 would stay at 2**24
    assert row["class_loss"] == 2.0**53 + 4  # 2**53 + 3 rounded once, to even; one by one it would stay at 2**53


def test_the_parts_are_detached_and_fetched_only_at_pop(monkeypatch):
    value = torch.tensor(2.0, requires_grad=True) * 3
    metrics = Metrics()
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__float__"):
            patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("waited for the device"))
        metrics.add({"loss": value}, num_valid_tokens=2)
    assert metrics.pop()["loss"] == 3.0


def test_speed_counts_all_tokens_and_leaves_out_what_is_told():
    now = [100.0]
    metrics = Metrics(clock=lambda: now[0])
    metrics.add({"loss": torch.tensor(1.0)}, num_valid_tokens=5, num_tokens=30)
    now[0] += 2.0
    metrics.add({"loss": torch.tensor(1.0)}, num_valid_tokens=5, num_tokens=50)
    now[0] += 2.0
    assert metrics.pop()["tokens_per_second"] == 20.0
    now[0] += 1000.0  # a validation
    metrics.restart_clock()
    now[0] += 1.0
    metrics.add({"loss": torch.tensor(1.0)}, num_valid_tokens=1, num_tokens=7)
    row = metrics.pop()
    assert row["tokens_per_second"] == 7.0
    assert row["num_valid_tokens"] == 1  # the first step is gone


def test_no_valid_token_is_an_error():
    metrics = Metrics()
    metrics.add({"loss": torch.tensor(0.0)}, num_valid_tokens=0)
    with pytest.raises(TrainingError, match="0 valid tokens"):
        metrics.pop()


def test_means_are_over_all_processes():
    """Another process has as many sums again, over 6 of 10 tokens."""
    seen = []

    def total(values):
        seen.append(list(values))
        return [2 * value for value in values]

    metrics = Metrics(total, clock=iter([0.0, 2.0]).__next__)
    metrics.add({"loss": torch.tensor(12.0), "kd_loss": torch.tensor(3.0)}, num_valid_tokens=6, num_tokens=10)
    found = metrics.pop()
    assert seen == [[12.0, 3.0, 6, 10]]
    assert found == {"loss": 2.0, "kd_loss": 0.5, "num_valid_tokens": 12, "tokens_per_second": 10.0}
