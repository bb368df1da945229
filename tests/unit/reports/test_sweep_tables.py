"""Which metrics a report's tables show."""

from kdtune.reports.rows import Row
from kdtune.reports.tables import chosen_metrics

METRICS = {
    "train.loss": 1.0,
    "train.class_loss": 2.0,
    "train.kd_loss": 0.5,
    "evaluate.acc": 0.3,
    "evaluate.acc_stderr,none": 0.1,
}


def rows(*ratios: float) -> list[Row]:
    return [Row({"kd_ratio": ratio, "lr": 1e-4}, ({"metrics": METRICS},)) for ratio in ratios]


def test_the_total_loss_is_left_out_where_its_weights_differ() -> None:
    assert chosen_metrics(rows(0.0, 0.5), None) == ["train.class_loss", "train.kd_loss", "evaluate.acc"]
    assert chosen_metrics(rows(0.5, 0.5), None) == ["train.loss", "train.class_loss", "train.kd_loss", "evaluate.acc"]
    assert chosen_metrics(rows(0.0, 0.5), ["train.loss"]) == ["train.loss"]  # where it is asked for
