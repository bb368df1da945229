"""docs/results.md says what its results file says: the table as the report writes it, and every number of the text."""

import json
import re
from itertools import combinations
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

import pytest

from kdtune import sweeps
from kdtune.config.load import read_yaml

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/results.md").read_text()
RESULTS = ROOT / "docs/results/smollm2_case_study/results.jsonl"
SWEEP = read_yaml(ROOT / "configs/sweeps/smollm2_case_study.yaml")
# What is no result: ratios, Student's bound for three pairs, a guess among five answers and its error over 100 documents.
GIVEN = {0.25, 0.5, 0.75, 4.3, 0.2, 0.04}


def section(title: str) -> str:
    return TEXT.split(f"### {title}\n")[1].split("\n##")[0]


def test_the_table_is_the_reports(tmp_path: Path) -> None:
    sweeps.write_report(RESULTS, tmp_path, title="any", metrics=SWEEP["metrics"], baseline=SWEEP["baseline"])
    report = (tmp_path / "report.md").read_text()
    (table,) = re.findall(r"## Results\n\n((?:\|.*\n)+)", report)
    assert table in section("All rows")
    shipped = (RESULTS.parent / "report.md").read_text()
    assert table in shipped and report.split("## Difference")[1].split("![")[0] in shipped


def known_values() -> list[float]:
    """Every metric of every cell; means and standard errors over seeds; differences of rows, and those in standard errors."""
    cells = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    rows: dict[str, list[dict[str, float]]] = {}
    for cell in cells:
        rows.setdefault(re.sub(r" seed=\d+", "", cell["cell"]), []).append(cell["metrics"])
    values = []
    for name in {name for cell in cells for name in cell["metrics"] if name.startswith("evaluate.")}:
        series = {row: [seed[name] for seed in seeds] for row, seeds in rows.items()}
        for numbers in series.values():
            values += [*numbers, mean(numbers), stdev(numbers) / sqrt(len(numbers)) if len(numbers) > 1 else 0.0]
        for one, other in combinations(series.values(), 2):
            values.append(mean(one) - mean(other))
            if len(one) == len(other) > 1 and (error := stdev(a - b for a, b in zip(one, other, strict=True))):
                values.append(values[-1] / (error / sqrt(len(one))))
    return [*values, *(100 * value for value in values)]


@pytest.mark.parametrize("number", sorted(set(re.findall(r"\d+\.\d+", section("What it says")))))
def test_every_number_of_the_text_is_in_the_results(number: str) -> None:
    half = 0.5 * 10 ** -len(number.partition(".")[2])
    found = [value for value in known_values() if abs(abs(value) - float(number)) <= half * (1 + 1e-9)]
    assert found or float(number) in GIVEN
