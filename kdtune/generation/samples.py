"""Answers to single prompts, in the chat template."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from kdtune.generation.generate import generate
from kdtune.models import Transformer

if TYPE_CHECKING:
    # Only the type is needed; the tokenizer libraries take a while to import.
    from kdtune.tokenizers import Tokenizer


@runtime_checkable
class Generator(Protocol):
    """An object that generates greedily from a prompt, such as a teacher, wherever its model is."""

    def generate(
        self, prompt_ids: Sequence[int], *, max_new_tokens: int, stop_ids: Collection[int], sync_tokens: bool = False
    ) -> list[int]:
        """Return the new ids after prompt_ids, including a final stop id if there was one."""


def answer(
    model: Transformer | Generator,
    tokenizer: "Tokenizer",
    prompt: str,
    max_new_tokens: int,
    *,
    sync_tokens: bool = False,
) -> str:
    """Return the greedy answer to one user message in the tokenizer's chat template, without special tokens.

    Args:
        model: a model, or an object that generates with one.
        tokenizer: the model's.
        prompt: the message.
        max_new_tokens: the longest answer.
        sync_tokens: see `generate_batch`.

    Raises:
        DataError: the rendered prompt leaves no room in the model's context.
    """
    prompt_ids, _ = tokenizer.tokenize_messages([{"role": "user", "content": prompt}], add_generation_prompt=True)
    write = partial(generate, model) if isinstance(model, Transformer) else model.generate
    new_ids = write(prompt_ids, max_new_tokens=max_new_tokens, stop_ids=tokenizer.stop_ids, sync_tokens=sync_tokens)
    return tokenizer.decode(new_ids, skip_special=True).strip()
