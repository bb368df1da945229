"""Structured pruning: drop layers of a model, and the record of a search for those to drop."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
