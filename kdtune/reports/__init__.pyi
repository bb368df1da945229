from .baseline import baseline_problems
from .report import read_results, write_report
from .statistics import Difference, Summary, difference, summarize

__all__ = [
    "Difference",
    "Summary",
    "baseline_problems",
    "difference",
    "read_results",
    "summarize",
    "write_report",
]
