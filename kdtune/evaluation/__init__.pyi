from .divergence import evaluate_ce, evaluate_kd, forward_cost, perplexity
from .finished_run import run_problems, run_settings
from .inspection import inspect_tokens
from .lm_eval import (
    evaluate_tasks,
    flat_metrics,
    load_tasks,
    missing_extra,
    results_rows,
    task_problems,
)
from .results import Measured
from .rolling import TextPerplexity, read_text, text_perplexity
from .rouge import InstructionSet, RougeResult, evaluate_rouge, repeated, rouge_l, rouge_problems
from .scoring import Score, score

__all__ = [
    "InstructionSet",
    "Measured",
    "RougeResult",
    "Score",
    "TextPerplexity",
    "evaluate_ce",
    "evaluate_kd",
    "evaluate_rouge",
    "evaluate_tasks",
    "flat_metrics",
    "forward_cost",
    "inspect_tokens",
    "load_tasks",
    "missing_extra",
    "perplexity",
    "read_text",
    "repeated",
    "results_rows",
    "rouge_l",
    "rouge_problems",
    "run_problems",
    "run_settings",
    "score",
    "task_problems",
    "text_perplexity",
]
