"""Sweeps: plan cells from a grid of settings, run their steps (equal ones once), collect results, and report."""

from kdtune.sweeps.baseline import baseline_problems
from kdtune.sweeps.check import step_problems
from kdtune.sweeps.plan import Cell, Plan, Step, make_plan, shown_value
from kdtune.sweeps.progress import SweepProgress
from kdtune.sweeps.report import read_results, write_report
from kdtune.sweeps.results import DONE, FAILED, cell_result, steps_to_run, write_rows
from kdtune.sweeps.runner import STOPPED, discard, locked, run_step
from kdtune.sweeps.statistics import Difference, Summary, difference, summarize

__all__ = [
    "DONE",
    "FAILED",
    "STOPPED",
    "Cell",
    "Difference",
    "Plan",
    "Step",
    "Summary",
    "SweepProgress",
    "baseline_problems",
    "cell_result",
    "difference",
    "discard",
    "locked",
    "make_plan",
    "read_results",
    "run_step",
    "shown_value",
    "step_problems",
    "steps_to_run",
    "summarize",
    "write_report",
    "write_rows",
]
