"""A run on disk and in the terminal: its folder and record, metrics, progress, samples, tables, plots and model card."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
