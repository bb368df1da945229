"""Held-out measurements: loss and divergence, lm-eval tasks, perplexity of texts, ROUGE-L of answers."""

from kdtune.evaluation.divergence import evaluate_ce, evaluate_kd, perplexity
from kdtune.evaluation.finished_run import run_problems, run_settings
from kdtune.evaluation.lm_eval import (
    evaluate_tasks,
    flat_metrics,
    load_tasks,
    missing_extra,
    results_rows,
    task_problems,
)
from kdtune.evaluation.results import Measured, repeated
from kdtune.evaluation.rolling import TextPerplexity, read_text, text_perplexity
from kdtune.evaluation.rouge import InstructionSet, RougeResult, evaluate_rouge, rouge_l, rouge_problems
from kdtune.evaluation.scoring import Score, score

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
