"""Tables with error bars, plots and a web page from a sweep's results.

    kdtune run report results=runs/sweeps/tiny/results.jsonl overwrite=true
    kdtune run report results=results.jsonl output_dir=by_method metrics=[evaluate.*] baseline.method=sft

Writes report.md, report.csv (a line for each row of cells that differ in the seed alone), cells.csv, report.tex, plots of the losses
(PNG, SVG, PDF) and report.html, one self-contained file. A sweep writes the same at its end, into report/ beside its
results; an existing report is replaced only with overwrite=true.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdtune import config, reports, runs


@dataclass(kw_only=True)
class Config:
    """All keys of this recipe."""

    results: config.PathText
    """The results.jsonl of a sweep; the curves are read from the step folders beside it, if they still exist."""
    output_dir: config.PathText | None = None
    """Folder to write into; null: report/ beside the results, where a sweep writes its own."""
    overwrite: bool = False
    """Replace an existing report in the folder; otherwise it is an error."""
    title: str | None = None
    """Heading of the report; null: the results' path."""
    metrics: list[str] | None = None
    """Metrics to show, STEP.NAME or patterns such as evaluate.*; null: all but standard errors."""
    baseline: dict[str, Any] | None = None
    """Axis values of the baseline of the rows; null: no comparison. If one row has them, it is the baseline of all others;
    if several have them, each other row is compared with the one that differs from it only in these axes."""

    def machine_problems(self) -> list[str]:
        """Return machine problems, found before anything is written."""
        if not Path(self.results).is_file():
            return [f"results={self.results}: no such file; a sweep writes results.jsonl into its output_dir"]
        folder = self.folder()
        if (folder / "report.md").exists() and not self.overwrite:
            return [f"output_dir={folder}: holds a report; overwrite=true replaces it, or choose another output_dir"]
        return []

    def folder(self) -> Path:
        """Return the report's folder."""
        return Path(self.output_dir) if self.output_dir else Path(self.results).parent / "report"


@config.entry_point(Config, default_config="sweeps/report")
def main(cfg: Config) -> None:
    """Run the recipe."""
    run(cfg)


def run(cfg: Config) -> None:
    """Read the results, write the report and print its path."""
    title = cfg.title or f"Sweep {cfg.results}"
    with runs.Progress() as progress:
        progress.phase("writing the report")
        files = reports.write_report(cfg.results, cfg.folder(), title=title, metrics=cfg.metrics, baseline=cfg.baseline)
    print("\n".join(map(str, files)))


if __name__ == "__main__":
    main()
