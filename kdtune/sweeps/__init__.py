"""Sweeps: plan cells from a grid of settings, run their steps (equal ones once), collect results, and report."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
