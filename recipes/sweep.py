"""Run other recipes over axes of settings and seeds, share equal steps between cells, and report.

    kdtune run sweep --config sweeps/tiny
    kdtune run sweep --config sweeps/smollm2_case_study dry_run=true
    kdtune run sweep --config sweeps/smollm2_case_study set.train.dataset.source=alpaca.jsonl max_minutes=30

Every step is a separate `kdtune run` with its own log. Finished steps are never run again: the same command, started again,
continues the sweep. Equal steps of several cells (the same recipe, config and overrides) are one step.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdtune import config, reports, runs, sweeps
from kdtune.errors import KDTuneError, TrainingError


@dataclass(kw_only=True)
class Config:
    """All keys of this recipe."""

    output_dir: config.PathText
    """Folder of the sweep: results.jsonl (one object a cell), report/, and steps/ with each step's folder, log and record."""
    steps_dir: config.PathText | None = None
    """Folder of the steps' folders; null: steps/ in output_dir. Sweeps with the same one share their equal steps."""
    models_dir: config.PathText = "models"
    """Folder of downloaded models, for use in overrides as ${models_dir}."""

    # What is run
    steps: dict[str, Any]
    """Step -> `config` (name or path), `recipe` (if omitted: the config's), `overrides` (a list), `when` (axis -> values at
    which it is run, or a list of such mappings), `discard` (parts of its folder to delete when no cell needs
    them any more, such as [final]). Steps run in this order. In an override {lr} is the value of axis lr and {train.dir} the
    folder of the step train."""
    axes: dict[str, Any] = field(default_factory=dict)
    """Axis -> a list of values, or value -> step -> a list of further overrides. The axis `seed` is averaged over."""
    grids: list[dict[str, Any]] | None = None
    """Several products in one sweep: axis -> values for each; an omitted axis has its first value. null: the product of all."""
    set: dict[str, Any] = field(default_factory=dict)
    """Step (or `all`) -> settings that come last; meant for the command line: set.train.dataset.source=alpaca.jsonl."""
    only: dict[str, Any] = field(default_factory=dict)
    """Axis -> values: run only these cells; results and report also contain finished cells of the rest."""

    # How
    dry_run: bool = False
    """Print the cells, their steps and what is already done; run nothing and write nothing."""
    max_minutes: float | None = None
    """Start no new step after this many minutes; null: run to the end."""

    # Report
    report: bool = True
    """Write report/ at the end, from the cells that are finished."""
    title: str | None = None
    """Heading of the report; null: the sweep's config."""
    metrics: list[str] | None = None
    """Metrics to show, STEP.NAME or patterns such as evaluate.*; null: all but standard errors."""
    baseline: dict[str, Any] | None = None
    """Axis values of the baseline in the report; null: no comparison. If one row has them, it is the baseline of all others;
    if several have them, each other row is compared with the one that differs from it only in these axes."""

    def plan(self) -> sweeps.Plan:
        """Return the cells and their steps."""
        return sweeps.make_plan(steps_dir=self.steps_folder(), steps=self.steps, axes=self.axes, grids=self.grids,
                                only=self.only, settings=self.set)  # fmt: skip

    def steps_folder(self) -> Path:
        """Return the folder of the steps' folders."""
        return Path(self.steps_dir) if self.steps_dir else Path(self.output_dir) / "steps"

    def problems(self) -> list[str]:
        """Return config problems, one sentence each; each step's config passes its own recipe's validation."""
        found = []
        if self.max_minutes is not None and self.max_minutes <= 0:
            found.append(f"max_minutes={self.max_minutes}: must be above 0; null sets no limit")
        plan = self.plan()
        found += plan.problems or sweeps.step_problems(plan, machine=False)
        unknown = [axis for axis in self.baseline or {} if axis not in self.axes]
        if unknown:
            return found + [f"baseline.{axis}: no such axis; axes: {', '.join(self.axes)}" for axis in unknown]
        return found if plan.problems else found + reports.baseline_problems(plan, self.baseline)

    def machine_problems(self) -> list[str]:
        """Return machine problems of the steps that need no other step."""
        found = runs.output_dir_problems(self.output_dir, resume=True)
        if any((Path(self.output_dir) / name).exists() for name in ("metrics.jsonl", "final")):
            found.append(f"output_dir={self.output_dir}: holds a training run; choose another output_dir")
        return found if found or self.dry_run else sweeps.step_problems(self.plan(), machine=True)


@config.entry_point(Config)
def main(cfg: Config) -> None:
    """Run the recipe."""
    run(cfg)


def run(cfg: Config) -> None:
    """Plan the sweep, run its steps, write results and report."""
    plan, output_dir = cfg.plan(), Path(cfg.output_dir)
    if cfg.dry_run:
        print(plan_table(plan, list(cfg.steps)))
        return
    with sweeps.locked(cfg.steps_folder()) as lock, runs.InterruptFlag() as interrupt:
        runs.write_run_files(output_dir, resolved_config=config.resolved_yaml(cfg), record=config.run_record(cfg))
        reason, failures = run_cells(cfg, plan, lock, interrupt)
        rows = write_results(plan, output_dir, failures)
    problems = failure_lines(plan, rows)
    if cfg.report and any(row["status"] == sweeps.DONE for row in rows):
        problems += report_problems(cfg, plan)
    print(f"results: {output_dir / 'results.jsonl'}: {len(rows)} of {len(plan.whole)} cells")
    if reason:
        print(f"stopped {reason}; the same command continues from here")
    if problems:
        raise TrainingError("\n".join(problems))


