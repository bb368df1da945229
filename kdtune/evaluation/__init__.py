"""Held-out measurements."""

from kdtune.evaluation.divergence import evaluate_ce, evaluate_kd, perplexity

__all__ = ["evaluate_ce", "evaluate_kd", "perplexity"]
