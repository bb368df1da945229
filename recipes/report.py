"""Tables with error bars, plots and a web page from a sweep's results.

    kdtune run report results=runs/sweeps/tiny/results.jsonl
    kdtune run report results=results.jsonl output_dir=report metrics=[evaluate.*] baseline.method=sft

Writes report.md, report.csv (a line for each row of cells that differ in the seed alone), cells.csv, report.tex, plots of the losses
(PNG, SVG, PDF) and report.html, one file that opens anywhere. A sweep calls the same at its end.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdtune import config, sweeps


@dataclass(kw_only=True)
class Config:
    """Every key this recipe reads."""

    results: config.PathText
    """The results.jsonl of a sweep; the curves are read from the step folders beside it, where they still are."""
    output_dir: config.PathText | None = None
    """Folder to write into; null: report, beside the results."""
    title: str | None = None
    """Heading of the report; null: the results' path."""
    metrics: list[str] | None = None
    """Metrics to show, STEP.NAME or patterns such as evaluate.*; null: all but standard errors."""
    baseline: dict[str, Any] | None = None
    """Axis values of the row that the others are compared with; null: no comparison."""

    def machine_problems(self) -> list[str]:
        """Return machine problems, found before anything is written."""
        if not Path(self.results).is_file():
            return [f"results={self.results}: no such file; a sweep writes results.jsonl into its output_dir"]
        return []


@config.entry_point(Config, default_config="sweeps/report")
def main(cfg: Config) -> None:
    """Runs the recipe."""
    run(cfg)


def run(cfg: Config) -> None:
    """Reads the results, writes the report and says where."""
    output_dir = cfg.output_dir or Path(cfg.results).parent / "report"
    title = cfg.title or f"Sweep {cfg.results}"
    files = sweeps.write_report(cfg.results, output_dir, title=title, metrics=cfg.metrics, baseline=cfg.baseline)
    print("\n".join(map(str, files)))


if __name__ == "__main__":
    main()
