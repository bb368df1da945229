"""Compare training runs: one table, one plot and their answers.

    kdtune run compare "runs=[runs/quickstart/sft,runs/quickstart/kd]"

The runs' own validations are compared, so nothing is recomputed. They must have the same held-out data and tokenizer;
divergence and agreement are shown if the teacher is the same too. Writes comparison.png and comparison.csv.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from kdtune import checkpoint, config, runs
from kdtune.log import fit_for_stdout


@dataclass(kw_only=True)
class Config:
    """All keys of this recipe."""

    runs: list[config.PathText]
    """The output folders of training runs, in the order to show them."""
    output_dir: config.PathText | None = None
    """Folder to write into, replacing an earlier comparison there; null: the folder that contains the runs."""

    def problems(self) -> list[str]:
        """Return config problems, one sentence each."""
        return [] if self.runs else ["runs: is empty; name the output folders of training runs"]

    def machine_problems(self) -> list[str]:
        """Return machine problems, found before anything is written."""
        if found := [f"runs: {folder}: no such folder" for folder in self.runs if not Path(folder).is_dir()]:
            return found
        folder = self.output_dir or shared_parent(self.runs)
        if self.output_dir is None and os.path.dirname(os.path.abspath(folder)) == os.path.abspath(folder):
            return ["output_dir: the runs lie in no folder together but the root; give a folder to write into"]
        return runs.writing_problems(folder)


@config.entry_point(Config, default_config="comparison")
def main(cfg: Config) -> None:
    """Run the recipe."""
    run(cfg)


def run(cfg: Config) -> None:
    """Read the runs, print answers and table, draw the plot."""
    found, notes = runs.comparable(runs.read_runs(cfg.runs))
    output_dir = Path(cfg.output_dir or shared_parent(cfg.runs))
    metrics = {name: one.rows for name, one in found.items()}
    divergence = runs.shared_divergence_title(found)
    table, plot = output_dir / "comparison.csv", output_dir / "comparison.png"
    with checkpoint.writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        runs.plot_runs(metrics, plot, divergence=divergence)
    checkpoint.atomic_write_text(table, runs.metrics_csv(found))

    samples = {name: one.samples for name, one in found.items() if one.samples}
    print(fit_for_stdout(runs.samples_text(samples)), end="\n" if samples else "")
    print(fit_for_stdout(runs.comparison_table(metrics, divergence=divergence) or ""))
    print("\n".join([*notes, f"plot:  {plot}", f"table: {table}"]))


def shared_parent(folders: list[str]) -> str:
    """Return the innermost folder that contains all of them, as a relative path if they are given as relative paths."""
    parent = os.path.commonpath([os.path.dirname(os.path.abspath(folder)) for folder in folders])
    return parent if any(map(os.path.isabs, folders)) else os.path.relpath(parent)


if __name__ == "__main__":
    main()
