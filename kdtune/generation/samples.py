"""Answers to a user's prompts, as a chat."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from kdtune.generation.generate import generate
from kdtune.models import Transformer

if TYPE_CHECKING:
    # Only the type is needed; the tokenizer libraries take a while to import.
    from kdtune.tokenizers import Tokenizer


@runtime_checkable
class Generator(Protocol):
    """What writes the most likely text after a prompt, such as a teacher, wherever its model is."""

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
        agree: Callable[[list[int]], list[int]] | None = None,
    ) -> list[int]:
        """The new ids after prompt_ids, ending with a stop id if there was one."""


def answer(
    model: Transformer | Generator,
    tokenizer: "Tokenizer",
    prompt: str,
    max_new_tokens: int,
    *,
    agree: Callable[[list[int]], list[int]] | None = None,
) -> str:
    """The most likely answer to one user message in the tokenizer's chat template, without control tokens.

    Args:
        model: a model, or what generates with one.
        tokenizer: of the model.
        prompt: the message.
        max_new_tokens: the longest answer.
        agree: see `generate_batch`.

    Raises:
        DataError: if the rendered prompt leaves no room in the model's context.
    """
    prompt_ids, _ = tokenizer.tokenize_messages([{"role": "user", "content": prompt}], add_generation_prompt=True)
    write = partial(generate, model) if isinstance(model, Transformer) else model.generate
    new_ids = write(prompt_ids, max_new_tokens=max_new_tokens, stop_ids=tokenizer.stop_ids, agree=agree)
    return tokenizer.decode(new_ids, skip_special=True).strip()
