"""Generate text from a model."""

from kdtune.generation.eval_mode import eval_mode
from kdtune.generation.generate import check_sampling, generate, generate_batch
from kdtune.generation.prompts import encode_prompt, read_prompts
from kdtune.generation.samples import Generator, answer
from kdtune.generation.sampling import sample_token, sample_tokens
from kdtune.generation.stream import TextStream

__all__ = [
    "Generator",
    "TextStream",
    "answer",
    "check_sampling",
    "encode_prompt",
    "eval_mode",
    "generate",
    "generate_batch",
    "read_prompts",
    "sample_token",
    "sample_tokens",
]