def run_cells(
    cfg: Config, plan: sweeps.Plan, lock: int, interrupt: runs.InterruptFlag
) -> tuple[str | None, dict[str, str]]:
    """Run what is not finished, cell by cell; return why it stopped early (None: it did not) and the failed steps."""
    deadline = time.monotonic() + 60 * cfg.max_minutes if cfg.max_minutes else None
    failures: dict[str, str] = {}
    with sweeps.SweepProgress(len(plan.cells)) as progress:

        def is_stopped() -> bool:
            progress.running()
            return interrupt.requested

        for number, cell in enumerate(plan.cells, start=1):
            for step in sweeps.steps_to_run(cell):
                if step.id in failures:
                    break
                if interrupt.requested:
                    return f"by {interrupt.signal_name}", failures
                if deadline and time.monotonic() > deadline:
                    return f"after max_minutes={cfg.max_minutes:g}", failures
                progress.begin(number, cell, step)
                error = sweeps.run_step(step, lock=lock, stop=is_stopped)
                if error == sweeps.STOPPED:
                    return f"by {interrupt.signal_name} in {step.id}", failures
                if error is not None:
                    failures[step.id] = error
                    progress.write(f"  failed: {error}")
                    break
            write_results(plan, Path(cfg.output_dir), failures)
            discard_unneeded(plan)
            progress.cell_done()
    return None, failures


def discard_unneeded(plan: sweeps.Plan) -> None:
    """Delete what the steps allow, unless an unfinished cell, even of a later start, uses it."""
    unfinished = [cell for cell in plan.whole if not all(step.record.exists() for step in cell.steps)]
    for step in plan.steps:
        if step.discard and step.record.exists() and not any(step in cell.steps for cell in unfinished):
            sweeps.discard(step)


def write_results(plan: sweeps.Plan, output_dir: Path, failures: dict[str, str]) -> list[dict[str, Any]]:
    """Write results.jsonl, with the cells in the plan's order, and return its rows.

    Of the cells that `only` excludes, it has the finished ones.
    """
    found = [sweeps.cell_result(cell, output_dir, failures if cell in plan.cells else {}) for cell in plan.whole]
    rows = [row for row in found if row is not None]
    sweeps.write_rows(output_dir / "results.jsonl", rows)
    return rows


def failure_lines(plan: sweeps.Plan, rows: list[dict[str, Any]]) -> list[str]:
    """Return lines that count the failed cells and describe each."""
    lines = [f"{row['cell']}: {row['failed_step']}: {row['error']}" for row in rows if row["status"] == sweeps.FAILED]
    head = f"{len(lines)} of {len(plan.cells)} cells failed; the same command tries them again"
    return [head, *lines] if lines else []


def report_problems(cfg: Config, plan: sweeps.Plan) -> list[str]:
    """Write the report and print its path; return problems with it instead of raising, so that later messages are not lost."""
    output_dir = Path(cfg.output_dir)
    try:
        with runs.Progress() as progress:
            progress.phase("writing the report")
            files = reports.write_report(output_dir / "results.jsonl", output_dir / "report", title=report_title(cfg),
                                        metrics=cfg.metrics, baseline=cfg.baseline, strict=False,
                                        planned=[cell.axes for cell in plan.whole])  # fmt: skip
    except KDTuneError as error:
        return [f"no report: {error}"]
    print("report:  " + "\n         ".join(map(str, files)))
    return []


def report_title(cfg: Config) -> str:
    """Return the report's heading."""
    source = config.origin(cfg)
    return cfg.title or (f"Sweep {source.config}" if source else "Sweep")


def plan_table(plan: sweeps.Plan, names: list[str]) -> str:
    """Format the plan: a line for each cell with its axes and the state of each step, and the totals below."""
    axes = list(dict.fromkeys(axis for cell in plan.cells for axis in cell.axes))
    waiting = {step.id for cell in plan.cells for step in sweeps.steps_to_run(cell)}
    rows: list[dict[str, Any]] = []
    for number, cell in enumerate(plan.cells, start=1):
        steps = {step.name: f"{step.id.rpartition('-')[2]} {state(plan, step, waiting)}" for step in cell.steps}
        values = {axis: sweeps.shown_value(cell.axes[axis]) if axis in cell.axes else "-" for axis in axes}
        rows.append({"cell": number, **values, **{name: steps.get(name, "-") for name in names}})
    done = sum(all(step.record.exists() for step in cell.steps) for cell in plan.cells)
    counts = [
        f"{name}: {sum(step.name == name for step in plan.steps)} for {sum(s.name == name for c in plan.cells for s in c.steps)} cells"
        for name in names
    ]
    return (
        f"{runs.format_table(rows)}\n\n{len(plan.cells)} cells, {done} done; {len(plan.steps)} steps, {len(waiting)} to run "
        f"({'; '.join(counts)})"
    )


def state(plan: sweeps.Plan, step: sweeps.Step, waiting: set[str]) -> str:
    """Return done, begun, to run or to run again (if in `waiting`), and whether other cells share the step."""
    begun = "to run again" if step.record.exists() else "begun" if step.folder.exists() else "to run"
    word = begun if step.id in waiting else "done"
    return f"{word}, shared" if plan.num_users(step) > 1 else word


if __name__ == "__main__":
    main()
