"""Tables with error bars, plots and a web page from a sweep's results; or the web page of one training run.

    kdtune run report results=runs/sweeps/tiny/results.jsonl overwrite=true
    kdtune run report results=results.jsonl output_dir=by_method metrics=[evaluate.*] baseline.method=sft
    kdtune run report run=runs/tiny-on-policy

Writes report.md, report.csv (a line for each row of cells that differ in the seed alone), cells.csv, report.tex, plots of the losses
(PNG, SVG, PDF) and report.html, one self-contained file. A sweep writes the same at its end, into report/ beside its
results; an existing report is replaced only with overwrite=true. Of a run, also of one that is under way, it is report.html alone.
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
    run: config.PathText | None = None
    """The folder of a training run, in place of a sweep's results."""
    output_dir: config.PathText | None = None
    """Folder to write into; null: report/ beside the results, where a sweep writes its own, or in the run's folder."""
    overwrite: bool = False
    """Replace an existing report in the folder; otherwise it is an error."""
    title: str | None = None
    """Heading of the report; null: the path of the results or the run."""
    metrics: list[str] | None = None
    """Metrics to show, STEP.NAME or patterns such as evaluate.*; null: all but standard errors."""
    baseline: dict[str, Any] | None = None
    """Axis values of the baseline of the rows; null: no comparison. If one row has them, it is the baseline of all others;
    if several have them, each other row is compared with the one that differs from it only in these axes."""

    def problems(self) -> list[str]:
        """Return config problems, one sentence each."""
        if self.run is not None and (self.metrics is not None or self.baseline is not None):
            return ["metrics, baseline: are about a sweep's rows; of a run all is shown; leave them out"]
        return []

    def machine_problems(self) -> list[str]:
        """Return machine problems, found before anything is written."""
        if self.run is not None and not (Path(self.run) / "metrics.jsonl").is_file():
            return [f"run={self.run}: holds no training run: there is no metrics.jsonl"]
        if self.run is None and not Path(self.results).is_file():
            return [f"results={self.results}: no such file; a sweep writes results.jsonl into its output_dir"]
        folder = self.folder()
        if (folder / ("report.md" if self.run is None else "report.html")).exists() and not self.overwrite:
            return [f"output_dir={folder}: holds a report; overwrite=true replaces it, or choose another output_dir"]
        return []

    def folder(self) -> Path:
        """Return the report's folder."""
        beside = Path(self.run) if self.run is not None else Path(self.results).parent
        return Path(self.output_dir) if self.output_dir else beside / "report"


@config.entry_point(Config, default_config="sweeps/report")
def main(cfg: Config) -> None:
    """Run the recipe."""
    run(cfg)


def run(cfg: Config) -> None:
    """Read the results or the run, write the report and print its path."""
    with runs.Progress() as progress:
        progress.phase("writing the report")
        if cfg.run is not None:
            files = reports.write_run_page(cfg.run, cfg.folder(), title=cfg.title or f"Run {cfg.run}")
        else:
            files = reports.write_report(cfg.results, cfg.folder(), title=cfg.title or f"Sweep {cfg.results}",
                                         metrics=cfg.metrics, baseline=cfg.baseline)  # fmt: skip
    print("\n".join(map(str, files)))


if __name__ == "__main__":
    main()
