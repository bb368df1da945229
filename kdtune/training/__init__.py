"""Building blocks of the training recipes: optimizers, schedules, precision, metrics, loggers, and a run's bookkeeping."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
