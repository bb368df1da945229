"""Reports of sweeps: rows over seeds, baselines, tables, curves, plots, and the page."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
