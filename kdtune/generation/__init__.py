"""Text from a model."""

from kdtune.generation.eval_mode import eval_mode
from kdtune.generation.generate import check_sampling, generate, generate_batch
from kdtune.generation.samples import answer
from kdtune.generation.sampling import sample_token, sample_tokens

__all__ = ["answer", "check_sampling", "eval_mode", "generate", "generate_batch", "sample_token", "sample_tokens"]
