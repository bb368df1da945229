"""Whose text is learned from: the data's, the student's own, or the teacher's."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
