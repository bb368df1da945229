"""Text from a model."""

from kdtune.generation.eval_mode import eval_mode
from kdtune.generation.generate import generate
from kdtune.generation.samples import answer
from kdtune.generation.sampling import sample_token

__all__ = ["answer", "eval_mode", "generate", "sample_token"]
