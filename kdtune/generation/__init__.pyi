from .eval_mode import eval_mode
from .generate import check_sampling, generate, generate_batch
from .prompts import encode_prompt, read_prompts
from .samples import Generator, answer
from .sampling import sample_token, sample_tokens
from .stream import TextStream

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
