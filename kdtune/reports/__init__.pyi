from .baseline import baseline_problems
from .report import read_results, write_report, write_run_page
from .statistics import Difference, Summary, difference, summarize
from .token_page import token_page

__all__ = [
    "Difference",
    "Summary",
    "baseline_problems",
    "difference",
    "read_results",
    "summarize",
    "token_page",
    "write_report",
    "write_run_page",
]
