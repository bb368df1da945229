from .baseline import baseline_problems
from .check import step_problems
from .plan import Cell, Plan, Step, make_plan, shown_value
from .progress import SweepProgress
from .report import read_results, write_report
from .results import DONE, FAILED, cell_result, steps_to_run, write_rows
from .runner import STOPPED, discard, locked, run_step
from .statistics import Difference, Summary, difference, summarize

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
