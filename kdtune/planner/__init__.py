"""Estimates of a run's memory, communication and time, from its config alone: `kdtune plan`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
