"""docs/results.md says of the regimes what their results file says."""

import json
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/results.md").read_text()
CELLS = [json.loads(line) for line in (ROOT / "docs/results/smollm2_regimes/results.jsonl").read_text().splitlines()]
OFF_POLICY = "knowledge_distillation_single_device"
KL = "distil.val_forward_kl"


def values(metric: str, method: str, replay: str = "none") -> list[float]:
    cells = [cell for cell in CELLS if (cell["axes"]["method"], cell["axes"]["replay"]) == (method, replay)]
    assert [cell["axes"]["seed"] for cell in cells] == [0, 1, 2]
    return [cell["metrics"][metric] for cell in cells]


def shown(numbers: list[float], form: str) -> str:
    return f"{mean(numbers):{form}} ± {stdev(numbers) / sqrt(len(numbers)):{form}}"


@pytest.mark.parametrize(
    ("name", "method", "replay"),
    [
        ("off-policy, forward KL", OFF_POLICY, "none"), ("SeqKD", "seqkd", "none"), ("GKD, half of the steps", "gkd", "none"),
        ("on-policy, reverse KL", "on_policy", "none"), ("DistiLLM", "distillm", "none"), ("MiniLLM", "minillm", "none"),
        ("speculative", "speculative", "none"), ("on-policy, reverse KL, half of the steps replayed", "on_policy", "half"),
    ],
)  # fmt: skip
def test_the_row_of_a_method(name: str, method: str, replay: str) -> None:
    kl = values(KL, method, replay)
    more = [one - other for one, other in zip(kl, values(KL, OFF_POLICY), strict=True)]
    difference = (
        "" if method == OFF_POLICY else f" ({mean(more):+.3f}, {mean(more) / (stdev(more) / sqrt(3)):.1f} s.e.)"
    )
    operations = shown([1e-12 * one for one in values("distil.total_flops", method, replay)], ".1f")
    same = shown([100 * one for one in values("distil.val_agreement", method, replay)], ".1f")
    class_loss, rouge = (
        shown(values(metric, method, replay), form)
        for metric, form in (("distil.val_class_loss", ".3f"), ("evaluate.rouge/alpaca", ".1f"))
    )
    row = f"| {operations} | {shown(kl, '.3f')}{difference} | {class_loss} | {same} % | {rouge} |"
    (line,) = [line for line in TEXT.splitlines() if line.startswith(f"| {name} |")]
    assert line.endswith(row)
