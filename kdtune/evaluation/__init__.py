"""Held-out measurements: loss and divergence, lm-eval tasks, perplexity of texts, ROUGE-L of answers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
