"""The teacher cache: a folder of what a teacher said of each token of a data set, captured once (docs/teacher_cache.md)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
