from .text import estimate_text

__all__ = [
    "estimate_text",
]
