from .check import step_problems
from .plan import Cell, Plan, Step, make_plan, shown_value
from .progress import SweepProgress
from .results import DONE, FAILED, cell_result, steps_to_run, write_rows
from .runner import STOPPED, discard, locked, run_step

__all__ = [
    "DONE",
    "FAILED",
    "STOPPED",
    "Cell",
    "Plan",
    "Step",
    "SweepProgress",
    "cell_result",
    "discard",
    "locked",
    "make_plan",
    "run_step",
    "shown_value",
    "step_problems",
    "steps_to_run",
    "write_rows",
]
