"""kdtune: distil large language models into small ones, in pure PyTorch."""

__version__ = "0.1.0"
