from .text import plan_on_paper

__all__ = [
    "plan_on_paper",
]
