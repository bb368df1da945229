from .generate import check_max_new_tokens, eval_mode, generate, generate_batch
from .prompts import encode_prompt, read_prompts
from .rollout import Completion, complete
from .samples import Generator, answer
from .sampling import Sampling, sample_token, sample_tokens
from .speculative import Speculation, check_speculative, complete_speculatively
from .stream import TextStream

__all__ = [
    "Completion",
    "Generator",
    "Sampling",
    "Speculation",
    "TextStream",
    "answer",
    "check_max_new_tokens",
    "check_speculative",
    "complete",
    "complete_speculatively",
    "encode_prompt",
    "eval_mode",
    "generate",
    "generate_batch",
    "read_prompts",
    "sample_token",
    "sample_tokens",
]
