"""Answers to a user's prompts, as a chat."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from kdtune.generation.generate import generate
from kdtune.models import Transformer

if TYPE_CHECKING:
    # Only the type is needed; the tokenizer libraries take a while to import.
    from kdtune.tokenizers import Tokenizer


def answer(
    model: Transformer,
    tokenizer: "Tokenizer",
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    agree: Callable[[list[int]], list[int]] | None = None,
) -> str:
    """The model's answer to one user message in the tokenizer's chat template, without control tokens. See `generate_batch`.

    Raises:
        DataError: if the rendered prompt leaves no room in the model's context.
    """
    prompt_ids, _ = tokenizer.tokenize_messages([{"role": "user", "content": prompt}], add_generation_prompt=True)
    new_ids = generate(
        model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        stop_ids=tokenizer.stop_ids,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        agree=agree,
    )
    return tokenizer.decode(new_ids, skip_special=True).strip()
